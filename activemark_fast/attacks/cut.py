"""Late blocks re-initialised or cut off; the head removed."""

from __future__ import annotations

import copy

import torch
from torch import nn

from activemark_fast.attacks.matrices import reset_parameters
from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled

HEADS = ("head", "heads", "fc", "classifier", "head_dist")


def reinitialise(model: nn.Module, data: Labelled | None, seed: int, strength: float) -> nn.Module:
    """A copy of `model` whose last blocks are as a new model's (Zhang et al. 2021).

    Args:
        model: a plain ViT.
        data: not used.
        seed: of the new weights.
        strength: how many blocks, 1 to all.

    Raises:
        ValueError: `strength` is not 1 to the number of blocks.
    """
    reset = copy.deepcopy(model)
    backbone = Backbone(reset)
    if not 1 <= strength <= backbone.depth:
        raise ValueError(f"strength: wanted 1 to {backbone.depth} blocks, got {strength}")
    generator = torch.Generator().manual_seed(seed)
    for block in backbone.blocks[-int(strength) :]:
        reset_parameters(block, generator)
    return reset


def cut(model: nn.Module, data: Labelled | None, seed: int, strength: float) -> nn.Module:
    """A copy of `model` without its last blocks.

    Args:
        model: a plain ViT.
        data: not used.
        seed: not used.
        strength: how many blocks go; at least 3 stay.

    Raises:
        ValueError: `strength` is below 1, or fewer than 3 blocks would stay.
    """
    shorter = copy.deepcopy(model)
    backbone = Backbone(shorter)
    if not 1 <= strength <= backbone.depth - 3:
        raise ValueError(f"strength: wanted 1 to {backbone.depth - 3} blocks, got {strength}")
    gone = backbone.blocks[-int(strength) :]
    for module in list(backbone.encoder.modules()):
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for index in reversed(range(len(module))):
                if any(module[index] is block for block in gone):
                    del module[index]
    return shorter


def remove_head(model: nn.Module, data: Labelled | None, seed: int, strength: float) -> nn.Module:
    """A copy of `model` that gives out features: its classifier is an identity. Only `model` is used."""
    bare = copy.deepcopy(model)
    for name, _ in list(bare.named_children()):
        if name in HEADS:
            setattr(bare, name, nn.Identity())
    return bare
