"""What a reading of a suspect proves: bit errors, detection rate, exact p-value, decision."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from activemark_fast.commitment import Opening
from activemark_fast.freedoms import EVIDENCE_AT, paid
from activemark_fast.key import KEYS_A_SECOND, SECONDS_A_KEY
from activemark_fast.tracing import Trace

Decision = Literal["match", "no match", "inconclusive"]

NO_MATCH_ABOVE = 1e-3
"""A p-value above this is no sign of the mark; between it and alpha a verdict is inconclusive."""

CHANCE_PASS_RATE = 1e-4
"""How often the fair coin may pass an image: it sets tau, 5 for 32 bits."""

SECONDS_A_YEAR = 31_557_600


def fair_coin_pass_rate(bits: int, tau: int) -> float:
    """Probability that `bits` fair coins show at most `tau` errors (5.65e-5 for 32 bits, tau = 5)."""
    return sum(math.comb(bits, errors) for errors in range(tau + 1)) / 2**bits


def default_tau(bits: int) -> int:
    """The most bit errors that at most one in 10,000 fair-coin messages stays within; 5 for 32 bits."""
    tau = 0
    while fair_coin_pass_rate(bits, tau + 1) <= CHANCE_PASS_RATE:
        tau += 1
    return tau


def detection_threshold(
    images: int, chance: float, false_accusation: float = 1e-6, miss: float = 1e-3
) -> tuple[int, float]:
    """How many detected images to ask for, and the lowest R of a marked model that then passes.

    Assumes that the images are independent draws, given the suspect. For a marked model whose images are
    drawn from one distribution that is so. For an innocent one it is an idealisation: all its images share
    its weights, so R can exceed this threshold more often than stated; decide by the exact p-value.

    Args:
        images: number of images n.
        chance: probability that an innocent suspect passes an image (`fair_coin_pass_rate`).
        false_accusation: most often that chance may reach the threshold.
        miss: most often that a marked model may fall short of it.

    Returns:
        The least k with P(at least k of n images by chance) <= `false_accusation`, n + 1 if there is none;
        and the R at which P(fewer than k of n) = `miss`, above which it is lower.
    """
    from scipy.special import bdtrc, betaincinv  # scipy takes longer to import than all the rest

    enough = (k for k in range(1, images + 1) if bdtrc(k - 1, images, chance) <= false_accusation)
    k = next(enough, images + 1)
    return k, 1.0 if k > images else float(betaincinv(k, images - k + 1, 1 - miss))


def clopper_pearson(count: int, images: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided confidence interval for a rate of which `count` of `images` draws were seen.

    Assumes independent draws from one distribution: here images of one suspect, so it tells how far R would
    move with other images, and nothing of other suspects (Clopper & Pearson 1934).
    """
    from scipy.special import betaincinv  # scipy takes longer to import than all the rest

    tail = (1 - level) / 2
    low = 0.0 if count == 0 else float(betaincinv(count, images - count + 1, tail))
    high = 1.0 if count == images else float(betaincinv(count + 1, images - count, 1 - tail))
    return low, high


