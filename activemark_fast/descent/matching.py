"""Which unit is which, and which head: nearest neighbours that agree, and how alike they are.

Nothing here depends on how the units of B are numbered: they are looked at in a random order, so that ties
are not broken in favour of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from activemark_fast.descent.weights import Block

UNITS = 512
"""So many units of each block of A are matched, at most; against all of B."""
CORRELATED = 128
"""So many of the pairs of a block are correlated, at most."""
MIN_PAIRS = 8
"""Fewer pairs of units than that make no score."""
TWIN = 0.5
"""Units, or heads, of one model whose mean cosine is above this are of one kind."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Units, or heads, of A and of B that are each other's nearest.

    Attributes:
        first, second: (m,) their numbers in A and in B.
        looked_at: (s,) the numbers of those of A that were looked at, with the dead ones.
        size: how many B has; all of them were looked at.
    """

    first: Tensor
    second: Tensor
    looked_at: Tensor
    size: int

    @property
    def agreements(self) -> int:
        """How many have the same number in A and B."""
        return int((self.first == self.second).sum())

    @property
    def groups(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(m, n) as `chance_of_agreement` wants it, if B's numbers are random, and if A's are.

        Then the others are as they are, and some may be numbers that these cannot have.
        """
        among_b = int((self.first < self.size).sum())
        among_a = int(torch.isin(self.second, self.looked_at).sum())
        return (among_b, self.size), (among_a, len(self.looked_at))


def moved(block: Block, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """Reads (n, G, D) and writes (n, D) of a block, taken by `basis` (D, D) to another model's."""
    if basis is None:
        return block.reads, block.writes
    return block.reads @ basis, block.writes @ basis


def moved_heads(block: Block, basis: Tensor | None) -> tuple[Tensor, ...] | None:
    """Queries, keys, values and outputs of a block's heads in another basis."""
    if block.heads is None or basis is None:
        return block.heads
    return tuple(part @ basis for part in block.heads)


class Units:
    """The units of one MLP, ready to be matched.

    Attributes:
        size: how many there are.
        looked_at: (s,) the numbers of those that were looked at.
        numbers: (n,) of these, the ones that read and write something.
        reads, writes: (n, G D) and (n, D) float32; each channel less its mean and over its deviation, so that
            no massive channel decides alone, then each unit of length 1.
    """

    def __init__(self, reads: Tensor, writes: Tensor, order: Tensor) -> None:
        """order: of the units; those that are left out are not looked at."""
        alive = (reads.flatten(1).abs().amax(1) > 0) & (writes.abs().amax(1) > 0)
        self.size = len(reads)
        self.looked_at = order
        self.numbers = order[alive[order]]
        self.reads = _standard(reads[self.numbers].flatten(1), reads[alive].flatten(1))
        self.writes = _standard(writes[self.numbers], writes[alive])


def nearest(likeness: Tensor) -> tuple[Tensor, Tensor]:
    """Those of A and B that are each other's nearest; two of (m,), positions.

    Args:
        likeness: (s, t) how like each of A is to each of B.
    """
    if 0 in likeness.shape:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    best = likeness.argmax(dim=1)
    first = (likeness.argmax(dim=0)[best] == torch.arange(len(best))).nonzero()[:, 0]
    return first, best[first]


def runners_up(likeness: Tensor, kinship: Tensor) -> Tensor:
    """(m,) for each of A the nearest of B that is of another kind than its partner.

    A thief can split units, or heads, into twins for nothing: a twin is no runner-up.

    Args:
        likeness: (m, t) of those of A to all of B.
        kinship: (m, t) of their partners to all of B.
    """
    if 0 in likeness.shape:
        return torch.zeros(0, dtype=torch.long)
    return likeness.masked_fill(kinship > TWIN, -torch.inf).argmax(dim=1)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """(m,) Spearman's coefficient of each row of two (m, D) tensors."""
    ranks = [rows.argsort(dim=1).argsort(dim=1).float() for rows in (first, second)]
    x, y = (rank - rank.mean(dim=1, keepdim=True) for rank in ranks)
    return (x * y).sum(dim=1) / (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-12)


def head_likeness(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
    """(H, H') cosine between the bilinear forms X^T Y of heads; each argument (X, Y), both (H, d, D).

    What can be mixed within a head without changing what it computes, X by a matrix and Y by its inverse,
    does not change X^T Y.
    """
    x, y = (torch.einsum("had,gbd->hgab", mine, theirs) for mine, theirs in zip(first, second, strict=True))
    lengths = [_form_lengths(*pair) for pair in (first, second)]
    return (x * y).sum(dim=(2, 3)) / lengths[0][:, None] / lengths[1]


def _form_lengths(x: Tensor, y: Tensor) -> Tensor:
    """(H,) Frobenius norms of X^T Y, by the products of the small Gram matrices."""
    squares = ((x @ x.transpose(1, 2)) * (y @ y.transpose(1, 2))).sum(dim=(1, 2))
    return squares.clamp_min(1e-30).sqrt()


def _standard(rows: Tensor, population: Tensor) -> Tensor:
    if not len(rows):
        return rows
    middle = population.mean(dim=0)
    deviation = (population - middle).abs().mean(dim=0)  # one massive weight hardly changes it
    scaled = (rows - middle) / (deviation + 1e-3 * deviation.mean() + 1e-30)
    return scaled / scaled.norm(dim=1, keepdim=True).clamp_min(1e-30)
