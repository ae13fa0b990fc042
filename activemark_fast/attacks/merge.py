"""Merging: averages with another model of the same family, task arithmetic."""

from __future__ import annotations

import copy

import torch
from torch import nn

from activemark_fast.attacks.finetune import finetune
from activemark_fast.datasets import Labelled


@torch.no_grad()
def average(
    model: nn.Module, data: Labelled | None, seed: int, strength: float, *, other: nn.Module
) -> nn.Module:
    """A copy of `model`, averaged with `other` (a model soup, Wortsman et al. 2022).

    With the unmarked original it thins the mark; with a sibling that carries another mark it is collusion.

    Args:
        model: a plain ViT.
        data: not used.
        seed: not used.
        strength: weight of `other`, 0 to 1.
        other: a model with the same parameters.

    Raises:
        ValueError: `strength` is not within 0 and 1, or the parameters differ in name or shape.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: wanted 0 to 1, got {strength}")
    _check_alike(model, other)
    merged = copy.deepcopy(model)
    for ours, theirs in zip(merged.parameters(), other.parameters(), strict=True):
        ours.lerp_(theirs.to(ours.device, ours.dtype), strength)
    return merged


def add_task(
    model: nn.Module,
    data: Labelled,
    seed: int,
    strength: float,
    *,
    other: nn.Module,
    lr: float = 1e-4,
    epochs: int = 1,
) -> nn.Module:
    """A copy of `model` plus a task vector: what fine-tuning changes in `other` (Ilharco et al. 2023).

    Args:
        model: a plain ViT.
        data: the task.
        seed: of the fine-tuning.
        strength: what the task vector is multiplied with; negative to forget the task.
        other: the model that is fine-tuned, with the same parameters: the unmarked original.
        lr: peak learning rate of the fine-tuning.
        epochs: of the fine-tuning.

    Raises:
        ValueError: the parameters differ in name or shape.
    """
    _check_alike(model, other)
    tuned = finetune(other, data, seed, lr, epochs=epochs)
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for ours, after, before in zip(
            merged.parameters(), tuned.parameters(), other.parameters(), strict=True
        ):
            ours.add_((after - before).to(ours.device, ours.dtype), alpha=strength)
    return merged


def _check_alike(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = ({name: p.shape for name, p in m.named_parameters()} for m in (model, other))
    if ours != theirs:
        raise ValueError("other: wanted a model with the same parameters, got another")
