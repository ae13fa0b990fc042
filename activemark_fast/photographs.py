"""Photographs that the package ships: clean images of an owner who gives none."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_ARCHIVE = Path(__file__).parent / "assets" / "photographs.npz"


@dataclass(frozen=True, eq=False)
class Photographs:
    """Squares cut from photographs, at several scales.

    Any stretch of them, and every k-th one, is a fair sample of the photographs and scales. Crops of one
    photograph are alike: images that must be new to a model come from other sources.

    Attributes:
        images: (n, 3, 224, 224) uint8 RGB, on the CPU.
        sources: (n,) int64, the photograph each is cut from: its number in `assets/PHOTOGRAPHS.md`.
    """

    images: Tensor
    sources: Tensor


@cache
def shipped_photographs() -> Photographs:
    """Reads and decodes all of them, once: 60 MB, which nobody may write to.

    Authors and licences are in `assets/PHOTOGRAPHS.md`.

    Raises:
        FileNotFoundError: the package was installed without them.
    """
    if not _ARCHIVE.is_file():
        raise FileNotFoundError(f"{_ARCHIVE}: the package's photographs are missing; install it again")
    with np.load(_ARCHIVE, allow_pickle=False) as archive:
        files, offsets, sources = archive["webp"].tobytes(), archive["offset"], archive["source"]
    images = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(files[begin:end])).convert("RGB"))
            for begin, end in pairwise(offsets)
        ]
    )
    return Photographs(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(sources))
