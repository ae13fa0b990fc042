"""Spectral removal: linear algebra on the second moment of clean inputs, no key and no training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from activemark_fast.attacks.adaptive.parts import clean_images, find_matrices, second_moments, victim
from activemark_fast.datasets import Labelled

METHODS = ("loudest", "energy", "ridge")
IMAGES = 1000
FLOOR = 1e-3
"""Least eigenvalue of a second moment, over their mean, where it is inverted."""


@torch.no_grad()
def spectral(
    model: nn.Module,
    data: Labelled | Tensor,
    seed: int,
    strength: float,
    *,
    method: str = "loudest",
    matrices: Sequence[str] = ("fc2",),
    images: int = IMAGES,
    first_block: int | None = None,
) -> nn.Module:
    """A copy of `model` whose matrices do no more than what clean images need.

    A mark hides where clean inputs are weak, so it has to be large there. With C = E[x x^T] of the clean
    inputs of a matrix W (out, in):

    - "loudest": W' = W - U U^T W, with U the left singular vectors of W C^(-1/2) with the largest values:
      what W does most on inputs that are not clean.
    - "energy": W' = W E E^T, with E the fewest eigenvectors of C that hold a share of its trace.
    - "ridge": W' = W C (C + lambda I)^-1, the ridge regression of W x on x, which forgets what the inputs do
      not excite.

    Args:
        model: a plain ViT.
        data: clean images.
        seed: of the tokens that C is taken from.
        strength: "loudest": how many directions; "energy": the share, 0 to 1; "ridge": lambda over the mean
            of C's diagonal.
        method: one of these.
        matrices: which, of `KINDS`.
        images: most images to use.
        first_block: by default a quarter of the depth.

    Raises:
        ValueError: an argument is not as described, or the model has no such block or matrix.
    """
    if method not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {method!r}")
    if method == "loudest" and not strength >= 0:
        raise ValueError(f"strength: wanted 0 or more directions, got {strength}")
    if method == "energy" and not 0 <= strength <= 1:
        raise ValueError(f"strength: wanted a share of 0 to 1, got {strength}")
    if method == "ridge" and not strength > 0:
        raise ValueError(f"strength: wanted more than 0, got {strength}")
    attacked, backbone, first = victim(model, first_block)
    found = find_matrices(backbone, matrices, first)
    moments = second_moments(backbone, clean_images(data, images), [m.linear for m in found], seed)
    for matrix, moment in zip(found, moments, strict=True):
        weight = matrix.weight.double()
        if method == "loudest":
            left = torch.linalg.svd(weight @ _inverse_root(moment), full_matrices=False).U
            left = left[:, : round(strength)]
            changed = weight - left @ (left.T @ weight)
        elif method == "energy":
            basis = principal(moment, strength)
            changed = weight @ basis @ basis.T
        else:
            changed = refit(weight, moment, moment, strength)
        matrix.weight.copy_(changed)
    return attacked


def refit(weight: Tensor, cross: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """The ridge regression of W x on z: W E[x z^T] (E[z z^T] + lambda I)^-1, (out, Z) float64.

    Args:
        weight: (out, in) float64.
        cross: E[x z^T], (in, Z) float64.
        moment: E[z z^T], (Z, Z) float64.
        ridge: lambda over the mean of the moment's diagonal.
    """
    damped = moment + ridge * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)
    return torch.linalg.solve(damped, (weight @ cross).T).T


def principal(moment: Tensor, energy: float) -> Tensor:
    """(K, r): the fewest eigenvectors of a second moment (K, K) that hold a share of its trace."""
    values, vectors = torch.linalg.eigh(moment)
    held = values.clamp_min(0).flip(0).cumsum(0) / values.clamp_min(0).sum()
    count = int((held < energy * (1 - 1e-12)).sum()) + 1
    return vectors.flip(1)[:, :count]


def _inverse_root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    floored = values.clamp_min(FLOOR * float(values.mean()))
    return (vectors * floored**-0.5) @ vectors.T
