"""Whether `compare` means what it says: independent pairs, descendants, and models made to deceive it.

    python benchmarks/descent.py --data cifar10.npz --work FOLDER --out docs/descent.md

MODELS small ViTs (timm's and torchvision's constructors) are trained a little on CIFAR-10, each from a seed of
its own, in another order of the data; all pairs among them are independent pairs. What was trained or measured
lies in `--work` and is not made again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from activemark_fast.datasets import Labelled, load_task
from activemark_fast.triggers import Preprocess

MODELS = 33
"""528 pairs. Every fourth model is torchvision's."""
SIZES = {"width": 64, "depth": 6, "heads": 4, "patch": 8}
PREPROCESS = Preprocess((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def fresh_model(seed: int, library: str) -> Any:
    """A small ViT as its library initialises it; torchvision's own class leaves its head at zero."""
    torch.manual_seed(seed)
    if library == "timm":
        return VisionTransformer(
            img_size=32,
            patch_size=SIZES["patch"],
            embed_dim=SIZES["width"],
            depth=SIZES["depth"],
            num_heads=SIZES["heads"],
            num_classes=10,
        )
    return TorchvisionViT(
        image_size=32,
        patch_size=SIZES["patch"],
        num_layers=SIZES["depth"],
        num_heads=SIZES["heads"],
        hidden_dim=SIZES["width"],
        mlp_dim=4 * SIZES["width"],
        num_classes=10,
    )


def trained(seed: int, data: Labelled, order: int | None = None, library: str | None = None) -> nn.Module:
    """The model of a seed, trained a little; `order` seeds the order of the data and nothing else.

    Steps, learning rate and optimiser differ from seed to seed, as between people.
    """
    library = library or ("torchvision" if seed % 4 == 3 else "timm")
    model = fresh_model(seed, library)
    steps = (60, 120, 240)[seed % 3]
    if seed % 5 == 4:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, nesterov=True
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=(1e-3, 5e-4)[seed % 2], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(10_000 + (seed if order is None else order))
    for _ in range(steps):
        chosen = torch.randint(len(data), (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(data.images[chosen]), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Pool:
    """The trained models, made once and kept in a folder."""

    def __init__(self, folder: Path, data: Labelled) -> None:
        self.folder = folder
        self.data = data

    def model(self, seed: int, order: int | None = None) -> nn.Module:
        path = self.folder / f"model-{seed}-{'own' if order is None else order}.pt"
        if not path.exists():
            torch.save(trained(seed, self.data, order).state_dict(), path)
        model = fresh_model(seed, "torchvision" if seed % 4 == 3 else "timm")
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
