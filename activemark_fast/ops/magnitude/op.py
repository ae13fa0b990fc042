from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from activemark_fast.ops.magnitude.native import top_magnitudes_native
from activemark_fast.ops.magnitude.reference import top_magnitudes_reference


class TopMagnitudes(NamedTuple):
    """The largest |activations| of each image, on the device of the activations."""

    values: Tensor
    """(images, k) float32, descending; NaN where an image has fewer than k finite values."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """(images, k) int64, token * width + channel; -1 where `values` is NaN."""
    nonfinite: Tensor
    """(images,) int64, how many values of the image are NaN or infinite (as float32)."""


def top_magnitudes(
    x: Tensor,  # (images, tokens, width)
    k: int,
) -> TopMagnitudes:
    """Find the k largest |values| of every image's activation.

    NaN and infinities are counted and never ranked; of equal magnitudes the lower index comes first.
    Magnitudes are compared as float32, whatever the dtype of `x`. Nothing is differentiable.
    CPU float32 whose x[i] are contiguous (the stride between images is free) runs in the compiled kernel,
    everything else in plain PyTorch.

    Args:
        x: Activations (images, tokens, width) of any floating-point dtype, on any device.
        k: How many values to keep of each image, 1 ... tokens * width.

    Returns:
        TopMagnitudes with `values` (images, k) float32, `index` (images, k) int64 into the flattened
        (tokens, width), and `nonfinite` (images,) int64.

    Raises:
        TypeError: `x` is no floating-point tensor, or `k` no int.
        ValueError: `x` has not three dimensions, or `k` is out of range.
        ImportError: the compiled module is needed and missing.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must have a real floating-point dtype, got {x.dtype}")
    if x.dim() != 3:
        raise ValueError(f"x must have the shape (images, tokens, width), got {tuple(x.shape)}")
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    values_per_image = x.shape[1] * x.shape[2]
    if not 1 <= k <= values_per_image:
        raise ValueError(f"k must be in 1 ... tokens * width = {values_per_image}, got {k}")

    if x.device.type == "cpu" and x.dtype == torch.float32 and x[:1].is_contiguous():
        return TopMagnitudes(*top_magnitudes_native(x, k))
    return TopMagnitudes(*top_magnitudes_reference(x, k))