@dataclass(frozen=True, eq=False)
class Verdict:
    """The outcome of `verify`.

    Attributes:
        decision: "match" (the suspect carries the mark), "no match", or "inconclusive" (see `reason`).
        reason: one sentence on why the decision is what it is.
        bit_errors: (images,) int64 array, wrong bits of each image; empty if the suspect could not be read.
        bits: message length M.
        tau: most bit errors an image may have and still count as detected.
        detection_rate: R, the share of images with at most `tau` bit errors (paper, section 3.4); NaN without
            images.
        p_value: exact sign-flip p-value (`sign_flip_p_value`); None where there is none: the learned codec,
            or a suspect that could not be read.
        alpha: p-value at or below which a keyed mark is a match.
        codec: name of the codec.
        identical: the suspect's weights are, bit for bit, those whose fingerprint the watermark holds.
        aligned: "permutation", "rotation" or "scaling" of the residual stream that was undone before reading.
        chosen: what the owner chose and could have fitted to a suspect that was already at hand.
        opening: whether the key and the watermark were committed to; None if no commitment was given.
        alternatives: what the p-value is multiplied with for each thing that the owner could choose
            (`freedoms.alternatives`).
        bands: p-value of each band of the mark alone, on all images read, with nothing paid; a band is read
            only where those before it (loud, natural, passive) have not settled the verdict.
        trace: whose copy the suspect was made from; None without a register, or where it could not be read.
            Its p-values hold whatever the decision is.
    """

    decision: Decision
    reason: str
    bit_errors: np.ndarray
    bits: int
    tau: int
    detection_rate: float
    p_value: float | None
    alpha: float
    codec: str
    identical: bool = False
    aligned: str | None = None
    chosen: tuple[str, ...] = ()
    opening: Opening | None = None
    alternatives: Mapping[str, int] = field(default_factory=dict)
    bands: Mapping[str, float] = field(default_factory=dict)
    trace: Trace | None = None

    @property
    def paid_p_value(self) -> float | None:
        """The p-value times what is paid for everything that an owner could choose (a union bound)."""
        return None if self.p_value is None else paid(self.p_value, self.alternatives)

    @property
    def images(self) -> int:
        """Number of images whose message was read; the natural band may have been read of more."""
        return len(self.bit_errors)

    @property
    def detection_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the detection rate (`clopper_pearson`); NaN without images."""
        if not self.images:
            return math.nan, math.nan
        return clopper_pearson(int((self.bit_errors <= self.tau).sum()), self.images)

    @property
    def evidence(self) -> str | None:
        """What a match proves to somebody who does not trust the owner; None if it is no match.

        The p-value bounds chance. It does not bound an owner who had the suspect first and chose something to
        fit it: a learned codec, the trigger images, activations to align with. Only time excludes that.
        """
        if self.decision != "match":
            return None
        since = None if self.opening is None else self.opening.proven_since
        if self.chosen:
            chosen = " and ".join(self.chosen)
            if since is None:
                return (
                    f"none by itself: the owner chose {chosen} and may have fitted them to the suspect; "
                    "it is evidence only with a timestamped commitment that is older than the suspect and "
                    "every model it was made from"
                )
            return (
                f"if the suspect and every model it was made from are younger than {since.isoformat()}, when "
                f"{chosen} had been committed to"
            )
        if self.paid_p_value is None:
            return None
        keys = 1 / self.paid_p_value
        core, gpu = keys * SECONDS_A_KEY / SECONDS_A_YEAR, keys / KEYS_A_SECOND / SECONDS_A_YEAR
        cost = (
            f"about {keys:.2g} keys against this one model, {core:.2g} years of one processor core or more "
            f"than {gpu:.2g} of one H100"
        )
        bound = "" if since is None else f"; and the owner was bound to this key before {since.isoformat()}"
        if self.paid_p_value > EVIDENCE_AT:
            return f"weak by itself: an owner who lies would have to try {cost}{bound}"
        return f"an owner who lies would have to try {cost}{bound}"

    def __str__(self) -> str:
        lines = [f"{self.decision.upper()}: {self.reason}"]
        if self.images:
            chance = fair_coin_pass_rate(self.bits, self.tau)
            lines.append(
                f"  detection rate R = {self.detection_rate:.3f} over {self.images} images "
                f"(at most {self.tau} of {self.bits} bits wrong; mean {self.bit_errors.mean():.2f}; "
                f"chance {chance:.2g} an image)"
            )
            low, high = self.detection_interval
            wanted, weakest = detection_threshold(self.images, chance)
            lines.append(
                f"    95 % interval {low:.3f} to {high:.3f}; threshold {wanted / self.images:.3f} "
                f"(were images independent: reached by chance at 1e-6, "
                f"missed by a mark of R = {weakest:.3f} at 1e-3)"
            )
            lines += self._odds()
        if self.identical:
            lines.append("  the suspect's weights are identical to those that the watermark names")
        if self.evidence is not None:
            lines.append(f"  evidence: {self.evidence}")
        if self.opening is not None:
            lines.append(f"  commitment: {self.opening}")
        elif self.decision == "match":
            lines.append("  commitment: none shown, so nothing says since when the owner has had this key")
        if self.trace is not None:
            lines += [f"  {line}" for line in str(self.trace).split("\n")]
        return "\n".join(lines)

    def _odds(self) -> list[str]:
        """How often chance, and an owner who chooses, reach what was found."""
        if self.p_value is None:
            return ["  p-value: none. The learned codec is fitted, so no exact test exists for it."]
        lines = [
            f"  p-value = {self.p_value:.3g} (exact sign-flip test): a model made without this key looks "
            "like this no more often"
        ]
        if self.alternatives:
            factors = ", ".join(f"{name} {count}" for name, count in self.alternatives.items())
            lines.append(
                f"  paid p-value = {self.paid_p_value:.3g}, with what an owner could choose ({factors}); "
                f"match at or below {self.alpha:.3g}, evidence at or below {EVIDENCE_AT:.0e}"
            )
        else:
            lines.append(f"    match at or below {self.alpha:.3g}")
        return lines

    def to_dict(self) -> dict[str, object]:
        """The verdict as JSON types."""
        return {
            "decision": self.decision,
            "reason": self.reason,
            "codec": self.codec,
            "images": self.images,
            "bits": self.bits,
            "tau": self.tau,
            "detection_rate": self.detection_rate if self.images else None,
            "detection_interval": list(self.detection_interval) if self.images else None,
            "p_value": self.p_value,
            "paid_p_value": self.paid_p_value,
            "alternatives": dict(self.alternatives),
            "bands": dict(self.bands),
            "alpha": self.alpha,
            "identical": self.identical,
            "aligned": self.aligned,
            "chosen": list(self.chosen),
            "evidence": self.evidence,
            "commitment": None if self.opening is None else self.opening.to_dict(),
            "trace": None if self.trace is None else self.trace.to_dict(),
            "bit_errors": self.bit_errors.tolist(),
        }

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Verdict:
        """The verdict that `to_dict` wrote, without what a register told of recipients.

        Raises:
            ValueError: it is something else, or does not agree with itself.
        """
        same = (
            *("decision", "reason", "bits", "tau", "p_value", "alpha", "codec", "identical", "aligned"),
            *("alternatives", "bands"),
        )
        try:
            rate, opening = written["detection_rate"], written["commitment"]
            verdict = cls(
                **{name: written[name] for name in same},
                bit_errors=np.array(written["bit_errors"], dtype=np.int64),
                detection_rate=math.nan if rate is None else rate,
                chosen=tuple(written["chosen"]),
                opening=None if opening is None else Opening.from_dict(opening),
            )
            kept = {"trace": written["trace"]}
            agrees = json.loads(json.dumps(verdict.to_dict() | kept)) == dict(written)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"no verdict: {type(error).__name__}: {error}") from error
        if not agrees or verdict.decision not in get_args(Decision):
            raise ValueError("no verdict: its parts do not agree")
        return verdict


def rank(verdict: Verdict) -> tuple[int, float]:
    """Smaller for verdicts that say more of a mark."""
    weight = ("match", "inconclusive", "no match").index(verdict.decision)
    return weight, 1.0 if verdict.p_value is None else verdict.p_value
