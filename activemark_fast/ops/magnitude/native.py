"""Launcher of the compiled magnitude kernels (csrc/magnitude.hpp)."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from activemark_fast.ops.native import load_native

_kept = threading.local()
"""Of each thread: the scratch memory of its last call. New memory would fault page by page."""


def takes(x: Tensor) -> bool:
    """Whether the compiled kernels read `x` as it is: its dtype, and every x[i] contiguous."""
    return x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x[:1].is_contiguous()


def magnitudes_cpu(
    x: Tensor,  # (images, tokens, width) that the kernels take, on the CPU
    k: int,  # 1 ... tokens * width
    instructions: str | None = None,  # "portable", "avx2" or "avx512"; by default this processor's best
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over the values of each image; see `op.magnitudes`."""
    native = load_native()
    threads = torch.get_num_threads()
    size = native.scratch_size(values_per_image=x.shape[1] * x.shape[2], threads=threads)
    scratch = _scratch(size)
    outputs = _outputs(x, k)
    native.magnitudes_cpu(
        **_activations(x, native),
        **_addresses(outputs),
        k=k,
        scratch=scratch.data_ptr(),
        threads=threads,
        instructions=getattr(native.Instructions, instructions)
        if instructions
        else native.best_instructions(),
    )
    return outputs


def _scratch(size: int) -> Tensor:
    kept: Tensor | None = getattr(_kept, "scratch", None)
    if kept is None or len(kept) < size:
        kept = _kept.scratch = torch.empty(size, dtype=torch.int8)
    return kept


def has_cuda() -> bool:
    """Whether the compiled module was built with CUDA."""
    return bool(load_native().cuda)


def max_top_cuda() -> int:
    """The largest k of `magnitudes_cuda`."""
    return int(load_native().MAX_TOP_CUDA)


def magnitudes_cuda(
    x: Tensor,  # (images, tokens, width) that the kernels take, on a CUDA device
    k: int,  # 1 ... max_top_cuda()
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same in one kernel on the current stream, which the host does not wait for."""
    native = load_native()
    with torch.cuda.device(x.device):
        size = native.scratch_size_cuda(images=len(x), values_per_image=x.shape[1] * x.shape[2])
        if size < 0:
            raise RuntimeError(f"CUDA does not tell the properties of {x.device}")
        scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
        outputs = _outputs(x, k)
        native.magnitudes_cuda(
            **_activations(x, native),
            **_addresses(outputs),
            k=k,
            scratch=scratch.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return outputs


def _outputs(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, device = len(x), x.device
    return (
        torch.empty(images, k, dtype=torch.float32, device=device),
        torch.empty(images, k, dtype=torch.int64, device=device),
        torch.empty(images, dtype=torch.float32, device=device),
        torch.empty(images, dtype=torch.float32, device=device),
        torch.empty(images, dtype=torch.int64, device=device),
    )


def _activations(x: Tensor, native: ModuleType) -> dict[str, Any]:
    return {
        "x": x.data_ptr(),
        "dtype": getattr(native.Dtype, str(x.dtype).removeprefix("torch.")),
        "images": x.shape[0],
        "values_per_image": x.shape[1] * x.shape[2],
        "image_stride": x.stride(0),
    }


def _addresses(outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> dict[str, int]:
    names = ("values", "index", "median", "mean_square", "nonfinite")
    return {name: tensor.data_ptr() for name, tensor in zip(names, outputs, strict=True)}
