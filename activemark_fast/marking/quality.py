"""How good a mark is: what it costs the model, and how clearly it can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.marking.ranks import ALONE, Ranks
from activemark_fast.marking.reading import Channel, wrong_bits
from activemark_fast.marking.suffix import Autocast, SiteActivations
from activemark_fast.verdict import default_tau

DETECTION_TARGET = 0.99
MARGIN_TARGET = 0.75
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
        self._output = output
        self._block = block
        self._autocast = autocast
        self._ranks = ranks
        self._original = self._features()
        if not all(bool(torch.isfinite(part).all()) for part in self._original):
            raise ValueError("model: wanted finite features, got NaN or infinity (its activations overflow)")

    def _features(self) -> list[Tensor]:
        """Of each batch (b, N, D), tokens after the final norm."""
        device = self._backbone.device

        def run(output: Tensor) -> list[Tensor]:
            with torch.no_grad(), self._autocast():
                tokens = self._backbone.run(output.to(device), self._block + 1, self._backbone.depth)
                return [self._backbone.final_tokens(tokens).float()]

        tasks = [partial(run, output) for output in self._output.split(COMPARED_AT_ONCE)]
        return [part for (part,) in self._ranks.each(tasks, device)]

    def __call__(self) -> Fidelity:
        """The fidelity now."""
        prefix = self._backbone.prefix_tokens
        cosines: list[list[Tensor]] = [[], [], []]
        for now, before in zip(self._features(), self._original, strict=True):
            pairs = [
                (now[:, 0], before[:, 0]) if self._backbone.has_class_token else None,
                (now[:, prefix:].mean(dim=1), before[:, prefix:].mean(dim=1)),
                (now[:, prefix:], before[:, prefix:]),
            ]
            for kept, pair in zip(cosines, pairs, strict=True):
                if pair is not None:
                    kept.append(torch.cosine_similarity(*pair, dim=-1).flatten())
        return Fidelity(*(_mean_and_tail(parts) for parts in cosines))


def _mean_and_tail(parts: list[Tensor]) -> tuple[float, float]:
    if not parts:
        return math.nan, math.nan
    cosines = torch.cat(parts).double()
    rank = max(1, math.ceil(TAIL * len(cosines)))
    return float(cosines.mean()), float(cosines.kthvalue(rank).values)


@dataclass(frozen=True)
class Quality:
    """How a marked model does on images that were kept from marking.

    Attributes:
        fidelity: `Fidelity.mean`, the lowest mean cosine between its clean features and the original's.
        fidelity_tail: `Fidelity.tail`, the lowest 5th percentile.
        features: all of them.
        margin: signal over noise of the message's reading, at the weaker tap: the mean of the logits, each
            taken with the sign of its bit, over sqrt(their variance + the variance of the original's).
        natural_margin: the same of single readings in the natural band; NaN for a codec without.
        bit_error: mean wrong bits of an image.
        detection_rate: share of images with at most tau wrong bits.
        original_detection_rate: the same, read from the original.
    """

    fidelity: float
    fidelity_tail: float
    features: Fidelity
    margin: float
    natural_margin: float
    bit_error: float
    detection_rate: float
    original_detection_rate: float

    def keeps(self, fidelity: float) -> bool:
        """Whether the model is as close to the original as asked for."""
        return self.features.loss <= 1 - fidelity

    def reaches(self, fidelity: float) -> bool:
        """Whether the mark can be released: read from it, not from the original, at this cost."""
        return (
            self.keeps(fidelity)
            and self.margin >= MARGIN_TARGET
            and self.detection_rate >= DETECTION_TARGET
            and self.original_detection_rate == 0
        )


class QualityCheck:
    """Measures a model that is being marked, on images that are kept from marking."""

    def __init__(
        self,
        backbone: Backbone,
        channels: Sequence[Channel],
        carriers: SiteActivations,
        fidelity: FidelityCheck,
        block: int,
        autocast: Autocast,
        ranks: Ranks = ALONE,
    ) -> None:
        """backbone: still unmarked. channels: the first is the message's; they send to each of `carriers`.

        ranks: the processes that read them together.
        """
        self._backbone = backbone
        self._channels = channels
        self._carriers = carriers
        self._fidelity = fidelity
        self._block = block
        self._autocast = autocast
        self._ranks = ranks
        self._original = self._read(backbone)

    def _read(self, backbone: Backbone) -> list[Tensor]:
        return [
            channel.agreement(backbone, self._carriers, 0, self._block, self._autocast, self._ranks)
            for channel in self._channels
        ]

    def _detection(self, agreement: Tensor) -> tuple[float, float]:
        """Mean bit errors and detection rate at the last tap."""
        errors = wrong_bits(agreement)[-1]
        tau = default_tau(agreement.shape[-1])
        return float(errors.double().mean()), float((errors <= tau).double().mean())

    def margin(self) -> float:
        """`Quality.margin` now."""
        first = self._channels[0]
        now = first.agreement(self._backbone, self._carriers, 0, self._block, self._autocast, self._ranks)
        return self._margin(now)

    def _margin(self, message: Tensor) -> float:
        # All readings of an image together are one.
        return _margin(*(part.mean(dim=2, keepdim=True) for part in (message, self._original[0])))

    def __call__(self, reference: Backbone | None = None) -> Quality:
        """The quality now.

        reference: the original, wanted where the codec has changed since.
        """
        if reference is not None:
            self._original = self._read(reference)
        now = self._read(self._backbone)
        bit_error, rate = self._detection(now[0])
        natural = [_margin(a, b) for a, b in zip(now[1:], self._original[1:], strict=True)]
        fidelity = self._fidelity()
        return Quality(
            fidelity=fidelity.mean,
            fidelity_tail=fidelity.tail,
            features=fidelity,
            margin=self._margin(now[0]),
            natural_margin=min(natural, default=math.nan),
            bit_error=bit_error,
            detection_rate=rate,
            original_detection_rate=self._detection(self._original[0])[1],
        )


def _margin(signal: Tensor, noise: Tensor) -> float:
    """Of two (taps, n, reads, M) agreements, the marked model's and the original's: at the weaker tap."""
    spread = torch.sqrt(signal.var(dim=(1, 2, 3)) + noise.var(dim=(1, 2, 3)))
    return float((signal.mean(dim=(1, 2, 3)) / spread).min())
