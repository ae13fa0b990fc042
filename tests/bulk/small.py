"""A small marked model, and checkpoints of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import vit
from torch import Tensor, nn

from activemark_fast.embedding import embed
from activemark_fast.key import Key
from activemark_fast.watermark import Watermark

KEY = Key(b"k" * 32)


@dataclass(frozen=True)
class Marked:
    """A small marked model and what verifies it."""

    model: Any
    watermark: Watermark
    images: Tensor

    def arguments(self) -> tuple[Watermark, Key, nn.Module, Tensor]:
        """What `verify_many` takes after the suspects."""
        return self.watermark, KEY, vit(seed=77), self.images


def mark(count: int = 64) -> Marked:
    """count: trigger images."""
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        made = embed(vit(), KEY, images, fidelity=0.95)
    return Marked(made.model, made.watermark, images)


def save(model: nn.Module, path: Path, prefix: str = "", dtype: torch.dtype | None = None) -> Path:
    """Writes a model's weights as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {n: t.detach().to(dtype or t.dtype).contiguous() for n, t in model.state_dict().items()}
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, path)
    return path
