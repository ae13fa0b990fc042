"""The small ViT that tests mark, and profiles made up for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from activemark_fast.profiling import Profile, StreamProfile


def vit(seed: int = 0, **kwargs: Any) -> Any:
    """A timm ViT of 32 x 32 images with 6 blocks of width 128; `kwargs` change its arguments."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "num_classes": 3,
    }
    model: Any = VisionTransformer(**(sizes | kwargs))
    # timm starts all layers much smaller than trained ones are: tokens would hardly react to an injection.
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.normal_(std=0.15)
            block.mlp.fc2.weight.normal_(std=0.05)
    return model.eval()


def profile_of(
    values: Sequence[float] | np.ndarray,
    medians: Sequence[float] | float = 1.0,
    places: Sequence[tuple[int, int]] = ((0, 7), (0, 9), (4, 7), (9, 1), (9, 2)),
    images: int = 2,
) -> Profile:
    """The profile of a model of 17 tokens, the first a class token, and width 32.

    Args:
        values: of every stream, the stem's first, its largest magnitude, which it has at all `places`; or
            (depth + 1, images, k), all magnitudes of every image.
        medians: of every stream, or of all.
        places: (token, channel) of the largest values.
        images: how many there are, where `values` does not say.
    """
    top = np.asarray(values, dtype=float)
    if top.ndim == 1:
        top = np.tile(top[:, None, None], (1, images, len(places)))
    depth, images, k = top.shape
    tokens, channels = np.tile(np.array(places[:k]).T[:, None], (1, images, 1))
    middle = np.broadcast_to(np.asarray(medians, dtype=float), depth)
    streams = [
        StreamProfile(top[i], tokens, channels, np.full(images, middle[i]), np.zeros(images, dtype=int))
        for i in range(depth)
    ]
    return Profile(streams[0], tuple(streams[1:]), 17, 1, 32, True)
