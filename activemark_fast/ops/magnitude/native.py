"""Launcher of the compiled magnitude kernel (csrc/magnitude_cpu.cpp)."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor


def load_native() -> ModuleType:
    """Import the compiled module, on first use and not with the package.

    Raises:
        ImportError: the module was not built, or cannot be loaded by this Python.
    """
    try:
        return importlib.import_module("activemark_fast._native")
    except ImportError as error:
        raise ImportError(
            f"the compiled module activemark_fast._native cannot be loaded ({error}); build it with "
            "`pip install -e .` (or `pip install .`) in the source folder, which needs a C++17 compiler"
        ) from error


def top_magnitudes_native(
    x: Tensor,  # (images, tokens, width) float32 on the CPU, every x[i] contiguous
    k: int,  # 1 ... tokens * width
) -> tuple[Tensor, Tensor, Tensor]:  # (images, k) float32, (images, k) int64, (images,) int64
    """One pass over the values of each image; see `op.top_magnitudes`."""
    images, tokens, width = x.shape
    values = torch.empty(images, k, dtype=torch.float32)
    index = torch.empty(images, k, dtype=torch.int64)
    nonfinite = torch.empty(images, dtype=torch.int64)
    load_native().top_magnitudes_f32(
        x=x.data_ptr(),
        images=images,
        values_per_image=tokens * width,
        image_stride=x.stride(0),
        k=k,
        values=values.data_ptr(),
        index=index.data_ptr(),
        nonfinite=nonfinite.data_ptr(),
    )
    return values, index, nonfinite
