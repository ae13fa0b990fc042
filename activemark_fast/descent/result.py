"""Descent: what was found when two models were compared, and what that says."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Basis: TypeAlias = Literal["same", "rotated"]
State: TypeAlias = Literal["frozen", "tuned", "replaced", "re-initialised"]
DescentDecision: TypeAlias = Literal["descent", "inconclusive", "no descent found"]

DECISIONS: tuple[DescentDecision, ...] = ("descent", "inconclusive", "no descent found")

ALPHA = 1e-6
"""At or below this p-value the numbers of the units are no coincidence."""
SHARED = 0.35
"""A block of this score shares weights; `benchmarks/descent.py` has how far innocents and forgers get."""
MIN_BLOCKS = 3
"""So many blocks must share weights, at least."""
SHARE_OF_BLOCKS = 4
"""One block in so many must."""
STEM_SHARED = 0.9
"""Patch embeddings that are that much alike (cosine), channel by channel, make a result inconclusive."""
MATRICES = ("attn.qk", "attn.ov", "mlp.fc1", "mlp.fc2")
"""What heads attend to (queries and keys), what they move (values and outputs), and the two of the MLP."""
ASSUMPTION = (
    "if one of the two was trained from a start of its own, its units and heads in an order that could have "
    "been any other, and nobody who had both has renumbered either since. Whoever holds both files can "
    "renumber "
    "an innocent model and make this p as small as they like: against them it says nothing. A renumbering "
    "does "
    "not change the score; but whoever makes A after they saw B can train B on and call it A, and against "
    "them "
    "only a commitment to A (activemark commit --model) helps that is older than B"
)


@dataclass(frozen=True)
class BlockDescent:
    """How one block of B lies to one of A.

    Attributes:
        a, b: which blocks, counted from 0.
        units: (agreements, matched): how many matched MLP units have the same number in both.
        heads: the same of attention heads.
        unit_score: how much better what units read and write agrees (Spearman's coefficient) with their
            partners than with the next best of another kind, median. About 0 between independent models, at
            most 1.
        head_score: the same of heads, by the cosines of what they attend to and move.
        likeness: for each of `MATRICES` the median cosine of matched units or heads. Between independent
            models it is not 0: nearest neighbours are alike.
        states: what became of each matrix, see `Descent`.
    """

    a: int
    b: int
    units: tuple[int, int]
    heads: tuple[int, int]
    unit_score: float
    head_score: float
    likeness: dict[str, float]
    states: dict[str, State]

    @property
    def score(self) -> float:
        """The better of the two scores."""
        return max(self.unit_score, self.head_score)


@dataclass(frozen=True)
class Traits:
    """What tells, at times, which of two models came later. Heuristics, and no more.

    Attributes:
        zeros: share of the weights of the blocks' matrices that are exactly 0.
        bfloat16: whether all of them can be written as bfloat16.
        kurtosis: excess kurtosis of the matrices, the mean: outliers grow as a model is trained.
    """

    zeros: float
    bfloat16: bool
    kurtosis: float


@dataclass(frozen=True)
class Descent:
    """What the weights of two models say about a common origin.

    States of a matrix: "frozen" (the same, or the same rounded to bfloat16), "tuned" (the same units,
    changed), "replaced" (nothing in common), "re-initialised" (replaced, and random as before any training).
    A matrix of a rotated model is never called frozen.

    Attributes:
        a, b: names of the models.
        p_value: exact under `ASSUMPTION`, with a factor of 4 for two tests (units, heads) in two bases.
            4e-300 stands for all that is smaller.
        basis: "rotated" if B's residual stream was rotated or permuted back before it was compared.
        depths: how many blocks A and B have.
        blocks: of each pair of blocks.
        stem: likeness (cosine) of the stem's tensors that have the same shape in both.
        units, heads: (agreements, matched) in all blocks together. Heads count for the p-value only where
            `heads_known`.
        heads_known: whether both models say how many heads they have.
        traits: of A and of B.
    """

    a: str
    b: str
    p_value: float
    basis: Basis
    depths: tuple[int, int]
    blocks: tuple[BlockDescent, ...]
    stem: dict[str, float]
    units: tuple[int, int]
    heads: tuple[int, int]
    heads_known: bool
    traits: tuple[Traits, Traits]

    @property
    def score(self) -> float:
        """The robust score: what the best quarter of the blocks reaches, but at least three; 0 of fewer.

        No p-value. A forger who rotates an innocent model to fit one or two blocks of another does not raise
        it.
        """
        count = max(MIN_BLOCKS, -(-len(self.blocks) // SHARE_OF_BLOCKS))
        if len(self.blocks) < count:
            return 0.0
        return sorted((block.score for block in self.blocks), reverse=True)[count - 1]

    @property
    def decision(self) -> DescentDecision:
        """Descent by the score alone; a p-value that the score does not bear out is inconclusive."""
        if self.score >= SHARED:
            return "descent"
        if self.p_value <= ALPHA or len(self.blocks) < MIN_BLOCKS or self._stem_shared:
            return "inconclusive"
        return "no descent found"

    @property
    def shared(self) -> tuple[BlockDescent, ...]:
        """The pairs of blocks that share weights."""
        return tuple(block for block in self.blocks if block.score >= SHARED)

    @property
    def _stem_shared(self) -> bool:
        return self.basis == "same" and self.stem.get("patch.weight", 0.0) >= STEM_SHARED

    @property
    def reason(self) -> str:
        """What is shown, in one sentence or two."""
        agree = f"{self.units[0]} of {self.units[1]} matched units have the same number in both"
        if self.decision == "descent":
            numbered = self.p_value <= ALPHA
            how = "still numbered alike" if numbered else "but numbered anew, so the p-value says nothing"
            turned = ", after the residual stream was rotated back" if self.basis == "rotated" else ""
            return (
                f"{len(self.shared)} of {len(self.blocks)} pairs of blocks share their units or "
                f"heads{turned}; "
                f"these are {how}. So one descends from the other, or both from a common ancestor (a common "
                f"initialisation is one); which, the weights do not prove"
            )
        if len(self.blocks) < MIN_BLOCKS:
            return f"{len(self.blocks)} pairs of blocks could be compared, wanted at least {MIN_BLOCKS}"
        if self._stem_shared and self.p_value > ALPHA:
            return (
                "the patch embeddings are the same or nearly so, but too few blocks share units or heads: "
                "blocks "
                "were replaced, or somebody moved one model's channels to fit the other's"
            )
        if self.decision == "inconclusive":
            return (
                f"{agree}, or of the heads, more than by chance; but what they read and write does not agree "
                f"as "
                f"in a descendant: one model was renumbered to fit the other, or little is left of a descent"
            )
        return (
            f"{agree}, and what they read and write agrees no more than in independent models. A model that "
            f"was distilled from another, or trained on until nothing was left, looks like this, too"
        )

    @property
    def order(self) -> str:
        """What heuristics say about which came first; no evidence."""
        if self.decision != "descent":
            return ""
        a, b = self.traits
        hints = []
        if max(a.zeros, b.zeros) > 0.01 and max(a.zeros, b.zeros) > 2 * min(a.zeros, b.zeros):
            name, share = ("A", a.zeros) if a.zeros > b.zeros else ("B", b.zeros)
            hints.append(f"{name} was pruned ({share:.0%} of its weights are 0), so it may be the later")
        if a.bfloat16 != b.bfloat16:
            name = "A" if a.bfloat16 else "B"
            hints.append(f"{name} is rounded to bfloat16, so it may be the later, or the released one")
        if self.depths[0] != self.depths[1]:
            hints.append(f"A has {self.depths[0]} blocks, B {self.depths[1]}")
        if abs(a.kurtosis - b.kurtosis) > 0.1 * max(abs(a.kurtosis), abs(b.kurtosis)):
            name = "A" if a.kurtosis > b.kurtosis else "B"
            hints.append(
                f"{name} has more outliers (excess kurtosis {a.kurtosis:.2f} and {b.kurtosis:.2f}), so it "
                f"may have "
                "been trained for longer"
            )
        return "; ".join(hints) or "nothing tells which came first"

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return {
            "a": self.a,
            "b": self.b,
            "decision": self.decision,
            "reason": self.reason,
            "p_value": self.p_value,
            "assumption": f"p is exact {ASSUMPTION}",
            "score": self.score,
            "score_wanted": SHARED,
            "basis": self.basis,
            "depths": list(self.depths),
            "units": list(self.units),
            "heads": list(self.heads),
            "heads_known": self.heads_known,
            "order_heuristics": self.order,
            "stem": self.stem,
            "blocks": [
                {
                    "a": block.a,
                    "b": block.b,
                    "units": list(block.units),
                    "heads": list(block.heads),
                    "unit_score": block.unit_score,
                    "head_score": block.head_score,
                    "likeness": block.likeness,
                    "states": block.states,
                }
                for block in self.blocks
            ],
        }

    def __str__(self) -> str:
        bound = "at most " if self.p_value <= 1e-290 else ""
        heads = f", {self.heads[0]} of {self.heads[1]} heads" if self.heads[1] else ""
        counted = "" if self.heads_known else " (heads not counted: how many there are is not known)"
        lines = [
            f"{self.decision}: {self.reason}",
            f"  robust score  {self.score:.3f} (descent from {SHARED}; independent models near 0). No "
            f"p-value",
            f"  exact test    p = {bound}{self.p_value:.2g}: {self.units[0]} of {self.units[1]} units{heads} "
            f"keep "
            f"their number{counted}",
            *textwrap.wrap(f"exact {ASSUMPTION}", 100, initial_indent=" " * 16, subsequent_indent=" " * 16),
        ]
        if self.order:
            lines.append(f"  which first   {self.order} (heuristics, no evidence)")
        if self.stem:
            alike = ", ".join(f"{name} {value:.3f}" for name, value in sorted(self.stem.items()))
            lines.append(f"  stem          {alike} (cosine)")
        lines.append("")
        lines.append(
            f"  {'A':>3} {'B':>3}  {'units alike':>12} {'heads':>7} {'score':>6}  "
            + "  ".join(f"{name:<20}" for name in MATRICES)
        )
        for block in self.blocks:
            cells = "  ".join(
                f"{f'{block.states[name]} {block.likeness[name]:.2f}' if name in block.states else '-':<20}"
                for name in MATRICES
            )
            lines.append(
                f"  {block.a:>3} {block.b:>3}  {_of(block.units):>12} {_of(block.heads):>7} "
                f"{block.score:>6.2f}  "
                f"{cells}"
            )
        states = Counter(state for block in self.blocks for state in block.states.values())
        lines.append(f"  matrices: {', '.join(f'{count} {state}' for state, count in states.items())}")
        return "\n".join(line.rstrip() for line in lines)


def _of(pair: tuple[int, int]) -> str:
    return f"{pair[0]}/{pair[1]}"
