"""The small ViT that tests mark."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer


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
