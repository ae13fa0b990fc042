"""The synthetic images in NumPy: what csrc/paint.cpp must paint, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from activemark_fast.key import KeyStream
from activemark_fast.ops.paint import Octave
from activemark_fast.synthetic import random_octaves

SMALL_DISCS = (1, 2, 4, 8, 16)
"""Sides, in pixels, of the squares around discs that are painted many at a time."""

Array = npt.NDArray[np.float64]


def synthetic_images(stream: KeyStream, count: int, size: tuple[int, int]) -> Iterator[npt.NDArray[np.uint8]]:
    """Each (3, h, w)."""
    for index in range(count):
        image = _clouds(stream, size) if index % 2 else _dead_leaves(stream, size, index % 4 == 2)
        yield np.clip(image, 0, 255).astype(np.uint8)  # the cast cuts off the fraction


def _dead_leaves(stream: KeyStream, size: tuple[int, int], textured: bool) -> Array:
    """(3, h, w) on the scale 0 to 255: one-coloured discs of radius density ∝ r^-3, lit aslant."""
    h, w = size
    smallest, largest = max(1.5, min(size) / 100), min(size) / 3
    # A disc's mean area is 2π ln(largest / smallest) smallest², so discs cover the image about 3 to 6 times.
    n = int(h * w / (4 * smallest * smallest))
    draws = stream.uniform((10, n))
    r = 1 / np.sqrt(
        1 / (smallest * smallest) - draws[0] * (1 / (smallest * smallest) - 1 / (largest * largest))
    )
    x = draws[1] * (w + 2 * r) - r
    y = draws[2] * (h + 2 * r) - r
    # The background is the leaf below all others: it is as large as the image.
    r[0], x[0], y[0] = max(size), w / 2, h / 2
    centre, spread, warmth = stream.uniform(3).tolist()
    lightness = 85 + 85 * centre + (70 + 60 * spread) * (draws[3] + draws[4] - 1)
    colour = _rgb(lightness, 30 * (warmth - 0.5) + 36 * (draws[5] - 0.5), 40 * (draws[6] - 0.5))
    slope_x, slope_y = 40 * (draws[7] - 0.5) / r, 40 * (draws[8] - 0.5) / r
    octaves = random_octaves(stream, 1, size, coarsest=16) if textured else []

    leaf = seen_discs(x, y, r, size)
    light = (np.arange(w) - x[leaf]) * slope_x[leaf] + (np.arange(h)[:, None] - y[leaf]) * slope_y[leaf]
    if textured:
        light += _pink(octaves, size, gain=1.0)[0] * (90 * draws[9])[leaf]
    return colour[:, leaf] + light


def seen_discs(x: Array, y: Array, r: Array, size: tuple[int, int]) -> npt.NDArray[np.intp]:
    """(h, w): which disc is seen at each pixel; a later disc hides an earlier one, disc 0 lies everywhere."""
    h, w = size
    seen = np.zeros(size, dtype=np.intp)
    columns, rows = np.arange(w, dtype=np.float64), np.arange(h, dtype=np.float64)[:, None]
    left, right = np.clip(np.ceil(x - r), 0, w).astype(int), np.clip(np.floor(x + r) + 1, 0, w).astype(int)
    top, bottom = np.clip(np.ceil(y - r), 0, h).astype(int), np.clip(np.floor(y + r) + 1, 0, h).astype(int)
    sides = np.maximum(right - left, bottom - top)
    sides[0] = 0
    # Most discs are small: those of about one size are painted together.
    for side in SMALL_DISCS:
        discs = np.flatnonzero((sides > side // 2) & (sides <= side))
        i, j = top[discs, None] + np.arange(side), left[discs, None] + np.arange(side)
        dx, dy = j - x[discs, None], i - y[discs, None]
        inside = (dx * dx)[:, None] + (dy * dy)[:, :, None] <= (r * r)[discs, None, None]
        inside &= (i < h)[:, :, None] & (j < w)[:, None]
        disc, row, column = np.nonzero(inside)
        np.maximum.at(seen.reshape(-1), i[disc, row] * w + j[disc, column], discs[disc])
    for index in np.flatnonzero(sides > SMALL_DISCS[-1]).tolist():
        part = slice(top[index], bottom[index]), slice(left[index], right[index])
        dx, dy = columns[part[1]] - x[index], rows[part[0]] - y[index]
        inside = dx * dx + dy * dy <= r[index] * r[index]
        np.maximum(seen[part], index, out=seen[part], where=inside)
    return seen


def _clouds(stream: KeyStream, size: tuple[int, int]) -> Array:
    """(3, h, w) on the scale 0 to 255: a random field in lightness, fainter ones in colour."""
    centre, contrast, warmth, smoothness = stream.uniform(4).tolist()
    octaves = random_octaves(stream, 3, size, coarsest=max(size))

    lightness, yellow, red = _pink(octaves, size, gain=1 + smoothness)
    lightness = 85 + 85 * centre + (60 + 60 * contrast) * lightness
    return _rgb(lightness, 30 * (warmth - 0.5) + 15 * yellow, 15 * red)


def _pink(octaves: list[Octave], size: tuple[int, int], gain: float) -> Array:
    """(channels, h, w), each scaled to -1 … 1: octaves of bilinearly interpolated random lattices.

    From one octave to the next coarser the amplitude grows by `gain`. The area of the frequency plane grows
    as f², so a gain of 1, equal power an octave, makes a power spectrum of 1/f², and a gain of 2 one of
    1/f⁴: natural images lie between.
    """
    h, w = size
    field = np.zeros((len(octaves[0].lattice), h, w))
    right = np.empty_like(field)
    amplitude = 1.0
    for index, octave in enumerate(octaves):
        step, lattice = 1 << index, octave.lattice.numpy()
        rows, columns = np.arange(h) + octave.shift_y, np.arange(w) + octave.shift_x
        i, j = rows // step, columns // step
        down, across = (rows % step / step)[:, None], columns % step / step
        lattice = lattice[:, i] * (1 - down) + lattice[:, i + 1] * down
        left = lattice[:, :, j]
        left *= 1 - across
        np.take(lattice, j + 1, axis=2, out=right, mode="clip")
        right *= across
        left += right
        left *= amplitude
        field += left
        amplitude *= gain
    low, high = field.min(axis=(1, 2), keepdims=True), field.max(axis=(1, 2), keepdims=True)
    return 2 * (field - low) / (high - low) - 1


def _rgb(lightness: Array, yellow: Array, red: Array) -> Array:
    """(3, …): red, green, blue from the three axes along which the colours of natural scenes vary."""
    return np.stack([lightness + yellow + red, lightness + yellow - red, lightness - 2 * yellow])
