"""Spectral removal: linear algebra on the second moment of clean inputs, no key and no training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from activemark_fast.attacks.adaptive.parts import clean_images, find_matrices, second_moments, victim
from activemark_fast.datasets import Labelled

IMAGES = 1000
FLOOR = 1e-3
"""Least eigenvalue of a second moment, over their mean, where it is inverted."""


@torch.no_grad()
def loudest(
    model: nn.Module,
    data: Labelled | Tensor,
    seed: int,
    strength: float,
    *,
    matrices: Sequence[str] = ("fc2",),
    images: int = IMAGES,
    first_block: int | None = None,
) -> nn.Module:
    """A copy of `model` without the loudest directions of its matrices.

    A mark hides where clean inputs are weak, so it has to be large there. With C the second moment of the
    clean inputs of W, the left singular vectors U of W C^(-1/2) with the largest values are what W does most
    on inputs that are not clean: W' = W - U U^T W.

    Args:
        model: a plain ViT.
        data: clean images.
        seed: of the tokens that C is taken from.
        strength: how many directions.
        matrices: which, of `KINDS`.
        images: most images to use.
        first_block: by default a quarter of the depth.

    Raises:
        ValueError: `strength` is below 0, or `matrices` or `first_block` are not as described.
    """
    if not strength >= 0:
        raise ValueError(f"strength: wanted 0 or more directions, got {strength}")
    attacked, backbone, first = victim(model, first_block)
    found = find_matrices(backbone, matrices, first)
    moments = second_moments(backbone, clean_images(data, images), [m.linear for m in found], seed)
    for matrix, moment in zip(found, moments, strict=True):
        weight = matrix.weight.double()
        left = torch.linalg.svd(weight @ _power(moment, -0.5), full_matrices=False).U[:, : round(strength)]
        matrix.weight.copy_(weight - left @ (left.T @ weight))
    return attacked


@torch.no_grad()
def clean_energy(
    model: nn.Module,
    data: Labelled | Tensor,
    seed: int,
    strength: float,
    *,
    matrices: Sequence[str] = ("fc2",),
    images: int = IMAGES,
    first_block: int | None = None,
) -> nn.Module:
    """A copy of `model` whose matrices read only the directions that hold a share of the clean energy.

    W' = W E E^T, with E the fewest eigenvectors of the second moment of W's clean inputs that hold it.

    Args:
        model, data, seed, matrices, images, first_block: see `loudest`.
        strength: the share, 0 to 1.

    Raises:
        ValueError: `strength` is not within 0 and 1, or as for `loudest`.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: wanted 0 to 1, got {strength}")
    attacked, backbone, first = victim(model, first_block)
    found = find_matrices(backbone, matrices, first)
    moments = second_moments(backbone, clean_images(data, images), [m.linear for m in found], seed)
    for matrix, moment in zip(found, moments, strict=True):
        basis = principal(moment, energy=strength)
        weight = matrix.weight.double()
        matrix.weight.copy_(weight @ basis @ basis.T)
    return attacked


@torch.no_grad()
def ridge_refit(
    model: nn.Module,
    data: Labelled | Tensor,
    seed: int,
    strength: float,
    *,
    matrices: Sequence[str] = ("fc2",),
    images: int = IMAGES,
    first_block: int | None = None,
) -> nn.Module:
    """A copy of `model` whose matrices are fitted anew to what they do on clean inputs.

    Ridge regression of the outputs W x on the inputs x: W' = W C (C + lambda I)^-1, which forgets what the
    inputs do not excite.

    Args:
        model, data, seed, matrices, images, first_block: see `loudest`.
        strength: lambda over the mean of C's diagonal.

    Raises:
        ValueError: `strength` is not above 0, or as for `loudest`.
    """
    if not strength > 0:
        raise ValueError(f"strength: wanted more than 0, got {strength}")
    attacked, backbone, first = victim(model, first_block)
    found = find_matrices(backbone, matrices, first)
    moments = second_moments(backbone, clean_images(data, images), [m.linear for m in found], seed)
    for matrix, moment in zip(found, moments, strict=True):
        matrix.weight.copy_(refit(matrix.weight.double(), moment, strength))
    return attacked


def refit(weight: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """(out, in) float64: W C (C + ridge mean(diag C) I)^-1, for a `moment` C (in, in)."""
    damped = moment.clone()
    damped.diagonal().add_(ridge * moment.diagonal().mean())
    return torch.linalg.solve(damped, moment @ weight.T).T


def principal(moment: Tensor, *, energy: float) -> Tensor:
    """(K, r): the fewest eigenvectors of a second moment (K, K) that hold a share of its trace, strongest first."""
    values, vectors = torch.linalg.eigh(moment)
    held = values.clamp_min(0).flip(0).cumsum(0) / values.clamp_min(0).sum()
    count = int((held < energy * (1 - 1e-12)).sum()) + 1
    return vectors.flip(1)[:, :count]


def _power(moment: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    floored = values.clamp_min(FLOOR * float(values.mean()))
    return (vectors * floored**exponent) @ vectors.T
