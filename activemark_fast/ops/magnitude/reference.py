"""The ground truth of the magnitude op, in plain PyTorch: any floating-point dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def top_magnitudes_reference(
    x: Tensor,  # (images, tokens, width)
    k: int,  # 1 ... tokens * width
) -> tuple[Tensor, Tensor, Tensor]:  # (images, k) float32, (images, k) int64, (images,) int64
    """Sort every |value| of an image and keep the first k; see `op.top_magnitudes`."""
    magnitude = x.detach().to(torch.float32).flatten(1).abs()
    finite = magnitude.isfinite()
    # A stable sort keeps equal magnitudes in the order of their index; -1 sorts behind every magnitude.
    values, index = magnitude.masked_fill(~finite, -1.0).sort(dim=1, descending=True, stable=True)
    values, index = values[:, :k], index[:, :k]
    missing = values < 0
    return values.masked_fill(missing, torch.nan), index.masked_fill(missing, -1), (~finite).sum(dim=1)
