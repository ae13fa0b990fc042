"""What a thief sees of a plain ViT: the matrices of its blocks, and what clean images put into them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from activemark_fast.attacks.prune import attention_out
from activemark_fast.backbone import Backbone, evaluating
from activemark_fast.datasets import Labelled

KINDS = ("fc1", "fc2", "value", "attention")
"""First and last matrix of the MLP, the rows of attention that make values, its output projection."""
FIRST_BLOCK_SHARE = 4
"""A thief does not know the site: attacks begin at the first quarter of the depth."""
BATCH = 32
ROWS = 24
"""Tokens that a second moment is taken from, at least, for each of its rows (where there are as many)."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of a block: some rows of the weight of a linear layer.

    Attributes:
        block: which block.
        kind: one of `KINDS`.
        linear: the live layer.
        rows: which rows of its weight.
    """

    block: int
    kind: str
    linear: nn.Linear
    rows: slice

    @property
    def weight(self) -> Tensor:
        """(out, in), a live view of the weight."""
        return self.linear.weight.detach()[self.rows]


def clean_images(data: Labelled | Tensor, count: int | None = None, least: int = 1) -> Tensor:
    """The first `count` images of `data`, (n, 3, H, W); labels are not looked at.

    Raises:
        TypeError: `data` is neither labelled images nor a tensor.
        ValueError: there are fewer than `least`.
    """
    if not isinstance(data, Labelled | Tensor):
        raise TypeError(f"data: wanted images, got {type(data).__name__}")
    images = (data if isinstance(data, Tensor) else data.images)[:count]
    if len(images) < least:
        raise ValueError(f"data: wanted at least {least} images, got {len(images)}")
    return images


def victim(model: nn.Module, first_block: int | None = None) -> tuple[nn.Module, Backbone, int]:
    """A copy of `model`, its view, and the first block to attack: by default a quarter of the depth.

    Raises:
        ValueError: there is no such block.
    """
    attacked = copy.deepcopy(model)
    backbone = Backbone(attacked)
    first = backbone.depth // FIRST_BLOCK_SHARE if first_block is None else first_block
    if not 0 <= first < backbone.depth:
        raise ValueError(f"first_block: wanted 0 <= first_block < {backbone.depth}, got {first_block}")
    return attacked, backbone, first


def find_matrices(backbone: Backbone, kinds: Sequence[str], first_block: int = 0) -> list[Matrix]:
    """The matrices of these kinds in the blocks from `first_block` on, found by structure and name.

    Raises:
        ValueError: a kind is none of `KINDS`, or blocks hold no such matrix as a linear layer that is called.
    """
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"matrices: wanted some of {', '.join(KINDS)}, got {kinds!r}")
    return [
        Matrix(index, kind, linear, rows)
        for index in range(first_block, backbone.depth)
        for kind in kinds
        for linear, rows in _of_kind(backbone, index, kind)
    ]


def _of_kind(backbone: Backbone, index: int, kind: str) -> list[tuple[nn.Linear, slice]]:
    block, last = backbone.blocks[index], backbone.mlp_out(index)
    if kind == "fc2":
        return [(last, slice(None))]
    if kind == "attention":
        linear = attention_out(block)[0]
        found = [(linear, slice(None))] if type(linear) is nn.Linear else []  # others are not called
    elif kind == "fc1":
        found = [(linear, slice(None)) for linear in mlp_in(block, last)]
    else:
        found = []
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and "att" in name:
                if name.endswith(("qkv", "in_proj")):
                    found.append((module, slice(module.out_features * 2 // 3, None)))
                elif name.endswith(("value", "v_proj", "v")):
                    found.append((module, slice(None)))
    if not found:
        raise ValueError(f"matrices: {type(block).__name__} has no linear layer for {kind!r}")
    return found


def mlp_in(block: nn.Module, last: nn.Linear) -> list[nn.Linear]:
    """The layers that read the residual stream for the MLP that ends in `last`: one, or two if gated."""
    return [
        module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and "att" not in name
        and module is not last
        and module.in_features == last.out_features
    ]


def linears(backbone: Backbone, first_block: int = 0) -> list[nn.Linear]:
    """Every plain linear layer of the blocks from `first_block` on, in order."""
    return [
        module
        for block in backbone.blocks[first_block:]
        for module in block.modules()
        if type(module) is nn.Linear
    ]


@torch.no_grad()
def second_moments(
    backbone: Backbone, images: Tensor, layers: Sequence[nn.Module], seed: int, outputs: bool = False
) -> list[Tensor]:
    """E[x x^T] of what enters each layer on clean images: (K, K) float64 each, on the model's device.

    Images run in batches; of each, a random share of the tokens is looked at, so that nothing grows with the
    number of images and no moment takes longer than its layer.

    Args:
        backbone: the model.
        images: (n, 3, H, W).
        layers: modules of its blocks that are called with one tensor (..., K).
        seed: chooses the tokens.
        outputs: of what leaves each layer instead.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}

    def add(module: nn.Module, values: Tensor) -> None:
        rows = values.detach().flatten(0, -2)
        size = rows.shape[1]
        wanted = -(-ROWS * size * len(rows) // (len(images) * backbone.num_tokens))
        if wanted < len(rows):
            chosen = torch.randint(len(rows), (wanted,), generator=generator)
            rows = rows[chosen.to(rows.device)]
        if module not in sums:
            sums[module] = torch.zeros(size, size, device=rows.device)
            counts[module] = 0
        sums[module].addmm_(rows.float().T, rows.float())
        counts[module] += len(rows)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(module, args[0])

    def after(module: nn.Module, _args: object, output: Tensor) -> None:
        add(module, output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        stack.enter_context(evaluating(backbone.encoder))
        for layer in dict.fromkeys(layers):
            hook = layer.register_forward_hook(after) if outputs else layer.register_forward_pre_hook(before)
            stack.callback(hook.remove)
        for part in images.split(BATCH):
            tokens = backbone.stem(part.to(backbone.device, backbone.dtype))
            backbone.run(tokens, 0, backbone.depth)
    return [sums[layer].double() / counts[layer] for layer in layers]
