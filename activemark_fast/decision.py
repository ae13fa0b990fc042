"""decide: match, no match or inconclusive? The one rule, a function of a reading and a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from activemark_fast.align import Alignment
from activemark_fast.codec.codebooks import MAX_BOOKS
from activemark_fast.codec.passive import BAND_NAMES
from activemark_fast.defaults import ALPHA
from activemark_fast.freedoms import BITS, EVIDENCE_AT, alternatives, paid
from activemark_fast.sequential import images_to_exclude, look_ends, look_penalties
from activemark_fast.site import Site, taps_after
from activemark_fast.verdict import NO_MATCH_ABOVE, Decision, Verdict

LEARNED_MATCH_RATE = 0.5
"""Detection rate from which a learned mark counts as found."""
LEARNED_ORIGINAL_RATE = 0.01
"""Detection rate on the unmarked original above which a learned codec can make no match."""
MISS = 1e-3
"""How often "no match" may be said of a mark as faint as `sequential` has it where all images are read."""
PLAIN_PRICE, ALIGNED_PRICE = 101 / 100, 101.0
"""What the p-values of the plain and of the aligned reading are multiplied with where both may be made.

Weighted Bonferroni: the inverses sum to 1, so the smaller product is a p-value whenever the second reading is
made, for whatever reason, and however the two depend on one another.
"""
NO_SIGN = "no sign of the mark"


@dataclass(frozen=True, eq=False)
class Reading:
    """What one reading of a suspect showed.

    Attributes:
        p_value: of all bands together, the reading's price paid; 1 for a codec without. It may exceed 1.
        bands: of each band alone, nothing paid; one is read only where those before it have not settled the
            verdict.
        errors: (taps, n), wrong bits of each image's message, of the first band.
        agreement: (n, taps), mean over these bits of +1 for a right one and -1 for a wrong one where the
            readings are not cleared of crosstalk: given the suspect, its images are independent draws.
        excluded: whether the images exclude a mark that is as strong as `sequential` has it in either band
            that is read by injections.
        alignment: what was undone before.
    """

    p_value: float
    bands: tuple[float, ...]
    errors: np.ndarray
    agreement: np.ndarray
    excluded: bool
    alignment: Alignment | None


@dataclass(frozen=True)
class Policy:
    """What readings are judged by.

    Attributes:
        alpha: p-value at or below which a keyed mark is a match.
        tau: most wrong bits of an image that counts as detected.
        align: as `verify` takes it; False where the watermark has nothing to align with.
        power: as `Verifier` takes it; None for a codec without p-value.
        bits: message length M.
        books: how many messages of M rows each tap is read for, of the band with most.
        bands: of how many bands the smallest p-value is taken.
        penalties: of the looks (`sequential.look_penalties`).
        original_rate: detection rate of a codec without p-value on the unmarked original; None with one.
        alternatives: what is paid for that the owner could choose (`freedoms.alternatives`).
    """

    alpha: float
    tau: int
    align: bool | None
    power: float | None
    bits: int
    books: int
    bands: int
    penalties: tuple[int, ...]
    original_rate: float | None = None
    alternatives: Mapping[str, int] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether there is a p-value."""
        return self.original_rate is None

    def price(self, aligned: bool, tries: int = 1) -> float:
        """What the smallest p-value of the bands is multiplied with, were there but one look.

        Args:
            aligned: of the reading after an alignment; else of the plain one.
            tries: of how many towers and places the smallest is taken.
        """
        price = 1.0 if self.align is not None else ALIGNED_PRICE if aligned else PLAIN_PRICE
        return tries * price * self.bands

    def weights(self, aligned: bool, tries: int = 1) -> tuple[float, ...]:
        """The same at each look (weighted Bonferroni)."""
        return tuple(self.price(aligned, tries) * penalty for penalty in self.penalties)

    def miss(self, look: int) -> float:
        """The share of all misses that a look may make."""
        return MISS if self.power in (None, 1) else (1 - self.power) / self.penalties[look]

    def matches(self, p_value: float) -> bool:
        """Whether a p-value is a match's, after what an owner could choose is paid for."""
        return paid(p_value, self.alternatives) <= self.alpha

    def can_match(self, taps: int, aligned: bool) -> bool:
        """Whether a mark that is read from all images, at so many taps, without an error is a match."""
        return self.matches(self.weights(aligned)[-1] * 2.0 ** -(taps * self.bits * self.books))

    def unpaid(self, weight: float) -> float:
        """The p-value, with nothing paid, that makes a match at a look of this weight."""
        return self.alpha / math.prod(self.alternatives.values()) / weight

    def settled(self, p_value: float, excluded: bool, hopeless: bool) -> bool:
        """Whether no further look is needed.

        Args:
            p_value: so far, as of a `Reading`.
            excluded: likewise.
            hopeless: whether it is, and a match is out of reach of all images (`sequential.out_of_reach`).
        """
        given_up = p_value > NO_MATCH_ABOVE and excluded
        if self.power == 1:
            evidence = paid(p_value, self.alternatives) <= min(self.alpha, EVIDENCE_AT)
            return evidence or (given_up and hopeless)
        return self.power is not None and (given_up or self.matches(p_value))


