"""What the benchmarks measure beside time: matrix products, FLOPs, presentations, memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from activemark_fast.backbone import Backbone
from activemark_fast.runtime import resolve_autocast

MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows of the matrices whose product is the measure of a device."""
CALLS = 20
"""Calls of a kernel between two looks at the clock."""
SAMPLING = 0.005
"""Seconds between two looks at the memory in use."""


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a product of two square matrices, in what `embed` computes in by default: the best of ten."""
    rows = MATRIX[device.type]
    with resolve_autocast("auto", device)(torch.float32):
        mixed = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if mixed else torch.float32
    a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))

    def once() -> float:
        start = time.perf_counter()
        a @ b
        synchronise(device)
        return time.perf_counter() - start

    once()
    return 2 * rows**3 / min(once() for _ in range(10))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object]) -> float:
    """Of one call on a GPU, among CALLS that follow one another."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def in_a_graph(run: Callable[[], object]) -> Callable[[], object]:
    """`run`, recorded in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class _Flops(TorchDispatchMode):
    """Adds up by PyTorch's own formulas; its FlopCounterMode does not go with `torch.autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is torch.ops.aten.addmm_:
            self.total += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            (batch, heads, queries, width), keys = args[0].shape, args[1].shape[2]
            self.total += 4 * batch * heads * queries * keys * width
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            (batch, heads, queries, width), keys = args[1].shape, args[2].shape[2]
            self.total += 10 * batch * heads * queries * keys * width
        return out


def flops_of(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in `run`."""
    with _Flops() as counter:
        run()
    return counter.total


@contextlib.contextmanager
def presentations(model: nn.Module) -> Iterator[list[int]]:
    """Counts, in a list of one, the images that pass the last but one block of `model` or its copies."""
    count = [0]

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        count[0] += args[0].shape[0]

    handle = Backbone(model).blocks[-2].register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


class PeakMemory:
    """Most bytes in use within the block, over those before it: `with PeakMemory(device) as peak`.

    On a CPU that is resident memory, with what glibc keeps of freed blocks; MALLOC_MMAP_THRESHOLD_=131072 in
    the environment makes it give back all but small ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        with contextlib.suppress(AttributeError, OSError):  # what was freed goes back to the system (glibc)
            ctypes.CDLL(None).malloc_trim(0)
        self._before = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLING):
            self.bytes = max(self.bytes, _resident() - self._before)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
