"""Activation profile: how large the largest activations are after every block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.ops.magnitude import magnitudes

TOP = 5
"""How many of the largest magnitudes of an image are looked at (paper, section 3.2)."""
SHARP_RISE = 3.0
"""A block whose mean top magnitude is this many times its predecessor's makes activations massive."""
MASSIVE_RATIO = 50.0
"""A magnitude this many times the median of its block is massive."""


@dataclass(frozen=True, eq=False)
class Profile:
    """Magnitudes of the residual stream after every block.

    Attributes:
        top: (depth, 5) float64, mean over images of the five largest |values|, descending.
        median: (depth,) float64, mean over images of the median |value|.
        massive: for every block the (token, channel) pairs that are massive in at least half of the images.
    """

    top: np.ndarray
    median: np.ndarray
    massive: tuple[tuple[tuple[int, int], ...], ...]

    def first_sharp_rise(self) -> int | None:
        """The first block where massive activations emerge; None if there is no such block.

        It is the first block after which the mean of the top magnitudes is at least three times what it was
        before the block, with massive values among them.
        """
        mean_top = self.top.mean(axis=1)
        for block in range(1, len(mean_top)):
            risen = mean_top[block] >= SHARP_RISE * mean_top[block - 1]
            if risen and self.top[block, 0] >= MASSIVE_RATIO * self.median[block]:
                return block
        return None


@torch.no_grad()
def profile(backbone: Backbone, pixels: Tensor) -> Profile:
    """Runs `pixels` (n, 3, H, W) through `backbone`, block by block, keeping one block's activations."""
    tokens = backbone.stem(pixels)
    top, median, massive = [], [], []
    for block in range(backbone.depth):
        tokens = backbone.run(tokens, block, block + 1)
        found = magnitudes(tokens, TOP)
        top.append(found.values.mean(dim=0).double().cpu().numpy())
        median.append(float(found.median.mean()))
        huge = found.index[found.values >= MASSIVE_RATIO * found.median[:, None]].cpu().numpy()
        place, count = np.unique(huge, return_counts=True)
        recurring = place[2 * count >= len(pixels)]
        massive.append(tuple((int(i) // backbone.width, int(i) % backbone.width) for i in recurring))
    return Profile(np.array(top), np.array(median), tuple(massive))
