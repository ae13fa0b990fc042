"""Pruning: unstructured by magnitude, whole heads, whole MLP units, and fine-pruning."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from activemark_fast.attacks.finetune import finetune
from activemark_fast.attacks.matrices import block_matrices
from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled
from activemark_fast.utility import features

SCOPES = ("global", "layer", "heads", "units")
ACTIVITY_IMAGES = 256


def prune(
    model: nn.Module, data: Labelled | None, seed: int, strength: float, *, scope: str = "global"
) -> nn.Module:
    """A copy of `model` without the smallest weights of its blocks (Han et al. 2015).

    Args:
        model: a plain ViT.
        data: not used.
        seed: not used.
        strength: share of what `scope` names that is set to 0, 0 to 1.
        scope: "global" (weights of smallest magnitude, over all matrices together), "layer" (the same within
            every matrix), "heads" (whole attention heads, within every block) or "units" (whole hidden units
            of every MLP): those whose columns in the matrix that writes them to the residual stream have the
            smallest norm (Li et al. 2017).

    Raises:
        ValueError: `strength` is not within 0 and 1, `scope` is none of these, or "heads" is asked of a model
            whose blocks do not say how many they have.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: wanted 0 to 1, got {strength}")
    if scope not in SCOPES:
        raise ValueError(f"scope: wanted one of {', '.join(SCOPES)}, got {scope!r}")
    pruned = copy.deepcopy(model)
    backbone = Backbone(pruned)
    share = float(strength)  # as an int it would be a number of weights
    if scope in ("heads", "units"):
        for index, block in enumerate(backbone.blocks):
            linear, heads = attention_out(block) if scope == "heads" else (backbone.mlp_out(index), None)
            norms = linear.weight.detach().float().norm(dim=0)
            _silence(linear, norms.square().reshape(heads, -1).sum(dim=1) if heads else norms, share)
        return pruned
    matrices = block_matrices(backbone)
    if scope == "global":
        torch_prune.global_unstructured(matrices, pruning_method=torch_prune.L1Unstructured, amount=share)
    for module, name in matrices:
        if scope == "layer":
            torch_prune.l1_unstructured(module, name, amount=share)
        torch_prune.remove(module, name)
    return pruned


def fine_prune(
    model: nn.Module, data: Labelled, seed: int, strength: float, *, lr: float = 1e-4, epochs: int = 1
) -> nn.Module:
    """A copy of `model` without the MLP units that clean images use least, then fine-tuned (Liu et al. 2018).

    Args:
        model: a plain ViT.
        data: clean images, which are also fine-tuned on.
        seed: of the fine-tuning.
        strength: share of the hidden units of every MLP that is removed.
        lr: peak learning rate of the fine-tuning.
        epochs: of the fine-tuning.

    Raises:
        ValueError: `strength` is not within 0 and 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: wanted 0 to 1, got {strength}")
    pruned = copy.deepcopy(model)
    backbone = Backbone(pruned)
    linears = [backbone.mlp_out(index) for index in range(backbone.depth)]
    activity = [torch.zeros(linear.in_features, device=linear.weight.device) for linear in linears]

    def count(index: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            activity[index] += args[0].detach().float().abs().flatten(0, -2).sum(dim=0)

        return linears[index].register_forward_pre_hook(hook)

    handles = [count(index) for index in range(backbone.depth)]
    features(pruned, data.images[:ACTIVITY_IMAGES])
    for handle in handles:
        handle.remove()
    for linear, active in zip(linears, activity, strict=True):
        _silence(linear, active, float(strength))
    return finetune(pruned, data, seed, lr, epochs=epochs)


@torch.no_grad()
def _silence(linear: nn.Linear, scores: Tensor, share: float) -> None:
    """Sets to 0 the groups of columns with the lowest of the `scores` (groups,), in place."""
    lowest = scores.argsort()[: round(share * len(scores))]
    linear.weight.unflatten(1, (len(scores), -1))[:, lowest] = 0


def attention_out(block: nn.Module) -> tuple[nn.Linear, int]:
    """The linear layer by which a block's attention writes to the residual stream, and its heads."""
    heads = [
        count
        for module in block.modules()
        for name in ("num_heads", "num_attention_heads")
        if isinstance(count := getattr(module, name, None), int)
    ]
    written = [
        module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and "att" in name
        and name.rpartition(".")[2] in ("proj", "out_proj", "o_proj", "dense")
    ]
    if not heads or len(written) != 1 or written[0].in_features % heads[0]:
        raise ValueError(f"model: wanted attention heads in {type(block).__name__}, found none by name")
    return written[0], heads[0]