def decide(reading: Reading, policy: Policy) -> tuple[Decision, str]:
    """The decision on a suspect, and one sentence on why."""
    if policy.original_rate is not None:
        return _decide_learned(reading.errors[-1], policy.tau, policy.original_rate)
    taps, images = reading.errors.shape
    p_value = min(1.0, reading.p_value)
    if policy.matches(p_value):
        return "match", "the suspect carries the mark"
    if not policy.can_match(taps, reading.alignment is not None):
        return "inconclusive", (
            f"{taps * policy.bits * policy.books} bits are too few for a match at alpha = {policy.alpha:g}, "
            "whatever they read: more bits or taps would be needed"
        )
    if p_value <= NO_MATCH_ABOVE:
        return "inconclusive", (
            "signs of the mark, but not enough to exclude chance: more hold-out images or bits might"
        )
    if reading.excluded:
        return "no match", NO_SIGN
    enough = images_to_exclude(reading.agreement, policy.miss(-1))
    more = "more bits" if enough is None else f"about {enough} images, or more bits,"
    return "inconclusive", f"{NO_SIGN}, but {images} images are too few to exclude one: {more} would do"


def least_bits(block: int, depth: int, images: int) -> int:
    """The shortest message that is a match where every one of so many images is read without an error.

    The mark is in bands, after `block` of a model of `depth` blocks.
    """
    site = Site(block, taps_after(block, depth), 0, 0, 0, depth=depth)
    penalties = tuple(look_penalties(len(look_ends(images))))

    def enough(bits: int) -> bool:
        choices = alternatives(site, bits, depth, architecture=False)
        policy = Policy(ALPHA, 0, None, 1, bits, MAX_BOOKS, len(BAND_NAMES), penalties, alternatives=choices)
        return policy.can_match(len(site.taps), aligned=False)

    return next(filter(enough, BITS))


def check_bits(bits: int, block: int, depth: int, images: int) -> None:
    """Raises ValueError for a message of fewer than `least_bits`."""
    least = least_bits(block, depth, images)
    if bits < least:
        raise ValueError(
            f"bits: wanted at least {least}, for fewer are never a match at {ALPHA:g}; got {bits}"
        )


def doubted(verdict: Verdict, doubt: str) -> Verdict:
    """`verdict` on a suspect that does not quite fit: it may be a match, but it is no "no match"."""
    if verdict.decision != "no match":
        return verdict
    return replace(verdict, decision="inconclusive", reason=f"{NO_SIGN}, but {doubt}")


def agreement(errors: np.ndarray, bits: int) -> np.ndarray:
    """Of (taps, n) wrong bits: (n, taps), mean over the bits of +1 for a right one and -1 for a wrong one."""
    return np.asarray(1 - 2 * errors.T / bits)


def _decide_learned(errors: np.ndarray, tau: int, original_rate: float) -> tuple[Decision, str]:
    found = float((errors <= tau).mean()) >= LEARNED_MATCH_RATE
    share = "at least" if found else "less than"
    reason = f"the learned codec reads the message from {share} half of the images"
    if found and original_rate > LEARNED_ORIGINAL_RATE:
        reason += f", but also from the unmarked original (R = {original_rate:.3f}), so this proves nothing"
        return "inconclusive", reason
    return ("match" if found else "no match"), reason
