"""The ground truth of the magnitude op, in plain PyTorch: any floating-point dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The fields of `op.Magnitudes`."""


def magnitudes_reference(
    x: Tensor,  # (images, tokens, width)
    k: int,  # 1 ... tokens * width
) -> Outputs:
    """Sort every |value| of an image; see `op.magnitudes`."""
    magnitude = x.to(torch.float32).flatten(1).abs()
    finite = magnitude.isfinite()
    # A stable sort keeps equal magnitudes in the order of their index; -1 sorts behind every magnitude.
    ordered, order = magnitude.masked_fill(~finite, -1.0).sort(dim=1, descending=True, stable=True)
    values, index = ordered[:, :k], order[:, :k]
    missing = values < 0
    count = finite.sum(dim=1)
    # Of c finite values in descending order, place c // 2 holds the ceil(c / 2)-th smallest.
    median = ordered.gather(1, (count // 2)[:, None])[:, 0]
    squares = magnitude.masked_fill(~finite, 0.0).double().square().sum(dim=1)
    return (
        values.masked_fill(missing, torch.nan),
        index.masked_fill(missing, -1),
        median.masked_fill(count == 0, torch.nan),
        (squares / count).float(),
        (~finite).sum(dim=1),
    )
