"""The magnitude kernel against the memory it reads and against PyTorch: `make bench`.

The activation is one of ViT-L/14: 8 images of 257 tokens of width 1024. It is read from memory (a different
one each round, together larger than any cache) and, as in a profile, where the block before has just left it.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from measure import in_a_graph, seconds
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from activemark_fast.ops.magnitude import magnitudes
from activemark_fast.ops.magnitude.reference import magnitudes_reference

SHAPE = (8, 257, 1024)
K = 5
MEMORY = 256 << 20
"""Bytes: more than the caches hold."""
ROUNDS = 100
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def topk_and_median(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What one would write in PyTorch."""
    magnitude = x.float().flatten(1).abs()
    return magnitude.topk(k).values, magnitude.median(dim=1).values


def fastest(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some runs."""

    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(once() for _ in range(rounds))


def reader(size: int, threads: int) -> Callable[[], None]:
    """Reads `size` bytes of memory, other ones each time: the C library's search for a byte not there."""
    memory = torch.ones(MEMORY, dtype=torch.uint8)  # zeros would be one page, seen again and again
    starts = itertools.cycle(range(0, MEMORY - size + 1, size))
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    part = size // threads
    pool = ThreadPoolExecutor(threads)

    def read() -> None:
        start = memory.data_ptr() + next(starts)
        others = [pool.submit(memchr, start + i * part, 0, part) for i in range(1, threads)]
        memchr(start, 0, part)
        for other in others:
            other.result()

    return read


@pytest.fixture
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["memory", "cache"])
def test_magnitudes(benchmark: BenchmarkFixture, dtype: torch.dtype, threads: int, where: str) -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    size = x.numel() * x.element_size()
    copies = itertools.cycle([x] if where == "cache" else [x.clone() for _ in range(MEMORY // size)])
    torch.testing.assert_close(magnitudes(x, K).values, magnitudes_reference(x, K)[0], rtol=0, atol=0)

    read = reader(size, threads)
    reading: list[float] = []

    def read_by_turns() -> None:  # what slows one down slows down the other
        if where == "memory":
            reading.append(fastest(read, 1))

    benchmark.pedantic(
        lambda: magnitudes(next(copies), K), setup=read_by_turns, rounds=ROUNDS, warmup_rounds=3
    )
    benchmark.extra_info["GB/s"] = round(size / benchmark.stats["min"] / 1e9, 1)
    if where == "memory":
        benchmark.extra_info["read GB/s"] = round(size / min(reading) / 1e9, 1)
        benchmark.extra_info["over read bandwidth"] = round(min(reading) / benchmark.stats["min"], 2)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("other", [magnitudes_reference, topk_and_median], ids=["sort", "topk_and_median"])
def test_magnitudes_against(benchmark: BenchmarkFixture, other: Callable, dtype: torch.dtype) -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    benchmark.pedantic(magnitudes, (x, K), rounds=ROUNDS, warmup_rounds=3)
    seconds = fastest(lambda: other(x, K), 3)
    benchmark.extra_info["times faster"] = round(seconds / benchmark.stats["min"], 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_on_a_gpu(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    x = torch.randn(64, 257, 1024, device="cuda").to(dtype)
    target = torch.empty_like(x)
    torch.testing.assert_close(magnitudes(x, K).values, magnitudes_reference(x, K)[0], rtol=0, atol=0)
    graphed = in_a_graph(lambda: magnitudes(x, K))  # without the host's part, which runs ahead of the device
    copy = min(seconds(lambda: target.copy_(x)) for _ in range(ROUNDS))
    measured = min(seconds(graphed) for _ in range(ROUNDS))

    def alone() -> None:
        magnitudes(x, K)
        torch.cuda.synchronize()

    benchmark.pedantic(alone, rounds=ROUNDS)
    # A copy reads and writes each byte.
    benchmark.extra_info.update(
        {
            "microseconds in a graph": round(1e6 * measured, 1),
            "a copy's": round(1e6 * copy, 1),
            "over copy bandwidth": round(copy / 2 / measured, 2),
        }
    )
