"""The suspect's mean Jacobian from the site to the taps: a mark's answer without running the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from activemark_fast.forge.thief import Thief
from activemark_fast.site import Site

COLUMNS = 64
"""Directions that are run at a time."""
MAX_IMAGES = 16
"""Images that each direction is run on, at most."""
STEP = 0.3
"""Length of what is written, over the median length of a token less its mean."""


@torch.no_grad()
def mean_jacobian(
    thief: Thief, site: Site, slots: Tensor, output: Tensor, deadline: float
) -> tuple[dict[int, Tensor], int]:
    """What a vector that is written to all slots after the site becomes, in their mean, at each tap.

    One pair of forward passes a direction, each on another image; then on further ones while there is time.

    Args:
        thief: has the suspect.
        site: where to write, and the taps.
        slots: (S,) int64, tokens that are written to and read.
        output: (n, N, D), what some images make of the stream at the site; the first 16 are used.
        deadline: until when to average; all directions are run at least once.

    Returns:
        For each tap J (D, D) float64 on the CPU, a row d at the site becoming d @ J; and how many pairs.
    """
    width, output = site.width, output[:MAX_IMAGES]
    length = STEP * float((output - output.mean(dim=-1, keepdim=True))[:, slots].norm(dim=-1).median())
    sums = {tap: torch.zeros(width, width, dtype=torch.float64) for tap in site.taps}
    pairs = 0
    while not pairs or (pairs < width * len(output) and thief.now() < deadline):
        for start in range(0, width, COLUMNS):
            channels = torch.arange(start, min(start + COLUMNS, width))
            chosen = (channels + pairs // width) % len(output)
            written = torch.zeros(len(channels), 1, width, dtype=output.dtype, device=output.device)
            written[torch.arange(len(channels)), 0, channels] = length
            streams = []
            for sign in (1, -1):
                stream = output[chosen].clone()
                stream[:, slots] += sign * written
                streams.append(stream)
            stream, first = torch.cat(streams), site.block + 1
            for tap in site.taps:
                with thief.autocast(thief.backbone.dtype):
                    stream = thief.backbone.run(stream, first, tap + 1)
                up, down = stream[:, slots].float().mean(dim=1).chunk(2)
                sums[tap][channels] += ((up - down) / (2 * length)).double().cpu()
                first = tap + 1
            pairs += len(channels)
    return {tap: total * width / pairs for tap, total in sums.items()}, pairs


def expected_scores(written: Tensor, read: Tensor, jacobian: Tensor) -> Tensor:
    """Expected score of each bit, of -1 to 1, by the mean Jacobian alone.

    A bit is read as what it makes itself, over what the other bits, of random signs, make of it.

    Args:
        written: (M, D) float64, rows that are written.
        read: (M, D) float64, rows that are read at a tap.
        jacobian: (D, D) float64, of that tap.
    """
    crossed = written @ jacobian @ read.T
    own = crossed.diagonal()
    others = (crossed.square().sum(dim=0) - own.square()).clamp_min(1e-30).sqrt()
    return torch.erf(own / (others * math.sqrt(2)))


def lead(scores: Tensor) -> Tensor:
    """Sum of the scores in standard deviations of random signs, 0-dimensional: what a p-value falls with."""
    return scores.sum() / scores.norm().clamp_min(1e-30)
