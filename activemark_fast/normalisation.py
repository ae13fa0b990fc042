"""How images become a model's input: size, mean and standard deviation, and the published ones of these."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

NORMALISATIONS: tuple[tuple[tuple[float, float, float], tuple[float, float, float]], ...] = (
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
    ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # CLIP
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # CIFAR-10
    ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # the same, as many write it
)
"""Means and standard deviations of red, green and blue that published models take."""
CLOSE = 1e-3
"""Two normalisations that differ by less are the same, and the published numbers are used: who could choose
the last digits could try as many as they like."""


@dataclass(frozen=True)
class Preprocess:
    """How source images become model input.

    Raises TypeError or ValueError for a field that is not as described.
    """

    size: tuple[int, int]  # height, width of the model's input in pixels
    mean: tuple[float, float, float]  # of red, green, blue, on the scale 0 to 1
    std: tuple[float, float, float]  # likewise, above 0

    def __post_init__(self) -> None:
        check_size("size", self.size)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, tuple) or not all(isinstance(v, (int, float)) for v in values):
                raise TypeError(f"{name}: wanted a tuple of 3 numbers, got {values!r}")
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name}: wanted 3 finite numbers, got {values!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std: wanted numbers above 0, got {self.std!r}")

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) uint8 → (B, 3, H, W) float32.

        Scaled so that the image just covers H by W (for a square: the shorter side is fitted; bicubic
        with antialiasing, values kept within 0 … 255), cropped at the centre, divided by 255, less mean,
        over std. An image that has the right size already is not resampled.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            raise TypeError(f"images: wanted a uint8 tensor, got {kind_of(images)}")
        if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ValueError(f"images: wanted shape (B, 3, h, w), got {tuple(images.shape)}")
        height, width = self.size
        h, w = images.shape[2:]
        pixels = images.float()
        if (h, w) != (height, width):
            wide = w * height >= h * width
            covering = (height, w * height // h) if wide else (h * width // w, width)
            pixels = interpolate(pixels, covering, mode="bicubic", antialias=True).clamp(0, 255)
            top, left = round((covering[0] - height) / 2), round((covering[1] - width) / 2)
            pixels = pixels[:, :, top : top + height, left : left + width]
        mean = torch.tensor(self.mean, dtype=torch.float32, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=images.device).view(3, 1, 1)
        return (pixels / 255 - mean) / std


def known_normalisation(preprocess: Preprocess) -> Preprocess | None:
    """`preprocess` with the numbers of the published normalisation that it is, or None if it is none."""
    given = (*preprocess.mean, *preprocess.std)
    for mean, std in NORMALISATIONS:
        known = (*mean, *std)
        if all(math.isclose(a, b, rel_tol=0, abs_tol=CLOSE) for a, b in zip(given, known, strict=True)):
            return Preprocess(preprocess.size, mean, std)
    return None


def check_size(name: str, size: tuple[int, int]) -> None:
    """Raises TypeError or ValueError, naming `name`, unless `size` is a height and a width."""
    if not isinstance(size, tuple) or not all(isinstance(v, int) and not isinstance(v, bool) for v in size):
        raise TypeError(f"{name}: wanted a tuple of 2 ints, got {size!r}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name}: wanted (height, width), both at least 1, got {size!r}")


def kind_of(value: object) -> str:
    """What a value is, for the message of an error."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
