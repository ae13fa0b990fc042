"""How like two models' features are: cosines, of which an embedding's fidelity is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.marking.suffix import Autocast
from activemark_fast.ranks import ALONE, Ranks

COMPARED_AT_ONCE = 32
"""Images whose features are compared at a time, by one process."""
TAIL = 0.05
"""The quantile of the cosines that is looked at beside their mean, …"""
TAIL_WEIGHT = 0.3
"""… and what its distance from 1 counts: at a fidelity of 0.997 it may be 0.99."""


@dataclass(frozen=True)
class Fidelity:
    """Cosines between the features of a changed model and the original's, over natural images.

    Attributes:
        class_token, mean_patch, patches: mean and 5th percentile over the images, or over all their single
            patches, after the final norm; NaN for the class token of a model without one.
    """

    class_token: tuple[float, float]
    mean_patch: tuple[float, float]
    patches: tuple[float, float]

    @property
    def mean(self) -> float:
        """The lowest of the means."""
        return min(mean for mean, _ in self._given)

    @property
    def tail(self) -> float:
        """The lowest of the 5th percentiles."""
        return min(tail for _, tail in self._given)

    @property
    def loss(self) -> float:
        """1 - what a fidelity asked for is compared with: the worst mean, or tail by `TAIL_WEIGHT`."""
        return max(1 - self.mean, TAIL_WEIGHT * (1 - self.tail))

    @property
    def _given(self) -> list[tuple[float, float]]:
        features = (self.class_token, self.mean_patch, self.patches)
        return [feature for feature in features if feature is self.patches or not math.isnan(feature[0])]


class FidelityCheck:
    """Compares a model with what it was when the check was made."""

    def __init__(
        self, backbone: Backbone, output: Tensor, block: int, autocast: Autocast, ranks: Ranks = ALONE
    ) -> None:
        """output: (n, N, D), the output of `block` for natural images that are kept from marking.

        ranks: the processes that compare it together.

        Raises ValueError if the model's features are not finite.
        """
        self._backbone = backbone
        self._outputs = output.split(COMPARED_AT_ONCE)
        self._block = block
        self._autocast = autocast
        self._ranks = ranks
        self._original: dict[int, Tensor] = {}  # by batch: features of those that this process compares

        def keep(index: int) -> list[Tensor]:
            self._original[index] = self._tokens(index)
            return [torch.isfinite(self._original[index]).all()]

        if not all(bool(finite) for (finite,) in self._each(keep)):
            raise ValueError("model: wanted finite features, got NaN or infinity (its activations overflow)")

    def _each(self, task: Callable[[int], list[Tensor]]) -> Iterator[Sequence[Tensor]]:
        """What `task` returns of each batch."""
        tasks = [partial(task, index) for index in range(len(self._outputs))]
        return self._ranks.each(tasks, self._backbone.device)

    def _tokens(self, index: int, every: int = 1) -> Tensor:
        """(b, N, D) float32, the tokens of a batch's images, or some of them, after the final norm."""
        output = self._outputs[index][::every].to(self._backbone.device)
        with torch.no_grad(), self._autocast(self._backbone.dtype):
            tokens = self._backbone.run(output, self._block + 1, self._backbone.depth)
            return self._backbone.final_tokens(tokens).float()

    def __call__(self, glance: bool = False) -> Fidelity:
        """The fidelity now.

        glance: about that, from every second image.
        """
        prefix, classes = self._backbone.prefix_tokens, slice(int(self._backbone.has_class_token))
        every = 2 if glance else 1

        def compared(index: int) -> list[Tensor]:
            now, before = self._tokens(index, every), self._original[index][::every]
            pairs = [
                (now[:, classes], before[:, classes]),
                (now[:, prefix:].mean(dim=1), before[:, prefix:].mean(dim=1)),
                (now[:, prefix:], before[:, prefix:]),
            ]
            return [torch.cosine_similarity(*pair, dim=-1).flatten() for pair in pairs]

        kinds = zip(*self._each(compared), strict=True)
        return Fidelity(*(_mean_and_tail(torch.cat(parts).double()) for parts in kinds))


def _mean_and_tail(cosines: Tensor) -> tuple[float, float]:
    if not len(cosines):
        return math.nan, math.nan
    rank = max(1, math.ceil(TAIL * len(cosines)))
    return float(cosines.mean()), float(cosines.kthvalue(rank).values)


def feature_cosine(features: Tensor, original: Tensor) -> float:
    """Mean cosine of two (n, F, D) feature sets: the lower of class token and mean patch."""
    return float(torch.cosine_similarity(features, original, dim=-1).mean(dim=0).min())
