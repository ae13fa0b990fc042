"""What a thief can do to the whole: blocks put in or cut out, the residual stream permuted or rotated.

Both are looked for by means of what does not depend on the order of units and heads: the stem, biases, and
means over units. So whatever is found, the units of B are still numbered as they were.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ALIKE_VECTORS = 0.5
"""Blocks are paired out of order only where the vectors of the pairs agree so well (cosine, on average)."""


def pair_blocks(first: Tensor, second: Tensor) -> list[tuple[int, int]]:
    """Which block of B is which of A: in order, none twice.

    The pairing whose vectors agree best, where they agree well; else the first with the first, and so on. As
    many blocks in both between two pairs (or before the first, or after the last) are pairs, too.

    Args:
        first: (L, 4, D), the vectors of A's blocks.
        second: (L', 4, D), of B's.
    """
    alike = torch.einsum("avd,bvd->ab", _unit(first), _unit(second)).clamp_min(0) / first.shape[1]
    best = torch.zeros(len(first) + 1, len(second) + 1)
    for i in range(len(first)):
        for j in range(len(second)):
            best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], best[i, j] + alike[i, j])
    pairs = []
    i, j = len(first), len(second)
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    straight = [(index, index) for index in range(min(len(first), len(second)))]
    found = float(best[-1, -1])
    if not pairs or found / len(pairs) < ALIKE_VECTORS:
        return straight
    filled = []
    ends = (len(first), len(second))
    for (i, j), (k, m) in itertools.pairwise([(-1, -1), *pairs[::-1], ends]):
        if k - i == m - j:
            filled += [(i + step, j + step) for step in range(1, k - i)]
        filled.append((k, m))
    return filled[:-1]


class Procrustes:
    """The orthogonal map from B's residual stream to A's that fits what it was shown (Schönemann 1966).

    It takes the all-ones vector to itself, as a map that passes through a layer norm must.
    """

    def __init__(self, width: int) -> None:
        self._products = torch.full((width, width), 1.0)

    def show(self, first: Tensor, second: Tensor, weight: float = 1.0) -> None:
        """Rows (m, D) of A and of B that should be the same, as much as `weight` together."""
        if len(first):
            scale = weight / max(float(first.norm() * second.norm()), 1e-30)
            self._products += scale * second.T @ first

    def matrix(self) -> Tensor:
        """(D, D): rows of B times this lie in A's basis."""
        u, _, v = torch.linalg.svd(self._products)
        return u @ v

    def copy(self) -> Procrustes:
        """Another that has been shown the same."""
        other = Procrustes(len(self._products))
        other._products = self._products.clone()
        return other


def from_the_stem(
    width: int,
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    vectors: Sequence[tuple[Tensor, Tensor]],
) -> Procrustes:
    """What the stems say of the map, and the vectors of blocks that are known to be the same.

    Args:
        width: D.
        first: the stem of A.
        second: of B.
        vectors: of pairs of blocks, each (4, D).
    """
    fit = Procrustes(width)
    for name in first.keys() & second.keys():
        if first[name].shape == second[name].shape:
            fit.show(first[name], second[name], weight=len(first[name]) ** 0.5)
    for ours, theirs in vectors:
        fit.show(_unit(ours), _unit(theirs))
    return fit


def refined(
    fit: Procrustes, blocks: Sequence[int], pairs: Callable[[int, Tensor], tuple[Tensor, Tensor]], rounds: int
) -> Tensor:
    """The map after the units of some blocks were matched by means of it, again and again.

    Args:
        fit: what is known to begin with.
        blocks: which blocks.
        pairs: `(block, map) -> rows`, (m, D) of A and of B, that belong together by the map.
        rounds: how often.
    """
    basis = fit.matrix()
    for _ in range(rounds):
        more = fit.copy()
        for block in blocks:
            first, second = pairs(block, basis)
            more.show(_unit(first), _unit(second), weight=len(first) ** 0.5)
        basis = more.matrix()
    return basis


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
