"""Compression as people do it, calibrated on clean images: pruning, quantisation, low rank, slicing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from activemark_fast.attacks.adaptive.parts import clean_images, linears, second_moments, victim
from activemark_fast.attacks.adaptive.spectral import refit
from activemark_fast.attacks.prune import attention_out
from activemark_fast.datasets import Labelled

METHODS = ("wanda", "sparsegpt", "gptq", "low rank")
IMAGES = 256
COLUMNS = 128
"""Columns whose weights SparseGPT chooses among at a time."""
GROUP = 32
"""Weights of a row that share a scale on GPTQ's grid."""
DAMPING = 0.01
"""Identity term of the second moments, over the mean of their diagonal."""

Begin = Callable[[Tensor, Tensor], Callable[[Tensor, int], Tensor]]
"""Looks at a group of columns (out, G) and their (G,) diagonal; what it returns rounds them one by one."""


@torch.no_grad()
def compress(
    model: nn.Module,
    data: Labelled | Tensor,
    seed: int,
    strength: float,
    *,
    method: str = "wanda",
    images: int = IMAGES,
) -> nn.Module:
    """A copy of `model` with every linear layer of its blocks compressed, calibrated on clean images.

    With C = E[x x^T] of a layer's inputs in `model`:

    - "wanda": of each row of W, the weights with the smallest |W_ij| sqrt(C_jj) become 0 (Sun et al. 2024).
    - "sparsegpt": column after column, the weights with the smallest w^2 / [C^-1]_jj among 128 columns become
      0, and the columns to come make up for it (Frantar and Alistarh 2023).
    - "gptq": likewise, but each column is rounded to integers, with a scale for each 32 weights of a row
      (Frantar et al. 2023).
    - "low rank": the truncated singular value decomposition of W S, with S S^T = C, times S^-1 (SVD-LLM, Wang
      et al. 2025).

    Args:
        model: a plain ViT.
        data: clean images.
        seed: of the tokens that C is taken from.
        strength: "wanda", "sparsegpt": the share that becomes 0, 0 to 1; "gptq": bits, 2 to 8; "low rank":
            the share of the parameters that is saved, 0 to 1 (both excluded).
        method: one of these.
        images: most images to use.

    Raises:
        ValueError: an argument is not as described.
    """
    if method not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {method!r}")
    if method == "gptq":
        if strength not in range(2, 9):
            raise ValueError(f"strength: wanted 2 to 8 bits, got {strength}")
    elif not 0 <= strength <= 1 or (method == "low rank" and strength in (0, 1)):
        raise ValueError(f"strength: wanted a share of 0 to 1, got {strength}")
    attacked, backbone, _ = victim(model)
    layers = linears(backbone)
    moments = second_moments(backbone, clean_images(data, images), layers, seed)
    for layer, moment in zip(layers, moments, strict=True):
        weight = layer.weight.double()
        moment.diagonal().add_(DAMPING * moment.diagonal().mean())
        if method == "wanda":
            scores = weight.abs() * moment.diagonal().sqrt()
            lowest = scores.argsort(dim=1)[:, : round(strength * weight.shape[1])]
            weight.scatter_(1, lowest, 0)
        elif method == "low rank":
            weight = low_rank(weight, moment, strength)
        elif method == "sparsegpt":
            weight = compensated(weight, moment, COLUMNS, lambda part, d: _smallest(part, d, strength))
        else:
            weight = compensated(weight, moment, GROUP, lambda part, _: _grid(part, int(strength)))
        layer.weight.copy_(weight)
    return attacked


