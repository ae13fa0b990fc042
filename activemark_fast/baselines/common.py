"""What the baselines share: a classifier to fingerprint, what one cost, what it finds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import Self

from activemark_fast.backbone import Backbone
from activemark_fast.key import Key
from activemark_fast.triggers import MIN_IMAGES, trigger_images
from activemark_fast.utility import BATCH, features, linear_probe

THRESHOLD = 0.5
"""Detection rate above which a baseline takes a suspect for a copy."""


@dataclass(frozen=True)
class Cost:
    """What it took to make a mark or a set of fingerprints.

    Attributes:
        seconds: wall time of what was made.
        fraction: share of the whole that was made, in (0, 1].
    """

    seconds: float
    fraction: float

    @property
    def minutes(self) -> float:
        """Minutes for the whole: extrapolated where only a fraction was made."""
        return self.seconds / self.fraction / 60


@dataclass(frozen=True)
class Finding:
    """What a baseline says of a suspect.

    Attributes:
        detection_rate: share of images, points or trajectories that speak for a copy.
    """

    detection_rate: float

    @property
    def matched(self) -> bool:
        """Whether the suspect is taken for a copy: the rate is above one half."""
        return self.detection_rate > THRESHOLD


class Classifier(nn.Module):
    """A plain ViT with a linear head on class token and mean patch.

    Its input is (B, 3, H, W) in [0, 1], since fingerprints are images; it normalises them itself.

    Attributes:
        model: the ViT, not copied.
        head: the linear layer, F * width → classes.
    """

    def __init__(self, model: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.model = model.eval()
        self.head = head
        self._backbone = view = Backbone(model)
        self._mean, self._std = (
            torch.tensor(values, device=view.device).view(3, 1, 1) for values in (view.mean, view.std)
        )

    @classmethod
    def fit(cls, model: nn.Module, images: Tensor, labels: Tensor) -> Self:
        """`model` with a `linear_probe` of its frozen features.

        Args:
            model: a plain ViT.
            images: (n, 3, H, W) in [0, 1].
            labels: (n,) int64, from 0.

        Raises:
            ValueError: `images` and `labels` differ in length.
        """
        if len(images) != len(labels) or len(labels) == 0:
            raise ValueError(
                f"images, labels: wanted as many of each, at least one, got {len(images)}, {len(labels)}"
            )
        view = Backbone(model)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (view.mean, view.std))
        probe = linear_probe(features(model, (images.cpu() - mean) / std).flatten(1), labels.cpu())
        return cls(model, probe.to(view.device))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.head.out_features

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._backbone.device

    def features(self, images: Tensor) -> Tensor:
        """(B, F * width) float32 features of images in [0, 1]."""
        view = self._backbone
        pixels = ((images.to(view.device) - self._mean) / self._std).to(view.dtype)
        return view.features(view.run(view.stem(pixels), 0, view.depth)).float().flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, classes) float32 logits of images in [0, 1]."""
        return self.head(self.features(images))

    def base_images(self, images: object, key: Key, count: int) -> Tensor:
        """(n, 3, H, W) in [0, 1], on the device: up to `count` of `images`, in any form `embed` takes."""
        view = self._backbone
        pixels = trigger_images(images, key, view.preprocess, max(count, MIN_IMAGES)).pixels[:count]
        return (pixels.to(view.device) * self._std + self._mean).clamp(0, 1)


@torch.no_grad()
def predicted(classifier: nn.Module, images: Tensor) -> Tensor:
    """(n,) int64, the classes of (n, 3, H, W) images, on the CPU."""
    return torch.cat([classifier(part).argmax(dim=1).cpu() for part in images.split(BATCH)])


def share_of(count: int, fraction: float) -> int:
    """How many of `count` units a fraction of the work is: at least one.

    Raises:
        ValueError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: wanted above 0 and at most 1, got {fraction}")
    return max(1, math.ceil(count * fraction))
