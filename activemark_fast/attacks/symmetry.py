"""Symmetries: other weights with the same function. They cost an attacker nothing, not even quality."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from activemark_fast.datasets import Labelled


@torch.no_grad()
def permute_residual(model: nn.Module, data: Labelled | None, seed: int, strength: float) -> nn.Module:
    """A copy of `model` whose residual stream has its channels in another order; its logits are the same.

    Args:
        model: a timm `VisionTransformer`.
        data: not used.
        seed: of the order.
        strength: not used.

    Raises:
        TypeError: `model` is another kind of module.
    """
    moved = _copy(model)
    width = moved.embed_dim
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    _move(moved, torch.eye(width, dtype=torch.float64)[:, order])
    return moved


@torch.no_grad()
def rotate_residual(model: nn.Module, data: Labelled | None, seed: int, strength: float) -> nn.Module:
    """A copy of `model` whose residual stream is rotated; its logits are the same.

    The weights and biases of the norms and the LayerScales are folded into the linear layers beside them;
    then a random orthogonal map that fixes the all-ones vector passes through every layer norm. Where there
    is no head to fold the final norm into, features come out rotated, and without its weight and bias.

    Args:
        model: a timm `VisionTransformer`.
        data: not used.
        seed: of the map.
        strength: not used.

    Raises:
        TypeError: `model` is another kind of module.
        ValueError: a norm at its stem cannot be folded, or its pooling works channel by channel.
    """
    moved = _copy(model)
    width = moved.embed_dim
    for name in ("norm_pre", "patch_embed.norm"):
        if not isinstance(moved.get_submodule(name), nn.Identity):
            raise ValueError(f"model: its {name} cannot be folded, so its residual stream cannot be rotated")
    if moved.global_pool not in ("", "token", "avg"):
        raise ValueError(f"model: its pooling, {moved.global_pool!r}, does not pass a rotation")
    for norm, readers in _readers(moved):
        for linear in readers:
            shift = linear.weight @ norm.bias
            linear.bias = nn.Parameter(shift if linear.bias is None else linear.bias + shift)
            linear.weight *= norm.weight
        norm.weight.fill_(1)
        norm.bias.zero_()
    for linear, scale in _block_writers(moved):
        if not isinstance(scale, nn.Identity):
            linear.weight *= scale.gamma[:, None]
            if linear.bias is not None:
                linear.bias *= scale.gamma
            scale.gamma.fill_(1)
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    ones = torch.ones(width, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, gaussian[:, 1:]], dim=1)).Q
    inner = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator, dtype=torch.float64)).Q
    _move(moved, basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner) @ basis.T)
    return moved


@torch.no_grad()
def permute_inside(model: nn.Module, data: Labelled | None, seed: int, strength: float) -> nn.Module:
    """A copy of `model` with other weights inside its blocks; residual stream and logits are the same.

    Heads and the hidden units of the MLPs change places; queries are scaled against keys, values against the
    output projection.

    Args:
        model: a timm `VisionTransformer` with plain MLPs and without norms on queries, keys and heads.
        data: not used.
        seed: of orders and scales.
        strength: not used.

    Raises:
        TypeError: `model` is another kind of module.
        ValueError: its blocks have another make.
    """
    from timm.layers.mlp import Mlp

    moved = _copy(model)
    generator = torch.Generator().manual_seed(seed)
    for block in moved.blocks:
        attention, mlp = block.attn, block.mlp
        inner_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm")]
        inner_norms.append(getattr(mlp, "norm", None))
        plain = all(norm is None or isinstance(norm, nn.Identity) for norm in inner_norms)
        if not plain or type(mlp) is not Mlp:
            raise ValueError("model: wanted plain MLPs, and no norms on queries, keys and heads")
        heads = attention.num_heads
        order = torch.randperm(heads, generator=generator)
        scales = torch.rand(2, heads, 1, 1, generator=generator) + 0.5
        query_scale, value_scale = scales.to(attention.proj.weight)
        for parameter in (attention.qkv.weight, attention.qkv.bias):
            if parameter is not None:
                q, k, v = parameter.reshape(3, heads, attention.head_dim, -1)
                scaled = torch.stack([q * query_scale, k / query_scale, v * value_scale])[:, order]
                parameter.copy_(scaled.reshape(parameter.shape))
        columns = attention.proj.weight.view(attention.proj.out_features, heads, -1)
        attention.proj.weight.copy_((columns / value_scale.view(1, heads, 1))[:, order].flatten(1))
        units = torch.randperm(len(mlp.fc1.weight), generator=generator)
        mlp.fc1.weight.copy_(mlp.fc1.weight[units])
        if mlp.fc1.bias is not None:
            mlp.fc1.bias.copy_(mlp.fc1.bias[units])
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, units])
    return moved


def _copy(model: nn.Module) -> Any:
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(model, VisionTransformer) or not all(type(block) is Block for block in model.blocks):
        raise TypeError(
            f"model: wanted a timm VisionTransformer of pre-norm blocks, got {type(model).__name__}"
        )
    if model.attn_pool is not None:
        raise TypeError("model: wanted a timm VisionTransformer that pools without attention")
    return copy.deepcopy(model)


def _readers(model: Any) -> Iterator[tuple[Any, list[nn.Linear]]]:
    """Every norm on the residual stream, with the linear layers that read what it puts out."""
    for block in model.blocks:
        for norm, part, last in ((block.norm1, block.attn, "proj"), (block.norm2, block.mlp, "fc2")):
            yield norm, [m for n, m in part.named_modules() if isinstance(m, nn.Linear) and n != last]
    for norm in (model.norm, model.fc_norm):
        if isinstance(norm, nn.LayerNorm):
            yield norm, [model.head] if isinstance(model.head, nn.Linear) else []


def _block_writers(model: Any) -> Iterator[tuple[Any, Any]]:
    """Every linear layer that adds to the residual stream, with its LayerScale (or identity)."""
    for block in model.blocks:
        yield block.attn.proj, block.ls1
        yield block.mlp.fc2, block.ls2


def _move(model: Any, matrix: Tensor) -> None:
    """Takes the residual stream h to h @ matrix, (D, D) float64: changes what writes it and what reads it.

    What stands in between, channel by channel, moves along: that is right for a permutation, and for ones and
    zeros.
    """

    def along(parameter: Tensor | None, axis: int) -> None:
        if parameter is not None:
            moved = torch.tensordot(parameter.double(), matrix.to(parameter.device), dims=([axis], [0]))
            parameter.copy_(moved.movedim(-1, axis))

    def along_norm(module: nn.Module) -> None:
        for parameter in module.parameters():
            along(parameter, 0)

    along(model.patch_embed.proj.weight, 0)
    along(model.patch_embed.proj.bias, 0)
    for name in ("pos_embed", "cls_token", "reg_token"):
        along(getattr(model, name, None), -1)
    for norm in (model.patch_embed.norm, model.norm_pre):
        along_norm(norm)
    for norm, readers in _readers(model):
        along_norm(norm)
        for linear in readers:
            along(linear.weight, 1)
    for linear, scale in _block_writers(model):
        along(linear.weight, 0)
        along(linear.bias, 0)
        along_norm(scale)
