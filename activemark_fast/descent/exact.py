"""How many numbers agree by chance: the exact distribution, in integers."""

from __future__ import annotations

from collections.abc import Sequence
from math import lgamma, log

SMALLEST = 1e-300
"""The smallest p-value that is told apart from smaller ones."""
_BITS = 2048
_ONE = 1 << _BITS


def chance_of_agreement(groups: Sequence[tuple[int, int]], count: int) -> float:
    """P(at least `count` agreements) where things are numbered at random.

    In each group, m different labels out of 0 … n - 1 are paired with m things, which are numbered by n
    labels in an order that is drawn uniformly, independently for each group; an agreement is a thing whose
    number is the label it is paired with. For m = n these are the fixed points of a random permutation.

    For one group E[C(X, j)] = C(m, j) (n - j)! / n!, and by inclusion and exclusion P(X = k) is the sum over
    i of (-1)^i C(k + i, k) E[C(X, k + i)]; groups are convolved. All in integers of 2,048 binary places: what
    they round off is far below `SMALLEST`.

    Args:
        groups: (m, n) of every group, 0 <= m <= n.
        count: agreements in all groups together.

    Returns:
        The probability, at least `SMALLEST`, which stands for all that is smaller.

    Raises:
        ValueError: a group is not as described.
    """
    for m, n in groups:
        if not 0 <= m <= n:
            raise ValueError(f"groups: wanted 0 <= m <= n, got m = {m} and n = {n}")
    if count <= 0:
        return 1.0
    if count > sum(m for m, _ in groups):
        return SMALLEST
    # P(X >= count) <= E[C(X, count)] <= L^count / count!
    if count * log(len(groups)) - lgamma(count + 1) < log(SMALLEST):
        return SMALLEST
    total = [_ONE]
    for m, n in groups:
        total = _convolved(total, _chances(m, n, count), count)
    return max((_ONE - sum(total)) / _ONE, SMALLEST)


def _chances(m: int, n: int, count: int) -> list[int]:
    """P(X = k) for k < count of one group, times 2^2048."""
    moments = [_ONE]
    for j in range(m):
        moments.append(moments[-1] * (m - j) // ((j + 1) * (n - j)))
        if not moments[-1]:
            break
    chances = []
    for k in range(min(count, len(moments))):
        chance, ways = 0, 1  # ways: C(k + i, k), with its sign
        for i, moment in enumerate(moments[k:]):
            chance += ways * moment
            ways = -ways * (k + i + 1) // (i + 1)
        chances.append(max(chance, 0))
    return chances


def _convolved(first: list[int], second: list[int], count: int) -> list[int]:
    length = min(len(first) + len(second) - 1, count)
    return [
        sum(first[i] * second[k - i] for i in range(max(0, k - len(second) + 1), min(k + 1, len(first))))
        >> _BITS
        for k in range(length)
    ]
