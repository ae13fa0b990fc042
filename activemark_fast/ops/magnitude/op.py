"""Magnitude statistics of an activation: one call for every device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from activemark_fast.ops.common import check_stream


class Magnitudes(NamedTuple):
    """Statistics of the |activations| of each image, on the device of the activations."""

    values: Tensor
    """(images, k) float32, the largest, descending; NaN where an image has fewer than k finite values."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """(images, k) int64, where they sit: token * width + channel; -1 where `values` is NaN."""
    median: Tensor
    """(images,) float32, of the finite |values|, the lower of two middle ones; NaN where there is none.

    Exact in bfloat16 and where PyTorch sorts; within 0.25 % in float16 and float32."""
    mean_square: Tensor
    """(images,) float32, over the finite values; NaN where there is none."""
    nonfinite: Tensor
    """(images,) int64, how many values of the image are NaN or infinite (as float32)."""


def magnitudes(
    x: Tensor,  # (images, tokens, width)
    k: int,
) -> Magnitudes:
    """Magnitude statistics of every image's activation.

    NaN and infinities are counted and take part in nothing else; of equal magnitudes the lower index comes
    first. Magnitudes are compared as float32, whatever the dtype of `x`. Nothing is differentiable.

    float32, float16 and bfloat16 whose x[i] are contiguous (the stride between images is free) run in the
    compiled kernels: one pass over memory on the CPU; on CUDA, up to k = 32, one kernel which the host does
    not wait for. PyTorch sorts everything else.

    Args:
        x: Activations (images, tokens, width) of any floating-point dtype, on any device.
        k: How many values to keep of each image, 1 ... tokens * width.

    Returns:
        The statistics, see `Magnitudes`.

    Raises:
        TypeError: `x` is no floating-point tensor, or `k` no int.
        ValueError: `x` has not three dimensions, or `k` is out of range.
        ImportError: the compiled module is needed and missing.

    Warns:
        RuntimeWarning: `x` is on CUDA, and the package was built without it.
    """
    check_stream("x", x)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: wanted int, got {type(k).__name__}")
    values_per_image = x.shape[1] * x.shape[2]
    if not 1 <= k <= values_per_image:
        raise ValueError(f"k: wanted 1 ... tokens * width = {values_per_image}, got {k}")
    return Magnitudes(*_operators().magnitudes(x.detach(), k))


def _operators() -> Any:
    import activemark_fast.ops.magnitude.registration  # noqa: F401  # as that of the other ops

    return torch.ops.activemark_fast
