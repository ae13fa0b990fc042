"""How good a mark is: what it costs the model, and how clearly it can be read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.codec import Codec
from activemark_fast.marking.suffix import (
    Autocast,
    SiteActivations,
    feature_cosine,
    final_features,
    read_mark,
)
from activemark_fast.ops.decode import Decoded
from activemark_fast.site import Site
from activemark_fast.verdict import default_tau

DETECTION_TARGET = 0.99
MARGIN_TARGET = 2.0


@dataclass(frozen=True)
class Quality:
    """How a marked model does on images that were kept from marking.

    Attributes:
        fidelity: mean cosine between its clean features and the original's, the lower of class token and
            mean patch.
        margin: signal over noise of the reading, at the weaker tap: the mean of the logits, each taken with
            the sign of its bit, over sqrt(their variance + the variance of the original's).
        bit_error: mean wrong bits of an image.
        detection_rate: share of images with at most tau wrong bits.
        original_detection_rate: the same, read from the original.
    """

    fidelity: float
    margin: float
    bit_error: float
    detection_rate: float
    original_detection_rate: float

    def reaches(self, fidelity: float) -> bool:
        """Whether the mark can be released: read from it, not from the original, at this cost."""
        return (
            self.fidelity >= fidelity
            and self.margin >= MARGIN_TARGET
            and self.detection_rate >= DETECTION_TARGET
            and self.original_detection_rate == 0
        )


class QualityCheck:
    """Measures a model that is being marked, on images that are kept from marking."""

    def __init__(
        self,
        backbone: Backbone,
        codec: Codec,
        site: Site,
        held: SiteActivations,
        message: Tensor,
        autocast: Autocast,
    ) -> None:
        """backbone: still unmarked. held: n images at the site. message: (n, M), a message for each.

        Raises ValueError if the model's features are not finite.
        """
        self._backbone = backbone
        self._codec = codec
        self._block = site.block
        self._held = held
        self._message = message
        self._autocast = autocast
        self._features = final_features(backbone, held, site.block, autocast)
        if not bool(torch.isfinite(self._features).all()):
            raise ValueError("model: wanted finite features, got NaN or infinity (its activations overflow)")
        self._original = self._read(backbone)

    def fidelity(self) -> float:
        """The fidelity now."""
        features = final_features(self._backbone, self._held, self._block, self._autocast)
        return feature_cosine(features, self._features)

    def _read(self, backbone: Backbone) -> dict[int, Decoded]:
        return read_mark(backbone, self._codec, self._held, self._message, self._block, self._autocast)

    def _detection(self, decoded: dict[int, Decoded]) -> tuple[float, float]:
        """Mean bit errors and detection rate at the last tap."""
        errors = decoded[self._codec.taps[-1]].errors
        return float(errors.double().mean()), float((errors <= default_tau(self._codec.bits)).double().mean())

    def __call__(self, reference: Backbone | None = None, fidelity: float | None = None) -> Quality:
        """The quality now.

        Args:
            reference: the original, wanted where the codec has changed since.
            fidelity: what `fidelity` has just returned.
        """
        if reference is not None:
            self._original = self._read(reference)
        decoded = self._read(self._backbone)
        signs = 2 * self._message.float() - 1
        margins = []
        for tap, read in decoded.items():
            signal, noise = read.logits * signs, self._original[tap].logits
            margins.append(float(signal.mean() / torch.sqrt(signal.var() + noise.var())))
        bit_error, rate = self._detection(decoded)
        return Quality(
            fidelity=self.fidelity() if fidelity is None else fidelity,
            margin=min(margins),
            bit_error=bit_error,
            detection_rate=rate,
            original_detection_rate=self._detection(self._original)[1],
        )
