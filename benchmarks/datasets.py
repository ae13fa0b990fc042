"""Labelled images from a CIFAR-10 archive: JPEG bytes in one array, with offsets and labels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def cifar10(path: Path, split: str, count: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    """The first `count` images of the first `classes` classes: (n, 3, 32, 32) uint8 and (n,) int64 labels."""
    archive = np.load(path)
    labels, offsets = archive[f"{split}_label"], archive[f"{split}_offset"]
    data = archive[f"{split}_jpeg"]
    chosen = np.flatnonzero(labels < classes)[:count]
    images = [
        np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB"))
        for i in chosen
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels[chosen].astype(np.int64))
