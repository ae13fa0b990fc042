"""The passive band: what a mark shows with nothing injected, in how each block answers its own input.

An injection asks a suspect a question that clean images never ask, so a thief can train it not to answer.
What blocks do with photographs is what the model is for. So a third band lies there: with x the input of a
block (each patch token less its mean over the channels and over its standard deviation) and y what the block
adds to it, both over patch tokens of clean images,

    M = L_y^-1 E[y x^T] L_x^-T,  L L^T the Cholesky factors of both covariances,

is a matrix whose singular values are the canonical correlations of x and y (Hotelling 1936). It does not
depend on how the block is built or scaled inside. Row r of a block reads u_r^T M v_r, with u and v random
rows from the key; marking adds to y a linear map of x that makes all rows of the key read high, as little as
one hundredth of y.

For a suspect that does not depend on the key, flipping the sign of u_r flips row r and nothing else, so the
sign-flip p-value is exact. Nothing of it is the owner's to choose but what is anyway: key, place and images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from activemark_fast.codec.codebooks import BANDS
from activemark_fast.codec.keyed import orthonormal
from activemark_fast.key import Key
from activemark_fast.site import Site

PASSIVE = "passive"
BAND_NAMES = (*(band.name for band in BANDS), PASSIVE)
"""The bands of an owner's mark, in the order in which they are read."""
MAX_ROWS = 128
"""Rows of a block, at most; no more than half its width."""
FLOOR = 0.02
"""Added to both covariances' diagonals, over their mean: directions that clean images hardly use are
not blown up to count as much as others."""
LEVELS = 8
"""Scores are whole numbers, of so many steps to the rows' root mean square, …"""
MOST = 3 * LEVELS
"""… and no row counts more than three times that."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What the key reads of one block.

    Attributes:
        answers, inputs: (R, D) float64, orthonormal: u and v.
    """

    answers: Tensor
    inputs: Tensor


def passive_rows(key: Key, site: Site) -> dict[int, Rows]:
    """The rows of every block that a mark at `site` is written to.

    key: stretched (`Key.stretched`).
    """
    shape = min(MAX_ROWS, (site.width - 1) // 2), site.width
    ones = torch.ones(1, site.width, dtype=torch.float64)

    def drawn(name: str) -> Tensor:
        gaussian = torch.from_numpy(key.stream(f"codebook/{PASSIVE}/{name}").normal(shape))
        return orthonormal(gaussian, ones)

    # By how far a block lies behind the site: in a suspect of other depth the site may have moved.
    return {
        block: Rows(drawn(f"{block - site.block}/answers"), drawn(f"{block - site.block}/inputs"))
        for block in range(site.block + 1, site.taps[-1] + 1)
    }


def inputs_and_answers(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """A block's x and y, float32, from its input and output, (…, D) each, of patch tokens."""
    before = before.float()
    x = before - before.mean(dim=-1, keepdim=True)
    x = x / x.std(dim=-1, keepdim=True, correction=0).clamp_min(torch.finfo(x.dtype).tiny)
    return x, after.float() - before


class Moments:
    """Second moments of a block's x and y, and of x and its hidden activations where those are given.

    Args:
        width: D.
        hidden: H; 0 without.
        device: where pairs come from.

    Attributes:
        count: of the pairs.
        products: float32 sums of x x^T, y y^T, y x^T and k x^T, k the hidden activations.
    """

    def __init__(self, width: int, hidden: int, device: torch.device) -> None:
        self.count = 0
        self._sums = [
            torch.zeros(size, device=device, dtype=torch.float64) for size in (width, width, hidden)
        ]
        sizes = ((width, width), (width, width), (width, width), (hidden, width))
        self.products = [torch.zeros(size, device=device) for size in sizes]

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Moments:
        """Those of a block whose input and output are given, (…, D) each, of patch tokens."""
        moments = cls(before.shape[-1], 0, before.device)
        moments.add(*inputs_and_answers(before.flatten(0, -2), after.flatten(0, -2)))
        return moments

    def add(
        self,
        x: Tensor,
        y: Tensor,
        hidden: Tensor | None = None,
        columns: Sequence[slice] = (slice(None),),
    ) -> None:
        """Adds pairs.

        Args:
            x: (T, D) float32.
            y: (T, D) float32.
            hidden: (T, H).
            columns: of the products, those that are added to; whoever leaves some out sets them afterwards.
        """
        self.count += len(x)
        seen = [x, y] if hidden is None else [x, y, hidden.float()]
        pairs = [(x, x), (y, y), (y, x), *((k, x) for k in seen[2:])]
        for total, part in zip(self._sums, seen, strict=False):
            total += part.sum(dim=0)
        for product, (left, right) in zip(self.products, pairs, strict=False):
            for some in columns:
                product[:, some].addmm_(left.T, right[:, some])

    def _covariance(self, product: int, left: int, right: int) -> Tensor:
        means = self._sums[left] / self.count, self._sums[right] / self.count
        return self.products[product].double() / self.count - torch.outer(*means)

    @cached_property
    def inputs(self) -> Tensor:
        """(D, D) float64, covariance of x."""
        return self._covariance(0, 0, 0)

    @cached_property
    def outputs(self) -> Tensor:
        """(D, D) float64, covariance of y."""
        return self._covariance(1, 1, 1)

    @cached_property
    def cross(self) -> Tensor:
        """(D, D) float64, E[y x^T]."""
        return self._covariance(2, 1, 0)

    @cached_property
    def hidden(self) -> Tensor:
        """(H, D) float64, E[k x^T], of hidden activations k and x less its mean."""
        return self._covariance(3, 2, 0)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(D, D) float64 each, L_x and L_y; NaN where activations are not finite."""
        return _cholesky(self.inputs), _cholesky(self.outputs)

    def whitened(self, rows: Rows) -> Rows:
        """The rows of `rows` times the inverse of L_y, and of L_x."""
        of_x, of_y = self.factors
        answers, inputs = rows.answers.to(of_y.device), rows.inputs.to(of_x.device)
        return Rows(
            torch.linalg.solve_triangular(of_y, answers, upper=False, left=False),
            torch.linalg.solve_triangular(of_x, inputs, upper=False, left=False),
        )

    @cached_property
    def size(self) -> Tensor:
        """(), root mean square of the entries of M."""
        of_x, of_y = self.factors
        half = torch.linalg.solve_triangular(of_y, self.cross, upper=False)
        return torch.linalg.solve_triangular(of_x, half.T, upper=False).square().mean().sqrt()


def _cholesky(covariance: Tensor) -> Tensor:
    raised = covariance.clone()
    raised.diagonal().add_(FLOOR * covariance.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(raised)
    return torch.where(info == 0, factor, math.nan)


def readings(rows: Rows, moments: Moments) -> Tensor:
    """(R,) float64: u_r^T M v_r, over the root mean square of M's entries; 0 of a block that adds nothing."""
    white = moments.whitened(rows)
    read = ((white.answers @ moments.cross) * white.inputs).sum(dim=1) / moments.size
    return read.nan_to_num(0.0, 0.0, 0.0)


def passive_scores(read: Sequence[Tensor]) -> list[int]:
    """What `sign_flip_p_value` takes, of the readings of all blocks."""
    every = torch.cat(list(read)).cpu()
    size = every.square().mean().sqrt().clamp_min(torch.finfo(every.dtype).tiny)
    return [int(score) for score in (every / size * LEVELS).round().clamp(-MOST, MOST)]
