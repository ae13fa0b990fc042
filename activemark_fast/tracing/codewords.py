"""Codewords of recipients, and the exact test that accuses one of them.

The code is that of Tardos ("Optimal probabilistic fingerprint codes", J. ACM 55, 2008) in its symmetric form
(Škorić, Katzenbeisser and Celik, "Symmetric Tardos fingerprinting codes for arbitrary alphabet sizes", Des.
Codes Cryptogr. 46, 2008): every position has a secret bias p, drawn from the arcsine distribution, and every
recipient's bit there is 1 with the probability p. Biases follow from the key, a codeword from key and name.

A suspect answers each position with a real number, not with a bit. What counts is how far the answer is off
what predicts it best among all that is known without a codeword: w = y - a (2p - 1) - b y₀, with y₀ what a
model that is nobody's copy answers, a and b by least squares at each tap. Many who collude answer 2p - 1 on
the whole, and an attack that changes a model takes a part of y₀; only the rest tells who took part. It is
divided by its median size at the tap, and the score of a recipient is

    S = sum over positions of w g,    g = sqrt((1 - p) / p) for a 1, -sqrt(p / (1 - p)) for a 0.

The theorem the test rests on: let a suspect be made without a recipient's copy. Then it does not depend on
the recipient's codeword, so given the answers and the biases the bits of the codeword are independent coins
of known bias, and the distribution of S is known exactly, whatever the suspect computes and whatever other
recipients did together. Any weights will do for that, so long as they are made without the codeword.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from activemark_fast.key import Key

CUTOFF = 0.02
"""Biases lie between this and 1 less this. Without a bound few positions would outweigh all others."""
LEVELS = 1 << 16
"""The weights of a test are rounded to integers, whose magnitudes sum to about this."""
LOUDEST = 4.0
"""No answer counts for more than so many times the median one: a position gone astray decides nothing."""
SMALLEST = 1e-300
"""No p-value is told below this, where float64 would begin to lose digits."""
ROUNDING = 1 + 1e-9
"""Every p-value is multiplied with this: more than the sums of a test can have lost by rounding."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def draw_biases(key: Key, positions: int) -> Floats:
    """(positions,) float64, the probability of a 1: p = sin² r, r uniform where p is within the cut-off."""
    least = math.asin(math.sqrt(CUTOFF))
    uniform = key.stream("tracing/biases").uniform(positions)
    return np.sin(least + (math.pi / 2 - 2 * least) * uniform) ** 2


def draw_codewords(key: Key, names: Sequence[str], biases: Floats) -> Bools:
    """(n, positions), the codeword of each recipient, by their name alone."""
    words = np.empty((len(names), len(biases)), dtype=np.bool_)
    for word, name in zip(words, names, strict=True):
        np.less(key.stream(f"tracing/codeword/{name}").uniform(len(biases)), biases, out=word)
    return words


def example_codeword(key: Key, biases: Floats) -> Bools:
    """(positions,), a codeword that is nobody's, for what has to be measured on a copy."""
    return np.asarray(key.stream("tracing/example").uniform(len(biases)) < biases)


def colluders_withstood(positions: int, recipients: int, alpha: float) -> int:
    """The most colluders c of whom at least one is found, as far as it is known without a measurement.

    π² c² ln(1 / ε) positions suffice for large c and under the marking assumption (Škorić et al. 2008,
    abstract: where all copies of a coalition agree, so does what it makes), with ε = alpha / recipients how
    often one innocent recipient may be accused. It assumes that positions are read without noise. Who is
    accused does not rest on it.
    """
    return math.isqrt(int(positions / (math.pi**2 * math.log(recipients / alpha))))


@dataclass(frozen=True, eq=False)
class AccusationTest:
    """The exact test of who had a share in a suspect.

    Attributes:
        levels: (m,) int64, what a 1 in a codeword adds to the score at each position over what a 0 does; 0
            where the position was not read.
        biases: (m,) float64, the probability of a 1.
        tail: (K + 1,) float64: tail[t] is the probability that an innocent recipient's score is t or more. A
            score counts the magnitudes of all levels that the codeword agrees with in sign.
    """

    levels: npt.NDArray[np.int64]
    biases: Floats
    tail: Floats

    @classmethod
    def of(cls, answers: Floats, reference: Floats, biases: Floats) -> AccusationTest:
        """The test for one suspect. Nothing in it may depend on a codeword.

        Args:
            answers: (taps, rows) float64, what the suspect answered; NaN where it was not read.
            reference: likewise, what a model without a codeword answers by itself.
            biases: (taps rows,) float64, the probability of a 1 at each position.
        """
        weights = np.zeros_like(answers)
        for tap, (answer, by_itself, lean) in enumerate(
            zip(answers, reference, (2 * biases - 1).reshape(answers.shape), strict=True)
        ):
            read = np.isfinite(answer)
            known = np.stack([lean, by_itself], axis=1)[read]
            share = np.linalg.lstsq(known, answer[read], rcond=None)[0]
            off = answer[read] - known @ share
            typical = float(np.median(np.abs(off))) if len(off) else 0.0
            weights[tap, read] = np.clip(off / (typical or 1.0), -LOUDEST, LOUDEST)
        weights = weights.reshape(-1) / np.sqrt(biases * (1 - biases))
        total = float(np.abs(weights).sum())
        levels = np.rint(weights * (LEVELS / total if total > 0 else 0.0)).astype(np.int64)
        return cls(levels, biases, _tail(np.abs(levels), np.where(levels > 0, biases, 1 - biases)))

    def scores(self, codewords: Bools) -> npt.NDArray[np.int64]:
        """(n, m) → (n,) int64. A product in float32: the integers are below 2^24, so it is exact."""
        against = int(-self.levels[self.levels < 0].sum())
        product = codewords.astype(np.float32) @ self.levels.astype(np.float32)
        return np.rint(product).astype(np.int64) + against

    def p_values(self, scores: npt.NDArray[np.int64]) -> Floats:
        """(n,) float64, how often an innocent recipient's score is as high, for each alone."""
        return np.maximum(self.tail[scores], SMALLEST)

    def deviations(self, scores: npt.NDArray[np.int64]) -> Floats:
        """(n,) float64, the scores in standard deviations over the mean of innocent recipients'."""
        magnitude = np.abs(self.levels)
        agrees = np.where(self.levels > 0, self.biases, 1 - self.biases)
        spread = math.sqrt(float((magnitude**2 * agrees * (1 - agrees)).sum()))
        mean = float((magnitude * agrees).sum())
        return np.asarray((scores - mean) / (spread or 1.0))


def _tail(magnitudes: npt.NDArray[np.int64], agrees: Floats) -> Floats:
    """P(sum of magnitudes that a coin falls for >= t) for t from 0, each coin with its own probability.

    Only products and sums of numbers that are not negative, so the relative error stays below the number of
    additions times 2^-52.
    """
    mass = np.zeros(int(magnitudes.sum()) + 1)
    mass[0] = 1.0
    filled = 0
    for size, chance in zip(magnitudes.tolist(), agrees.tolist(), strict=True):
        shifted = mass[: filled + 1] * chance
        mass[: filled + 1] *= 1 - chance
        mass[size : size + filled + 1] += shifted
        filled += size
    return np.minimum(np.cumsum(mass[::-1])[::-1] * ROUNDING, 1.0)
