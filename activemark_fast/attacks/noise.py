"""Noise on the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from activemark_fast.attacks.matrices import block_matrices
from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled


@torch.no_grad()
def noise(model: nn.Module, data: Labelled | None, seed: int, strength: float) -> nn.Module:
    """A copy of `model` with Gaussian noise on the matrices of its blocks.

    Args:
        model: a plain ViT.
        data: not used.
        seed: of the noise.
        strength: standard deviation of the noise, over that of each matrix's weights; 0 or more.

    Raises:
        ValueError: `strength` is negative.
    """
    if not strength >= 0:
        raise ValueError(f"strength: wanted 0 or more, got {strength}")
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for module, name in block_matrices(Backbone(noisy)):
        weight: Tensor = getattr(module, name)
        drawn = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
        weight.add_(strength * weight.std() * drawn)
    return noisy
