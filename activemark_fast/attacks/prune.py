"""Unstructured magnitude pruning."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils import prune as torch_prune

from activemark_fast.backbone import Backbone


def prune(model: nn.Module, fraction: float) -> nn.Module:
    """A copy of `model` without the smallest weights of its blocks (Han et al. 2015).

    Args:
        model: a plain ViT.
        fraction: share of all the weights in the blocks' matrices that is set to 0: those of smallest
            magnitude, over all matrices together.

    Raises:
        ValueError: `fraction` is not within 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: wanted 0 to 1, got {fraction}")
    pruned = copy.deepcopy(model)
    matrices = [
        (module, name)
        for block in Backbone(pruned).blocks
        for module in block.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 2
    ]
    # As an int the amount would be a number of weights.
    torch_prune.global_unstructured(
        matrices, pruning_method=torch_prune.L1Unstructured, amount=float(fraction)
    )
    for module, name in matrices:
        torch_prune.remove(module, name)
    return pruned
