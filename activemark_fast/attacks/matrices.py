"""What several attacks share: the matrices of the blocks, fresh weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from activemark_fast.backbone import Backbone

INITIAL_STD = 0.02
"""Standard deviation that ViTs' matrices start with (timm, Touvron et al. 2021)."""


def block_matrices(backbone: Backbone) -> list[tuple[nn.Module, str]]:
    """The owner and the name of every two-dimensional parameter of the blocks, in order."""
    return [
        (module, name)
        for block in backbone.blocks
        for module in block.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 2
    ]


def fresh(shape: tuple[int, ...], generator: torch.Generator, std: float = INITIAL_STD) -> Tensor:
    """Normal random numbers, float32 on the CPU, cut off at two standard deviations."""
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator)


@torch.no_grad()
def reset_parameters(module: nn.Module, generator: torch.Generator) -> None:
    """Gives all parameters of `module` the values a new ViT starts with, in place.

    Truncated normal for what has two or more dimensions, and for tokens; biases 0, scales of norms 1. What
    has one dimension and no such name (a LayerScale) stays.
    """
    for name, parameter in module.named_parameters():
        last = name.rpartition(".")[2]
        if parameter.ndim >= 2:
            parameter.copy_(fresh(tuple(parameter.shape), generator))
        elif "bias" in last:
            parameter.zero_()
        elif last == "weight":
            parameter.fill_(1)
