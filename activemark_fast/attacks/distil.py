"""Distillation of the features into a fresh model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from activemark_fast.attacks.matrices import reset_parameters
from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled


def distil(
    model: nn.Module,
    data: Labelled,
    seed: int,
    strength: float,
    *,
    lr: float = 1e-3,
    batch_size: int = 64,
) -> nn.Module:
    """A new model of the same architecture that has learned to give the features of `model`.

    Loss: 1 - cosine of class token and mean patch (the feature distillation of Wei et al. 2022). No weight of
    `model` is taken over, so neither is a mark in its weights.

    Args:
        model: a plain ViT.
        data: images; the labels are not used.
        seed: of the new weights and of the order.
        strength: passes over the images.
        lr: peak learning rate.
        batch_size: images a step.

    Raises:
        ValueError: `data` holds less than one batch.
    """
    if len(data) < batch_size:
        raise ValueError(f"data: wanted at least {batch_size} images, got {len(data)}")
    teacher = Backbone(copy.deepcopy(model).eval())
    student_model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    reset_parameters(student_model, generator)
    student = Backbone(student_model)
    optimizer = torch.optim.AdamW(student_model.parameters(), lr=lr, weight_decay=0.05)
    epochs = int(strength)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(data) // batch_size))
    flags = [p.requires_grad for p in student_model.parameters()]
    student_model.requires_grad_(True).train()
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        for chosen in order[: len(data) // batch_size * batch_size].split(batch_size):
            images = data.images[chosen].to(teacher.device)
            with torch.no_grad():
                wanted = teacher.features(teacher.run(teacher.stem(images), 0, teacher.depth))
            found = student.features(student.run(student.stem(images), 0, student.depth))
            loss = 1 - cosine_similarity(found, wanted, dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for parameter, flag in zip(student_model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
        parameter.grad = None
    return student_model.train(model.training)
