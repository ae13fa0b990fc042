"""One band of a suspect's reading: what its images show so far, and whether more could show anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from activemark_fast.decision import agreement
from activemark_fast.marking.reading import Channel, row_scores, wrong_bits
from activemark_fast.p_value import sign_flip_p_value
from activemark_fast.sequential import (
    LEAST_IMAGES,
    SHOWS,
    WEAKEST_MARK,
    WEAKEST_NATURAL,
    mark_excluded,
    out_of_reach,
)


class BandReading:
    """What one band shows on more and more images, until it has nothing left to show.

    Attributes:
        channels: its codebooks.
        read: of each, what was read of all images so far (taps, n, reads, M).
        cleared: the same, cleared of crosstalk.
        p_value: of all images so far, nothing paid; None before there is any.
        excluded: whether they exclude a mark as strong as `sequential` has it.
        done: whether it is read no further.
    """

    def __init__(self, channels: Sequence[Channel], loud: bool) -> None:
        self.channels = channels
        self.read: list[Tensor] = []
        self.cleared: list[Tensor] = []
        self.p_value: float | None = None
        self.excluded = self.done = False
        self._loud = loud

    def add(self, agreements: Sequence[Tensor]) -> None:
        """Takes what was read of more images: of each codebook (taps, k, reads, M)."""
        before = self.read or [part[:, :0] for part in agreements]
        self.read = [torch.cat(parts, dim=1) for parts in zip(before, agreements, strict=True)]
        pairs = zip(self.channels, self.read, strict=True)
        self.cleared = [channel.cleared(part) for channel, part in pairs]

    @property
    def draws(self) -> np.ndarray:
        """`Reading.agreement`; of a band whose images are read badly one by one, of its single readings."""
        if not self._loud:
            return np.asarray(_right(self.read).mean(axis=2))
        return agreement(wrong_bits(self.read[0]).cpu().numpy(), self.read[0].shape[-1])

    @property
    def errors(self) -> np.ndarray:
        """`Reading.errors`, of the first codebook."""
        return wrong_bits(self.cleared[0]).cpu().numpy()

    def test(self) -> float:
        """The p-value of all images so far."""
        self.p_value = sign_flip_p_value(row_scores(self.cleared))
        return self.p_value

    def exclude(self, miss: float) -> None:
        """Finds out whether the images exclude a mark; miss: as `mark_excluded` takes it."""
        weakest = WEAKEST_MARK if self._loud else WEAKEST_NATURAL
        self.excluded = mark_excluded(self.draws, miss, weakest)

    def hopeless(self, images: int, wanted: float, passive: Callable[[], float] | None) -> bool:
        """Whether there is no use in reading on.

        Args:
            images: how many there are.
            wanted: the p-value of all of them that is a match.
            passive: reads the p-value of the passive band; None for a codec without.
        """
        if not self.excluded:
            return False
        right = _right(self.cleared)
        if not out_of_reach(right.reshape(len(right), -1), images, wanted):
            return False
        return len(right) >= LEAST_IMAGES or (passive is not None and passive() > SHOWS)


def _right(agreements: Sequence[Tensor]) -> np.ndarray:
    """Of a band's (taps, n, reads, M): (n, taps, rows), mean over reads of +1 for right and -1 for wrong."""
    right = torch.stack([torch.sign(part).double().mean(dim=2) for part in agreements])
    return np.asarray(right.permute(2, 1, 0, 3).flatten(2).cpu())
