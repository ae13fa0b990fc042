"""Images with the statistics of natural ones, painted from a key's stream."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from activemark_fast.key import KeyStream
from activemark_fast.normalisation import check_size
from activemark_fast.ops.paint import Octave, paint_clouds, paint_leaves

MIN_SYNTHETIC_SIDE = 8  # pixels: below it no leaf fits
IMAGES_IN_WORK = 32
"""Synthetic images that are painted side by side."""


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
    images = torch.empty(count, 3, *size, dtype=torch.uint8)

    # One after another the images take their numbers from the stream; they are painted side by side.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, count, IMAGES_IN_WORK):
            part = images[start : start + IMAGES_IN_WORK]
            painters = [
                _clouds(stream, size) if index % 2 else _dead_leaves(stream, size, index % 4 == 2)
                for index in range(start, start + len(part))
            ]
            for image, painted in zip(part, pool.map(lambda paint: paint(), painters), strict=True):
                image.copy_(painted)
    return images


def _dead_leaves(stream: KeyStream, size: tuple[int, int], textured: bool) -> Callable[[], Tensor]:
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
    values = np.array([x, y, r, lightness, yellow, red, slope_x, slope_y, 90 * draws[9]])
    discs = torch.from_numpy(values.T.copy())
    texture = random_octaves(stream, 1, size, coarsest=16) if textured else []
    return lambda: paint_leaves(discs, texture, size)


def _clouds(stream: KeyStream, size: tuple[int, int]) -> Callable[[], Tensor]:
    """Paints (3, h, w): a random field in lightness, fainter ones in colour.

    From one octave to the next coarser the field's amplitude grows by a gain. The area of the frequency plane
    grows as f², so a gain of 1, equal power an octave, makes a power spectrum of 1/f², and a gain of 2 one of
    1/f⁴: natural images lie between.
    """
    centre, contrast, warmth, smoothness = stream.uniform(4).tolist()
    field = random_octaves(stream, 3, size, coarsest=max(size))
    axes = ((85 + 85 * centre, 60 + 60 * contrast), (30 * (warmth - 0.5), 15), (0, 15))
    return lambda: paint_clouds(field, 1 + smoothness, *axes, size)


def random_octaves(stream: KeyStream, channels: int, size: tuple[int, int], coarsest: int) -> list[Octave]:
    """A random field. The points of its last octave are at least `coarsest` pixels apart."""
    h, w = size
    octaves = []
    for octave in range((coarsest - 1).bit_length() + 1):
        step = 1 << octave
        shift_y, shift_x = stream.integers(0, step, 2).tolist()
        shape = (channels, (h - 1 + shift_y) // step + 2, (w - 1 + shift_x) // step + 2)
        values = stream.uniform(shape)
        values -= 0.5
        octaves.append(Octave(torch.from_numpy(values), shift_y, shift_x))
    return octaves
