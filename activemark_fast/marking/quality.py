"""How good a mark is: what it costs the model, and how clearly it can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.marking.cosine import Fidelity, FidelityCheck
from activemark_fast.marking.reading import Channel, wrong_bits
from activemark_fast.marking.suffix import Autocast, SiteActivations
from activemark_fast.ranks import ALONE, Ranks
from activemark_fast.verdict import default_tau

DETECTION_TARGET = 0.99
MARGIN_TARGET = 0.75
NOISE_IMAGES = 8
"""The original, and the natural band, are read on the first of these alone: noise is alike on all."""
GLANCED_IMAGES = 4
"""As many tell whether a loud band is read more clearly than it has to be."""


@dataclass(frozen=True)
class Quality:
    """How a marked model does on images that were kept from marking.

    Attributes:
        fidelity: `Fidelity.mean`, the lowest mean cosine between its clean features and the original's.
        fidelity_tail: `Fidelity.tail`, the lowest 5th percentile.
        features: all of them.
        margin: signal over noise of the message's reading, at the weaker tap: the mean of the logits, each
            taken with the sign of its bit, over sqrt(their variance + the variance of the original's).
        natural_margin: about the same of single readings in the natural band; NaN for a codec without.
        bit_error: mean wrong bits of an image.
        detection_rate: share of images with at most tau wrong bits.
        original_detection_rate: the same, read from the original; of a keyed mark on `NOISE_IMAGES`.
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

    def missed(self, fidelity: float) -> list[str]:
        """What targets were not reached, by how much, and what would help."""
        missed = []
        if not self.keeps(fidelity):
            missed.append(
                f"fidelity {self.fidelity:.4f}, 5th percentile {self.fidelity_tail:.4f} (wanted "
                f"{fidelity}); more clean images would help"
            )
        if not self.margin >= MARGIN_TARGET or not self.detection_rate >= DETECTION_TARGET:
            missed.append(
                f"margin {self.margin:.2f} (wanted {MARGIN_TARGET:g}), detection rate "
                f"{self.detection_rate:.3f} ({DETECTION_TARGET:g}): the mark is as strong as the fidelity "
                "allows; a lower fidelity or fewer bits would help"
            )
        if self.original_detection_rate > 0:
            missed.append(
                f"the original reads as marked, too, on {self.original_detection_rate:.3f} of the images"
            )
        return missed


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
        self._original = self._read(backbone, channels, NOISE_IMAGES)

    def _read(
        self, backbone: Backbone, channels: Sequence[Channel], images: int | None = None
    ) -> list[Tensor]:
        """Agreements of each channel, on the first so many images or all."""
        carriers = self._carriers[:images]
        return [
            channel.cleared(
                channel.agreement(backbone, carriers, 0, self._block, self._autocast, self._ranks)
            )
            for channel in channels
        ]

    def _detection(self, agreement: Tensor) -> tuple[float, float]:
        """Mean bit errors and detection rate at the last tap."""
        errors = wrong_bits(agreement)[-1]
        tau = default_tau(agreement.shape[-1])
        return float(errors.double().mean()), float((errors <= tau).double().mean())

    def margin(self) -> float:
        """About `Quality.margin` now."""
        (now,) = self._read(self._backbone, self._channels[:1], GLANCED_IMAGES)
        return self._margin(now)

    def _margin(self, message: Tensor) -> float:
        # All readings of an image together are one.
        return _margin(*(part.mean(dim=2, keepdim=True) for part in (message, self._original[0])))

    def __call__(self, reference: Backbone | None = None, fidelity: Fidelity | None = None) -> Quality:
        """The quality now.

        Args:
            reference: the original, wanted where the codec has changed since; it is read on all images.
            fidelity: the model's now, where it is known.
        """
        if reference is not None:
            self._original = self._read(reference, self._channels)
        now = self._read(self._backbone, self._channels[:1])
        now += self._read(self._backbone, self._channels[1:], NOISE_IMAGES)
        bit_error, rate = self._detection(now[0])
        natural = [_margin(a, b) for a, b in zip(now[1:], self._original[1:], strict=True)]
        fidelity = self._fidelity() if fidelity is None else fidelity
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