def compensated(weight: Tensor, moment: Tensor, group: int, begin: Begin) -> Tensor:
    """Rounds the columns of W one after another; those to come make up for the error (OBS, Hassibi 1993).

    With C^-1 = R^T R, R upper triangular, the error e = (w_j - q_j) / R_jj of a column is taken out of the
    later ones as e R_jk.

    Args:
        weight: (out, in) float64.
        moment: C, (in, in) float64, positive definite.
        group: columns that `begin` looks at together.
        begin: given a group of columns as they are when their turn comes, and R_jj of each, returns
            `rounded(column, index in the group)`.

    Returns:
        (out, in) float64.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    root = torch.linalg.cholesky(inverse, upper=True)
    weight = weight.clone()
    for start in range(0, weight.shape[1], group):
        stop = min(start + group, weight.shape[1])
        part = weight[:, start:stop]
        rounded = begin(part.clone(), root.diagonal()[start:stop])
        errors = torch.empty_like(part)
        for index in range(stop - start):
            column = rounded(part[:, index], index)
            errors[:, index] = (part[:, index] - column) / root[start + index, start + index]
            part[:, index:] -= errors[:, index, None] * root[start + index, start + index : stop]
            part[:, index] = column
        weight[:, stop:] -= errors @ root[start:stop, stop:]
    return weight


def low_rank(weight: Tensor, moment: Tensor, saved: float) -> Tensor:
    """The matrix nearest to W on clean inputs whose two factors save a share of the parameters."""
    out, into = weight.shape
    rank = max(1, int((1 - saved) * out * into / (out + into)))
    root = torch.linalg.cholesky(moment)
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return torch.linalg.solve_triangular(root, cut, upper=False, left=False)


@torch.no_grad()
def prune_width(
    model: nn.Module, data: Labelled | Tensor, seed: int, strength: float, *, images: int = IMAGES
) -> nn.Module:
    """A copy of `model` without some MLP units and heads of every block; the rest makes up for them.

    Those go whose contribution to the layer that writes them to the residual stream, tr(W_g C_gg W_g^T), is
    smallest on clean images; that layer is then fitted anew, by least squares, to give what it gave with all
    of them. Heads are left whole where attention's output is no plain linear layer.

    Args:
        model: a plain ViT.
        data: clean images.
        seed: of the tokens that C = E[x x^T] is taken from.
        strength: share of the units and heads that goes, 0 to 1; of few heads, as many as that rounds to.
        images: most images to use.

    Raises:
        ValueError: `strength` is not at least 0 and below 1.
    """
    if not 0 <= strength < 1:
        raise ValueError(f"strength: wanted a share from 0 to below 1, got {strength}")
    attacked, backbone, _ = victim(model)
    layers: list[tuple[nn.Linear, int]] = []
    for index, block in enumerate(backbone.blocks):
        last = backbone.mlp_out(index)
        out, heads = attention_out(block)
        layers += [(last, last.in_features), *([(out, heads)] if type(out) is nn.Linear else [])]
    moments = second_moments(backbone, clean_images(data, images), [layer for layer, _ in layers], seed)
    for (layer, groups), moment in zip(layers, moments, strict=True):
        weight = layer.weight.double()
        kept = contributions(weight, moment, groups).argsort()[round(strength * groups) :]
        columns = torch.arange(layer.in_features, device=weight.device).view(groups, -1)[kept].flatten()
        fitted = refit(weight, moment[:, columns], moment[columns][:, columns], 1e-3)
        weight.zero_()[:, columns] = fitted
        layer.weight.copy_(weight)
    return attacked


def contributions(weight: Tensor, moment: Tensor, groups: int) -> Tensor:
    """tr(W_g C_gg W_g^T) of each of `groups` groups of columns of W, (groups,)."""
    size = weight.shape[1] // groups
    parts = weight.view(len(weight), groups, size)
    within = torch.stack([moment[g : g + size, g : g + size] for g in range(0, weight.shape[1], size)])
    return torch.einsum("ogi,gij,ogj->g", parts, within, parts)


@torch.no_grad()
def slice_residual(
    model: nn.Module, data: Labelled | Tensor, seed: int, strength: float, *, images: int = IMAGES
) -> nn.Module:
    """A copy of `model` whose residual stream is cut to its strongest directions (SliceGPT, Ashkboos 2024).

    After every block the stream is projected on the eigenvectors of its second moment on clean images. A
    sliced model keeps the coordinates only, and puts the change from one block's to the next's into its skip
    connections; that has the same blocks and the same stream, so here a hook on each block projects.

    Args:
        model: a plain ViT.
        data: clean images.
        seed: of the tokens that the second moments are taken from.
        strength: share of the directions that goes, 0 to 1.
        images: most images to use.

    Returns:
        A model with hooks: its state_dict alone is not sliced.

    Raises:
        ValueError: `strength` is not at least 0 and below 1.
    """
    if not 0 <= strength < 1:
        raise ValueError(f"strength: wanted a share from 0 to below 1, got {strength}")
    attacked, backbone, _ = victim(model)
    moments = second_moments(backbone, clean_images(data, images), backbone.blocks, seed, outputs=True)
    cut = round(strength * backbone.width)
    for block, moment in zip(backbone.blocks, moments, strict=True):
        basis = torch.linalg.eigh(moment).eigenvectors[:, cut:]
        block.register_forward_hook(_Project((basis @ basis.T).to(backbone.dtype)))
    return attacked


class _Project:
    """A forward hook that multiplies what a block returns, (..., D), with a symmetric matrix (D, D)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] @ self.matrix, *output[1:])
        return output @ self.matrix


def _smallest(part: Tensor, diagonal: Tensor, share: float) -> Callable[[Tensor, int], Tensor]:
    scores = (part / diagonal).square()
    gone = torch.zeros(scores.numel(), dtype=torch.bool, device=part.device)
    gone[scores.flatten().argsort()[: round(share * scores.numel())]] = True
    mask = gone.view_as(scores)
    return lambda column, index: column.masked_fill(mask[:, index], 0)


def _grid(part: Tensor, bits: int) -> Callable[[Tensor, int], Tensor]:
    largest = 2 ** (bits - 1) - 1
    scale = part.abs().amax(dim=1).clamp_min(1e-12) / largest
    return lambda column, _: (column / scale).round().clamp(-largest - 1, largest) * scale
