"""Images with the statistics of natural ones, painted from a key's stream."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from activemark_fast.key import KeyStream
from activemark_fast.normalisation import check_size
from activemark_fast.ops.native import load_native

MIN_SYNTHETIC_SIDE = 8  # pixels: below it no leaf fits
IMAGES_IN_WORK = 32
"""Synthetic images that are painted side by side."""

_Image = npt.NDArray[np.uint8]  # (3, h, w), contiguous
_Lattice = tuple[int, int, npt.NDArray[np.float64]]


def synthetic_images(stream: KeyStream, count: int, size: tuple[int, int]) -> Tensor:
    """Images with the statistics of natural ones, (count, 3, h, w) uint8.

    size: (h, w), at least 8 pixels each.

    By turns dead leaves (opaque discs which hide one another: edges and flat surfaces at every scale),
    clouds (power between 1/f² and 1/f⁴), dead leaves with a texture, clouds. The first n of a larger
    count are the same images. They are the same to the bit on every machine: only integers, comparison
    and float64 +, -, *, /, sqrt are used, in a fixed order.
    """
    check_size("size", size)
    if min(size) < MIN_SYNTHETIC_SIDE:
        raise ValueError(f"size: wanted at least {MIN_SYNTHETIC_SIDE} pixels a side, got {size}")
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count: wanted int, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"count: wanted at least 1, got {count}")
    images = np.empty((count, 3, *size), dtype=np.uint8)

    # One after another the images take their numbers from the stream; they are painted side by side.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, count, IMAGES_IN_WORK):
            part = images[start : start + IMAGES_IN_WORK]
            painters = [
                _clouds(stream, size) if index % 2 else _dead_leaves(stream, size, index % 4 == 2)
                for index in range(start, start + len(part))
            ]
            for _ in pool.map(lambda paint, image: paint(image), painters, part):
                pass
    return torch.from_numpy(images)


def _dead_leaves(stream: KeyStream, size: tuple[int, int], textured: bool) -> Callable[[_Image], None]:
    """Paints (3, h, w): one-coloured discs of radius density ∝ r^-3, lit aslant."""
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
    yellow, red = 30 * (warmth - 0.5) + 36 * (draws[5] - 0.5), 40 * (draws[6] - 0.5)
    slope_x, slope_y = 40 * (draws[7] - 0.5) / r, 40 * (draws[8] - 0.5) / r
    # Disc by disc, as csrc/paint.hpp wants them.
    discs = np.array([x, y, r, lightness, yellow, red, slope_x, slope_y, 90 * draws[9]]).T.copy()
    lattices = _lattices(stream, 1, size, coarsest=16) if textured else []

    def paint(image: _Image) -> None:
        load_native().paint_leaves(
            height=h,
            width=w,
            discs=discs.ctypes.data,
            disc_count=n,
            octaves=_octaves(lattices),
            image=image.ctypes.data,
        )

    return paint


def _clouds(stream: KeyStream, size: tuple[int, int]) -> Callable[[_Image], None]:
    """Paints (3, h, w): a random field in lightness, fainter ones in colour.

    From one octave to the next coarser the field's amplitude grows by a gain. The area of the frequency plane
    grows as f², so a gain of 1, equal power an octave, makes a power spectrum of 1/f², and a gain of 2 one of
    1/f⁴: natural images lie between.
    """
    h, w = size
    centre, contrast, warmth, smoothness = stream.uniform(4).tolist()
    lattices = _lattices(stream, 3, size, coarsest=max(size))

    def paint(image: _Image) -> None:
        load_native().paint_clouds(
            height=h,
            width=w,
            octaves=_octaves(lattices),
            gain=1 + smoothness,
            lightness=(85 + 85 * centre, 60 + 60 * contrast),
            yellow=(30 * (warmth - 0.5), 15),
            red=(0, 15),
            image=image.ctypes.data,
        )

    return paint


def _lattices(stream: KeyStream, channels: int, size: tuple[int, int], coarsest: int) -> list[_Lattice]:
    """For each octave of a random field, from the finest: its shift down and across, and its values.

    Their steps are 1, 2, 4, … pixels, up to the first power of two not below `coarsest`.
    """
    h, w = size
    lattices = []
    for octave in range((coarsest - 1).bit_length() + 1):
        step = 1 << octave
        shift_y, shift_x = stream.integers(0, step, 2).tolist()
        shape = (channels, (h - 1 + shift_y) // step + 2, (w - 1 + shift_x) // step + 2)
        values = stream.uniform(shape)
        values -= 0.5
        lattices.append((shift_y, shift_x, values))
    return lattices


def _octaves(lattices: list[_Lattice]) -> list[tuple[int, int, int]]:
    return [(values.ctypes.data, shift_y, shift_x) for shift_y, shift_x, values in lattices]
