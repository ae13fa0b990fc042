"""Fine-tuning, for classification or dense segmentation: head only, last blocks, all layers, LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils import parametrize

from activemark_fast.attacks.matrices import block_matrices, fresh
from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled
from activemark_fast.utility import features, linear_probe, patch_grid

LAYERS = ("head", "last", "all", "lora")
LAST_SHARE = 4
"""`layers="last"` trains the last block in four."""
LORA_RANK = 8
LORA_SCALE = 2.0


def finetune(
    model: nn.Module,
    data: Labelled,
    seed: int,
    strength: float = 1e-4,
    *,
    layers: str = "all",
    layer_decay: float = 1.0,
    probe_first: bool = False,
    epochs: int = 3,
    weight_decay: float = 0.05,
    batch_size: int = 64,
    on_step: Callable[[], None] | None = None,
) -> nn.Module:
    """A copy of `model` after fine-tuning.

    A fresh linear head is trained with the layers chosen, and dropped at the end: on the class token and the
    mean patch, or for dense labels on every patch token, scaled up to the mask. AdamW, cosine decay to 0,
    random horizontal flips, cross-entropy.

    Args:
        model: a plain ViT.
        data: labelled images; dense labels make it segmentation.
        seed: seeds order, flips and head.
        strength: peak learning rate.
        layers: "head" (the backbone stays as it is), "last" (the last quarter of the blocks and the final
            norm), "all", or "lora" (updates of rank 8 to every matrix of the blocks, scaled by 2 and merged
            at the end; Hu et al. 2022).
        layer_decay: learning rate of a block over that of the block after it, above 0 and at most 1
            (Howard and Ruder 2018); the head and the final norm have the full rate, the stem the lowest.
        probe_first: start from a head that is a linear probe on the model as it is, so that the first steps
            of a random head do not spoil the features (Kumar et al. 2022); one label an image.
        epochs: passes over the images.
        weight_decay: of AdamW.
        batch_size: images a step.
        on_step: called after every step.

    Raises:
        ValueError: `layers` is none of these, `layer_decay` is out of bounds, `data` holds less than one
            batch, or dense labels where a probe comes first.
    """
    if layers not in LAYERS:
        raise ValueError(f"layers: wanted one of {', '.join(LAYERS)}, got {layers!r}")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay: wanted above 0 and at most 1, got {layer_decay}")
    if probe_first and data.dense:
        raise ValueError("probe_first: wanted one label an image, got masks")
    if len(data) < batch_size:
        raise ValueError(f"data: wanted at least {batch_size} images, got {len(data)}")
    tuned = copy.deepcopy(model)
    flags = {name: p.requires_grad for name, p in tuned.named_parameters()}
    backbone = Backbone(tuned)
    device = backbone.device
    generator = torch.Generator().manual_seed(seed)
    head = _Head(backbone, data, generator).to(device)
    if probe_first:
        probe = linear_probe(features(tuned, data.images).flatten(1), data.labels)
        head.linear.load_state_dict(probe.state_dict())
    tuned.requires_grad_(layers == "all").train()
    adapted = block_matrices(backbone) if layers == "lora" else []
    if layers == "last":
        for module in (*backbone.blocks[-max(1, backbone.depth // LAST_SHARE) :], backbone.norm):
            module.requires_grad_(True)
    for module, name in adapted:
        low_rank = _LowRank(getattr(module, name), generator)
        parametrize.register_parametrization(module, name, low_rank)
    groups = _groups(backbone, head, strength, layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=strength, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(data) // batch_size))
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        for chosen in order[: len(data) // batch_size * batch_size].split(batch_size):
            images, labels = data.images[chosen], data.labels[chosen]
            if torch.rand((), generator=generator) < 0.5:
                images, labels = images.flip(-1), labels.flip(-1) if data.dense else labels
            tokens = backbone.run(backbone.stem(images.to(device)), 0, backbone.depth)
            loss = nn.functional.cross_entropy(head(tokens), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step()
    for module, name in adapted:
        parametrize.remove_parametrizations(module, name)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(flags[name])
        parameter.grad = None
    return tuned.train(model.training)


def _groups(backbone: Backbone, head: nn.Module, lr: float, decay: float) -> list[dict[str, Any]]:
    """What is trained, in groups of one learning rate: `lr` times `decay` to the number of blocks above."""
    above = {p: backbone.depth - i for i, block in enumerate(backbone.blocks) for p in block.parameters()}
    above |= {p: 0 for module in (backbone.norm, head) for p in module.parameters()}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in (*backbone.model.parameters(), *head.parameters()):
        if parameter.requires_grad:
            rate = lr * decay ** above.get(parameter, backbone.depth + 1)
            groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


class _Head(nn.Module):
    """A linear head on the features of a backbone: (B, N, D) → (B, C), or (B, C, H, W) for dense labels."""

    def __init__(self, backbone: Backbone, data: Labelled, generator: torch.Generator) -> None:
        super().__init__()
        self._backbone = [backbone]  # in a list, so that it is no part of this module
        self._mask = data.labels.shape[1:] if data.dense else None
        self._grid = patch_grid(backbone) if data.dense else None
        width = backbone.width * (1 if data.dense else 1 + backbone.has_class_token)
        self.linear = nn.Linear(width, data.classes)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(self.linear.weight.shape, generator=generator) * 0.02)
            self.linear.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        (backbone,) = self._backbone
        if self._grid is None:
            return self.linear(backbone.features(tokens).flatten(1))
        patches = self.linear(backbone.final_tokens(tokens)[:, backbone.prefix_tokens :])
        scores = patches.transpose(1, 2).unflatten(2, self._grid)
        return interpolate(scores, self._mask, mode="bilinear")


class _LowRank(nn.Module):
    """W → W + scale B A, with A (r, in) random and B (out, r) zero at first."""

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        out, into = weight.shape
        start = fresh((LORA_RANK, into), generator, into**-0.5)
        self.a = nn.Parameter(start.to(weight.device, weight.dtype))
        self.b = nn.Parameter(weight.new_zeros(out, LORA_RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + LORA_SCALE * (self.b @ self.a)
