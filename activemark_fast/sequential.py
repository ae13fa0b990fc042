"""Verdicts from as few images as suffice: the looks, their price, and when to give a suspect up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FIRST_LOOK = 8
"""Images read before the first look; each further look doubles their number."""
WEAKEST_MARK = 0.25
"""The least mean agreement of a mark that is not given up early: at most 12 of 32 bits wrong (chance: 16)."""
WEAKEST_NATURAL = 0.1
"""The same for single readings in the natural band: 45 of 100 wrong."""
LEAST_CHANCE = 1e-3
"""A mark that all images would prove is given up, at a look, about this rarely."""
FEWEST_IMAGES, LEAST_IMAGES = 16, 32
"""Before the first of these are read no mark is out of reach. A mark that shows on no more than a fifth of
all images goes unseen on so few with a probability of more than `LEAST_CHANCE`, on as many as the second with
less: between the two a suspect is given up only where its passive band shows nothing either, …"""
SHOWS = 0.01
"""… and it shows something at this p-value or below."""


def look_ends(images: int) -> list[int]:
    """How many of the `images` have been read at each look: 8, 16, 32 … and all of them."""
    ends = []
    end = FIRST_LOOK
    while end < images:
        ends.append(end)
        end *= 2
    return [*ends, images]


def look_penalties(looks: int) -> list[int]:
    r"""What the exact p-value of each look is multiplied with; the smallest product so far is a p-value.

    Weighted Bonferroni: look j has the weight w_j = 1 / penalty_j, and the weights sum to 1: a half for the
    last look, which is as strong as the whole test but for a factor of 2, the other half shared equally.
    For a suspect made without the key each p_j is at most x with a probability of at most x, so
    P(some p_j / w_j <= x) <= sum_j P(p_j <= w_j x) <= sum_j w_j x = x, however the looks depend on one
    another (they share images). That bounds the minimum over *all* looks; whoever stops early, by whatever
    rule, reports a minimum over fewer of them, which is no smaller. So the p-value stays valid.
    """
    return [1] if looks == 1 else [2 * (looks - 1)] * (looks - 1) + [2]


def mark_excluded(agreement: npt.NDArray[np.float64], miss: float, weakest: float = WEAKEST_MARK) -> bool:
    """Whether the images read so far exclude a mark of `weakest` or more at every tap.

    Given the suspect, its images and messages are independent draws, and so are the rows of `agreement`. The
    upper confidence limit (Student's t, level 1 - `miss`) of their mean is compared with `weakest`: a
    suspect whose true mean agreement at some tap is that or higher is excluded with a probability of `miss`.

    Args:
        agreement: (n, taps), mean over the bits of +1 for a right bit and -1 for a wrong one; n >= 2.
        miss: between 0 and 1.
        weakest: mean agreement of the mark that is to be excluded.
    """
    return bool((_upper_limit(agreement, miss) < weakest).all())


def images_to_exclude(agreement: npt.NDArray[np.float64], miss: float) -> int | None:
    """About how many images like these `mark_excluded` would take; None where no number would do."""
    from scipy.special import stdtrit  # scipy takes longer to import than all the rest

    n, room = len(agreement), WEAKEST_MARK - agreement.mean(axis=0)
    if not bool((room > 0).all()):
        return None
    spread = stdtrit(n - 1, 1 - miss) * agreement.std(axis=0, ddof=1)
    return int(np.ceil(((spread / room) ** 2).max())) + 1


def out_of_reach(scores: npt.NDArray[np.float64], images: int, wanted: float) -> bool:
    """Whether a suspect has next to no chance left to reach `wanted` when all images are read.

    Conditional power (Lan, Simon and Halperin 1982), with the drift that the suspect itself shows. Most of
    what a row of the read-out shows of an innocent is the same on every image, so a few images tell where
    all of them will lead. With T the sum of the scores of all rows, the sign-flip p-value is about that of
    z = T / sqrt(sum of the squared scores) under a standard normal distribution. Given the suspect, its
    images are independent draws: the sum of the rows of one image has an upper confidence limit (Student's
    t, level 1 - `LEAST_CHANCE`), and the squares are those seen, less what the images that are still to be
    read average out. The suspect is given up where z would not even be enough at that limit, but never before
    `FEWEST_IMAGES`: the limit cannot tell of images unlike all that were read.

    Args:
        scores: (n, rows), agreement of each image with what was sent, row by row; n >= 2.
        images: how many there are, at least n.
        wanted: the p-value, with nothing paid, from which all of them would make a match.
    """
    from scipy.special import ndtri  # scipy takes longer to import than all the rest

    if len(scores) < min(FEWEST_IMAGES, images):
        return False
    averaged_out = scores.var(axis=0, ddof=1) * (1 / len(scores) - 1 / images)
    squares = (scores.mean(axis=0) ** 2 - averaged_out).sum()
    highest = _upper_limit(scores.sum(axis=1), LEAST_CHANCE)
    return bool(highest < -ndtri(wanted) * np.sqrt(max(squares, 0.0)))


def _upper_limit(draws: npt.NDArray[np.float64], miss: float) -> npt.NDArray[np.float64]:
    """Upper confidence limit of the mean over the first axis: Student's t, level 1 - `miss`."""
    from scipy.special import stdtrit  # scipy takes longer to import than all the rest

    n = len(draws)
    error = draws.std(axis=0, ddof=1) / np.sqrt(n)
    return np.asarray(draws.mean(axis=0) + stdtrit(n - 1, 1 - miss) * error)
