"""Another resolution, with resized position embeddings."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled


def resize(model: nn.Module, data: Labelled | None, seed: int, strength: float) -> nn.Module:
    """A copy of `model` for images `strength` times as large (bicubic embeddings, Dosovitskiy et al. 2021).

    Args:
        model: a ViT of timm, which knows how to resize itself (`set_input_size`).
        data: not used.
        seed: not used.
        strength: factor of height and width; the new size must be whole patches.

    Raises:
        ValueError: the model does not know how, or the size is not whole patches.
    """
    resized: Any = copy.deepcopy(model)
    set_input_size = getattr(resized, "set_input_size", None)
    if set_input_size is None:
        raise ValueError(f"model: wanted one of timm's, which has set_input_size, got {type(model).__name__}")
    height, width = (round(side * strength) for side in Backbone(model).image_size)
    patch = resized.patch_embed.patch_size
    if height % patch[0] or width % patch[1] or min(height, width) < max(patch):
        raise ValueError(f"strength: wanted a size of whole patches of {patch}, got {(height, width)}")
    set_input_size(img_size=(height, width))
    return resized
