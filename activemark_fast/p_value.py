"""The exact p-value of a mark: how often chance alone would agree with what was sent as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sign_flip_p_value(scores: Sequence[int]) -> float:
    r"""Exact one-sided p-value of the score sum under random sign flips.

    For a suspect that does not depend on the key, flipping the sign of a row of the read-out P leaves the
    distribution of everything else unchanged, so given the absolute scores the signs are independent fair
    coins, whatever the suspect computes and however its images and bits depend on one another. The p-value
    of T = sum(scores) is the share of the 2^n sign choices with sum(±|score|) >= T: those whose negative part
    weighs no more than the observed one. They are counted exactly, in integers, by multiplying the generating
    polynomials 1 + x^|score|; a Python integer holds the polynomial, n + 1 bits to a coefficient.

    Args:
        scores: matches minus mismatches of each bit over all images, one per bit and tap.

    Returns:
        The p-value in [2^-n, 1].

    Raises:
        ValueError: `scores` is empty.
    """
    if len(scores) == 0:
        raise ValueError("scores: wanted at least one score, got none")
    weights = [abs(int(score)) for score in scores]
    negative = sum(-int(score) for score in scores if score < 0)
    digit = len(weights) + 1
    keep = (1 << (digit * (negative + 1))) - 1
    polynomial = 1
    for weight in weights:
        polynomial += (polynomial << (digit * weight)) & keep
    # The coefficients sum to at most 2^n < 2^digit - 1, so the remainder by 2^digit - 1 is their sum.
    count = polynomial % ((1 << digit) - 1)
    return count / (1 << len(weights))


def bit_scores(logits: Tensor, message: Tensor) -> list[int]:
    """Matches minus mismatches of each of the M bits over n images; a logit of exactly 0 is neither.

    Counting a tie for either side would favour one value of the bit, and flipping a row of P could not turn
    it round: the exact test needs it left out.
    """
    agreement = torch.sign(logits).long() * (2 * message.long() - 1)
    return [int(score) for score in agreement.sum(dim=0)]
