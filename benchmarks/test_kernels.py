"""Microseconds of the injection and decoding kernels, against PyTorch eager and compiled, on a GPU.

`make gpu` runs it and writes the table. Sizes are ViT-L/14's; the floor is the time that the bytes a call has
to move take at the speed of a large copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import in_a_graph, seconds
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from activemark_fast.ops.bits import pack_bits
from activemark_fast.ops.common import Perceptron
from activemark_fast.ops.decode import decode_keyed, decode_learned
from activemark_fast.ops.decode.reference import decode_keyed_reference, decode_learned_reference
from activemark_fast.ops.inject import inject_keyed, inject_learned
from activemark_fast.ops.inject.reference import inject_keyed_reference, inject_learned_inplace_reference

pytestmark = pytest.mark.gpu

TOKENS, WIDTH, BITS, SLOTS, INDEX = 257, 1024, 32, 64, 77
ENCODER_WIDTH, DECODER_WIDTH = 1024, 512
BATCHES = [1, 16, 256]
ROUNDS = 30

Run = Callable[[], Any]


def perceptron(inputs: int, hidden: int, outputs: int) -> Perceptron:
    return Perceptron(
        torch.randn(hidden, inputs, device="cuda") * inputs**-0.5,
        torch.randn(hidden, device="cuda"),
        torch.randn(outputs, hidden, device="cuda") * hidden**-0.5,
        torch.randn(outputs, device="cuda"),
    )


def learned_eager(output: Tensor, source: Tensor, words: Tensor, encoder: Perceptron) -> Tensor:
    injected = output.clone()
    inject_learned_inplace_reference(injected, source, words, encoder, INDEX, 1)
    return injected


class Case:
    """An op on `batch` images in bfloat16: the kernel, its PyTorch reference, the bytes it has to move."""

    def __init__(self, op: str, batch: int) -> None:
        torch.manual_seed(0)
        words = pack_bits(torch.randint(0, 2, (batch, BITS), device="cuda"))
        slots = torch.arange(1, 1 + SLOTS, device="cuda") * 4 - 3
        directions = torch.randn(BITS, WIDTH, device="cuda") * WIDTH**-0.5
        scale = torch.tensor(1.0, device="cuda")
        copies = 2 if op == "decode_keyed" else 1
        stream = torch.randn(copies * batch, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
        self.kernel: Run
        self.reference: Callable[..., Any]
        self.arguments: tuple[Any, ...]
        channel = batch * WIDTH * stream.element_size()
        if op == "inject_keyed":
            self.arguments = (stream, directions, scale, words, slots)
            self.reference = inject_keyed_reference
            self.kernel = lambda: inject_keyed(*self.arguments)
            self.bytes = 3 * size(stream) + size(directions)
        elif op == "decode_keyed":
            self.arguments = (stream, directions, scale, slots, words, 1.0)
            self.reference = decode_keyed_reference
            self.kernel = lambda: decode_keyed(*self.arguments)
            self.bytes = size(stream) * SLOTS // TOKENS + size(directions)
        elif op == "inject_learned":
            encoder = perceptron(WIDTH + BITS, ENCODER_WIDTH, WIDTH)
            self.arguments = (stream, stream.clone(), words, encoder)
            self.reference = learned_eager
            self.kernel = lambda: inject_learned(*self.arguments, INDEX, "token")
            self.bytes = 2 * size(stream) + channel + sum(map(size, encoder))
        else:
            decoder = perceptron(WIDTH, DECODER_WIDTH, BITS)
            self.arguments = (stream[:, INDEX], decoder, words, 1.0)
            self.reference = decode_learned_reference
            self.kernel = lambda: decode_learned(stream, decoder, INDEX, "token", words)
            self.bytes = channel + sum(map(size, decoder))


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def bytes_per_second() -> float:
    """Of a copy of half a GiB, each byte read and written."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / min(seconds(lambda: target.copy_(source)) for _ in range(10))


def first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("op", ["inject_keyed", "decode_keyed", "inject_learned", "decode_learned"])
@torch.no_grad()
def test_kernel(benchmark: BenchmarkFixture, op: str, batch: int) -> None:
    case = Case(op, batch)

    def eager() -> Any:
        return case.reference(*case.arguments)

    torch._dynamo.reset()
    compiled_reference = torch.compile(case.reference, dynamic=False)

    def compiled() -> Any:
        return compiled_reference(*case.arguments)

    # No figure of a kernel that is wrong.
    got, want = first(case.kernel()).float(), first(eager()).float()
    assert (got - want).abs().max() <= 1e-2 * want.abs().max()
    compiled()

    microseconds = {}
    for name, run in (("kernel", case.kernel), ("eager", eager), ("compiled", compiled)):
        for graphed in (False, True):
            timed = in_a_graph(run) if graphed else run
            seconds(timed)
            measured = sorted(1e6 * seconds(timed) for _ in range(ROUNDS))
            label = f"{name}, graph" if graphed else name
            for share in (20, 50, 80):
                microseconds[f"{label} p{share}"] = round(measured[ROUNDS * share // 100], 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.kernel()
    peak = torch.cuda.max_memory_allocated() - before
    floor = 1e6 * case.bytes / bytes_per_second()

    benchmark.pedantic(lambda: seconds(case.kernel), rounds=3)
    benchmark.extra_info.update(
        op=op, batch=batch, **microseconds, floor=round(floor, 2), peak_mib=round(peak / 2**20, 1)
    )
