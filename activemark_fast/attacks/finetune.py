"""Fine-tuning for classification."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from activemark_fast.backbone import Backbone


def finetune(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    lr: float = 1e-4,
    epochs: int = 3,
    batch_size: int = 64,
    on_step: Callable[[], None] | None = None,
) -> nn.Module:
    """A copy of `model` after fine-tuning of all its layers.

    A fresh linear head on the class token and the mean patch is trained with the backbone: AdamW, weight
    decay 0.05, cosine decay to 0, random horizontal flips, cross-entropy. The head is dropped at the end.

    Args:
        model: a plain ViT.
        images: (n, 3, H, W), model input.
        labels: (n,) int64, from 0.
        seed: seeds order, flips and head.
        lr: peak learning rate of backbone and head.
        epochs: passes over the images.
        batch_size: images a step.
        on_step: called after every step.

    Raises:
        ValueError: `images` and `labels` differ in length, or hold less than one batch.
    """
    if len(images) != len(labels) or len(images) < batch_size:
        raise ValueError(
            f"images, labels: wanted as many of each, at least {batch_size}, got {len(images)}, {len(labels)}"
        )
    tuned = copy.deepcopy(model)
    backbone = Backbone(tuned)
    generator = torch.Generator().manual_seed(seed)
    sample = backbone.features(backbone.run(backbone.stem(images[:1].to(backbone.device)), 0, backbone.depth))
    head = nn.Linear(sample[0].numel(), int(labels.max()) + 1).to(backbone.device)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
        head.bias.zero_()
    tuned.requires_grad_(True).train()
    parameters = [*tuned.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(images) // batch_size * batch_size].split(batch_size):
            batch = images[chosen]
            if torch.rand((), generator=generator) < 0.5:
                batch = batch.flip(-1)
            tokens = backbone.run(backbone.stem(batch.to(backbone.device)), 0, backbone.depth)
            scores = head(backbone.features(tokens).flatten(1))
            loss = nn.functional.cross_entropy(scores, labels[chosen].to(backbone.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step()
    for ours, theirs in zip(tuned.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
        ours.grad = None
    return tuned.train(model.training)
