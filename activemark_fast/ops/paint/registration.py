"""The operators behind `op`, registered with PyTorch: schema, fake, and what runs where.

Where nothing is registered nothing is painted: the reference is a test's (tests/painting_reference.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from activemark_fast.ops.paint import native
from activemark_fast.ops.registry import register_compiled

_OCTAVES = "Tensor[] lattices, int[] shifts"
_AXES = "float[] lightness, float[] yellow, float[] red"
_SIZE = "int height, int width"


def _leaves_fake(discs: Tensor, *rest: Any) -> Tensor:
    return discs.new_empty(3, *rest[-2:], dtype=torch.uint8)


def _clouds_fake(lattices: Sequence[Tensor], *rest: Any) -> Tensor:
    return lattices[0].new_empty(3, *rest[-2:], dtype=torch.uint8)


register_compiled(
    f"paint_leaves(Tensor discs, {_OCTAVES}, {_SIZE}) -> Tensor", fake=_leaves_fake, cpu=native.paint_leaves
)
register_compiled(
    f"paint_clouds({_OCTAVES}, float gain, {_AXES}, {_SIZE}) -> Tensor",
    fake=_clouds_fake,
    cpu=native.paint_clouds,
)
