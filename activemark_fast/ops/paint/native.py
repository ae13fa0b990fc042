"""Launcher of the compiled painter (csrc/paint.hpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from activemark_fast.ops.native import load_native


def paint_leaves(
    discs: Tensor, lattices: Sequence[Tensor], shifts: Sequence[int], height: int, width: int
) -> Tensor:
    """See `op.paint_leaves`."""
    image = torch.empty(3, height, width, dtype=torch.uint8)
    discs, lattices = discs.contiguous(), [lattice.contiguous() for lattice in lattices]
    load_native().paint_leaves(
        height=height,
        width=width,
        discs=discs.data_ptr(),
        disc_count=len(discs),
        octaves=_octaves(lattices, shifts),
        image=image.data_ptr(),
    )
    return image


def paint_clouds(
    lattices: Sequence[Tensor],
    shifts: Sequence[int],
    gain: float,
    lightness: Sequence[float],
    yellow: Sequence[float],
    red: Sequence[float],
    height: int,
    width: int,
) -> Tensor:
    """See `op.paint_clouds`."""
    image = torch.empty(3, height, width, dtype=torch.uint8)
    lattices = [lattice.contiguous() for lattice in lattices]
    load_native().paint_clouds(
        height=height,
        width=width,
        octaves=_octaves(lattices, shifts),
        gain=gain,
        lightness=tuple(lightness),
        yellow=tuple(yellow),
        red=tuple(red),
        image=image.data_ptr(),
    )
    return image


def _octaves(lattices: Sequence[Tensor], shifts: Sequence[int]) -> list[tuple[int, int, int]]:
    addresses = (lattice.data_ptr() for lattice in lattices)
    return list(zip(addresses, shifts[::2], shifts[1::2], strict=True))
