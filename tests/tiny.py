"""The small ViT that tests mark, and profiles made up for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from activemark_fast.profiling import Profile, StreamProfile


def vit(seed: int = 0, **kwargs: Any) -> Any:
    """A timm ViT of 32 x 32 images with 6 blocks of width 128; `kwargs` change its arguments."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "num_classes": 3,
    }
    model: Any = VisionTransformer(**(sizes | kwargs))
    # timm starts all layers much smaller than trained ones are: tokens would hardly react to an injection.
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.normal_(std=0.15)
            block.mlp.fc2.weight.normal_(std=0.05)
    return model.eval()


def padded(state: dict[str, Tensor], width: int, how: str) -> dict[str, Tensor]:
    """A state dict of `vit` with a residual stream of more channels; the blocks compute what they did.

    how: the further channels are "zero", all "twice", or zero and then all of them "turned".
    """
    state = {name: tensor.double() for name, tensor in state.items()}
    old = len(state["norm.weight"])
    centre = torch.eye(old, dtype=torch.float64) - 1 / old
    if how == "twice":
        spread = torch.cat([torch.eye(old, dtype=torch.float64)] * 2) / 2**0.5
    elif how == "zero":  # a few of them in front
        spread = torch.cat([torch.zeros(3, old), torch.eye(old), torch.zeros(width - old - 3, old)]).double()
    else:
        gaussian = torch.randn(width, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gaussian[:, 0] = 1
        spread = torch.linalg.qr(gaussian).Q[:, 1 : old + 1]
    scale = (width / old) ** 0.5  # layer norms see the variance of more channels
    for name in [name for name in state if "norm1" in name or "norm2" in name]:
        readers = name.replace("norm1", "attn.qkv").replace("norm2", "mlp.fc1").rpartition(".")[0]
        weight, bias = f"{readers}.weight", f"{readers}.bias"
        if name.endswith(".weight"):
            norm = state[name], state[name.replace("weight", "bias")]
            state[bias] = state[bias] + state[weight] @ norm[1]
            state[weight] = (state[weight] * norm[0]) @ centre @ spread.T / scale
    for name, tensor in list(state.items()):
        if "norm" in name:
            state[name] = (torch.ones if name.endswith("weight") else torch.zeros)(width)
        elif name.endswith(("proj.weight", "proj.bias", "fc2.weight", "fc2.bias")):
            flat = tensor.flatten(1) if tensor.ndim > 1 else tensor
            state[name] = (scale * spread @ centre @ flat).reshape(width, *tensor.shape[1:])
        elif name in ("cls_token", "pos_embed"):
            state[name] = scale * tensor @ centre @ spread.T
        elif name == "head.weight":
            state[name] = tensor @ centre @ spread.T / scale
    return {name: tensor.float() for name, tensor in state.items()}


def longer_heads(state: dict[str, Tensor], heads: int, more: int) -> dict[str, Tensor]:
    """A state dict of `vit` whose heads have `more` channels, which add nothing."""
    out = dict(state)
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            apart = tensor.unflatten(0, (3, heads, -1))
            size = apart.shape[2]
            apart = torch.cat([apart[:, :, :5], 0 * apart[:, :, :more], apart[:, :, 5:]], 2)
            apart[0] *= ((size + more) / size) ** 0.5
            out[name] = apart.flatten(0, 2)
        elif name.endswith(".attn.proj.weight"):
            apart = tensor.unflatten(1, (heads, -1))
            out[name] = torch.cat([apart[..., :5], apart[..., :more], apart[..., 5:]], 2).flatten(1)
    return out


def more_heads(state: dict[str, Tensor], heads: int, twice: bool = False) -> dict[str, Tensor]:
    """A state dict of `vit` with a head more, which adds nothing; or the first twice, each adding half."""
    out = dict(state)
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            apart = tensor.unflatten(0, (3, heads, -1))
            out[name] = torch.cat([apart, apart[:, :1]], 1).flatten(0, 2)
        elif name.endswith(".attn.proj.weight"):
            apart = tensor.unflatten(1, (heads, -1)).clone()
            apart[:, 0] /= 1 + twice
            out[name] = torch.cat([apart, twice * apart[:, :1]], 1).flatten(1)
    return out


def units(state: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`change` of the units, which come first, of every tensor of the MLPs that has them."""
    out = dict(state)
    for name, tensor in state.items():
        if name.endswith((".fc1.weight", ".fc1.bias")):
            out[name] = change(tensor)
        elif name.endswith(".fc2.weight"):
            out[name] = change(tensor.T).T
    return out


def profile_of(
    values: Sequence[float] | np.ndarray,
    medians: Sequence[float] | float = 1.0,
    places: Sequence[tuple[int, int]] = ((0, 7), (0, 9), (4, 7), (9, 1), (9, 2)),
    images: int = 2,
) -> Profile:
    """The profile of a model of 17 tokens, the first a class token, and width 32.

    Args:
        values: of every stream, the stem's first, its largest magnitude, which it has at all `places`; or
            (depth + 1, images, k), all magnitudes of every image.
        medians: of every stream, or of all.
        places: (token, channel) of the largest values.
        images: how many there are, where `values` does not say.
    """
    top = np.asarray(values, dtype=float)
    if top.ndim == 1:
        top = np.tile(top[:, None, None], (1, images, len(places)))
    depth, images, k = top.shape
    tokens, channels = np.tile(np.array(places[:k]).T[:, None], (1, images, 1))
    middle = np.broadcast_to(np.asarray(medians, dtype=float), depth)
    streams = [
        StreamProfile(top[i], tokens, channels, np.full(images, middle[i]), np.zeros(images, dtype=int))
        for i in range(depth)
    ]
    return Profile(streams[0], tuple(streams[1:]), 17, 1, 32, True)
