"""Whose copy a suspect was made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from activemark_fast.key import Key
from activemark_fast.tracing.codewords import (
    AccusationTest,
    Floats,
    colluders_withstood,
    draw_biases,
    draw_codewords,
)
from activemark_fast.tracing.register import Register

BATCH = 8192
"""Recipients scored at a time."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What a suspect tells of the recipients of copies.

    Attributes:
        names: all recipients, (n,).
        p_values: (n,) float64, how often a recipient whose copy had no part in the suspect scores as high
            (`AccusationTest`), times n: over all recipients together (Bonferroni). At most 1.
        deviations: (n,) float64, the scores in standard deviations over the mean of such recipients'.
        positions: of the codewords, so many were read.
        alpha: p-value at or below which a recipient is accused.
    """

    names: tuple[str, ...]
    p_values: Floats
    deviations: Floats
    positions: int
    alpha: float

    @property
    def accused(self) -> tuple[tuple[str, float], ...]:
        """Names and p-values of those whom the suspect accuses, the surest first."""
        found = np.flatnonzero(self.p_values <= self.alpha)
        ordered = found[np.argsort(self.p_values[found], kind="stable")]
        return tuple((self.names[i], float(self.p_values[i])) for i in ordered)

    @property
    def smallest_unaccused(self) -> float | None:
        """The smallest p-value of those who are not accused; None if there are none."""
        others = self.p_values[self.p_values > self.alpha]
        return float(others.min()) if len(others) else None

    @property
    def withstands(self) -> int:
        """How many colluders this many positions are known to suffice against (`colluders_withstood`)."""
        return colluders_withstood(self.positions, len(self.names), self.alpha)

    def __str__(self) -> str:
        count = len(self.names)
        lines = [f"{name}: p = {p:.3g}" for name, p in self.accused]
        found = f"{len(lines) or 'none'} of {count} recipients accused"
        least = self.smallest_unaccused
        rest = "" if least is None else f"; the smallest p-value of the others is {least:.3g}"
        return "\n".join(
            [
                f"{found} at {self.alpha:.3g}{rest}",
                *(f"  {line}" for line in lines),
                f"  {self.positions} positions read: {promise(self.positions, count, self.alpha)}",
                "  p-values are exact and over all recipients: whoever had no part in the suspect is accused "
                "no more often, whatever the others did",
            ]
        )

    def to_dict(self) -> dict[str, object]:
        """The trace as JSON types."""
        return {
            "accused": [{"name": name, "p_value": p} for name, p in self.accused],
            "recipients": len(self.names),
            "smallest_unaccused": self.smallest_unaccused,
            "positions": self.positions,
            "withstands": self.withstands,
            "alpha": self.alpha,
        }


def promise(positions: int, recipients: int, alpha: float) -> str:
    """What `colluders_withstood` says, in words."""
    most = colluders_withstood(positions, recipients, alpha)
    told = "one who leaks alone" if most == 1 else f"one of up to {most} colluders" if most else "nobody"
    return (
        f"the published bound names {told} among {recipients} recipients at {alpha:.3g}, were positions read "
        "without noise"
    )


def trace_answers(register: Register, key: Key, answers: Floats, alpha: float) -> Trace:
    """Scores all recipients.

    Args:
        register: checked against `key`.
        key: the mark's.
        answers: (taps, books, bits) float64, what the suspect's traced rows answer; NaN where they were not
            read.
        alpha: p-value at or below which a recipient is accused.
    """
    biases = draw_biases(key, register.positions)
    by_tap = (len(answers), -1)
    reference = register.reference.numpy()
    test = AccusationTest.of(answers.reshape(by_tap), reference.reshape(by_tap), biases)
    count = len(register.names)
    scores = np.concatenate(
        [
            test.scores(draw_codewords(key, register.names[start : start + BATCH], biases))
            for start in range(0, count, BATCH)
        ]
    )
    return Trace(
        register.names,
        np.minimum(test.p_values(scores) * count, 1.0),
        test.deviations(scores),
        int(np.isfinite(answers).sum()),
        alpha,
    )
