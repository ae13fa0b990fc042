"""Painting images, on the CPU: the same to the bit on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from activemark_fast.ops.common import check_tensor

DISC_VALUES = 9
"""x, y and radius in pixels; lightness, yellow and red of its middle; lightness a pixel across and down; the
amplitude of its texture."""
_CPU = torch.device("cpu")


class Octave(NamedTuple):
    """One octave of a random field. Octave i is a lattice whose points are 2^i pixels apart."""

    lattice: Tensor
    """(channels, rows, columns) float64, for an image of h rows (h - 1 + shift_y) // 2^i + 2 rows; columns
    likewise."""
    shift_y: int
    """Pixels, 0 ... 2^i - 1: pixel (0, 0) lies there on the lattice."""
    shift_x: int
    """The same across."""


def paint_leaves(
    discs: Tensor,  # (discs, 9) float64
    texture: Sequence[Octave],  # of one channel
    size: tuple[int, int],
) -> Tensor:
    """Opaque one-coloured discs, of which a later one hides an earlier one; the first lies everywhere.

    Args:
        discs: (discs, 9) float64, see `DISC_VALUES`.
        texture: Octaves of one channel, each of the same amplitude; at most 32, or none.
        size: (h, w) of the image in pixels.

    Returns:
        (3, h, w) uint8, red, green and blue.

    Raises:
        TypeError, ValueError: an argument is not as described.
        MemoryError: there is none for an image in float64.
        ImportError: the compiled module is missing.
    """
    _check_size(size)
    check_tensor("discs", discs, (-1, DISC_VALUES), torch.float64, _CPU)
    _check_octaves("texture", texture, 1, size)
    return _operators().paint_leaves(discs, *_flat(texture), *size)


def paint_clouds(
    field: Sequence[Octave],  # of three channels
    gain: float,
    lightness: tuple[float, float],
    yellow: tuple[float, float],
    red: tuple[float, float],
    size: tuple[int, int],
) -> Tensor:
    """A random field of three channels: lightness, yellow and red.

    Args:
        field: Octaves of three channels, at least one and at most 32.
        gain: By which the amplitude grows from an octave to the next coarser one.
        lightness: (mean, spread): what is painted of a field of -1 ... 1 is mean + spread * value.
        yellow: The same of the second channel.
        red: And of the third.
        size: (h, w) of the image in pixels.

    Returns:
        (3, h, w) uint8, red, green and blue.

    Raises:
        TypeError, ValueError: an argument is not as described.
        MemoryError: there is none for an image in float64.
        ImportError: the compiled module is missing.
    """
    _check_size(size)
    if not field:
        raise ValueError("field: wanted at least one octave, got none")
    _check_octaves("field", field, 3, size)
    return _operators().paint_clouds(*_flat(field), gain, lightness, yellow, red, *size)


def _check_size(size: tuple[int, int]) -> None:
    if not all(isinstance(side, int) and side > 0 for side in size) or len(size) != 2:
        raise ValueError(f"size: wanted (h, w), each at least 1, got {size!r}")


def _check_octaves(name: str, octaves: Sequence[Octave], channels: int, size: tuple[int, int]) -> None:
    for index, (lattice, *shifts) in enumerate(octaves):
        if not all(0 <= shift < 1 << index for shift in shifts):
            raise ValueError(f"{name}[{index}]: wanted shifts in 0 ... {(1 << index) - 1}, got {shifts}")
        points = ((side - 1 + shift >> index) + 2 for side, shift in zip(size, shifts, strict=True))
        check_tensor(f"{name}[{index}].lattice", lattice, (channels, *points), torch.float64, _CPU)


def _flat(octaves: Sequence[Octave]) -> tuple[list[Tensor], list[int]]:
    """Lattices, and shifts down and across by turns."""
    return [octave.lattice for octave in octaves], [shift for octave in octaves for shift in octave[1:]]


def _operators() -> Any:
    import activemark_fast.ops.paint.registration  # noqa: F401  # as that of the other ops

    return torch.ops.activemark_fast
