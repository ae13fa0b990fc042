"""Descent: what was found when two models were compared, and what that says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Basis: TypeAlias = Literal["same", "rotated"]
State: TypeAlias = Literal["frozen", "tuned", "replaced", "re-initialised"]


@dataclass(frozen=True)
class BlockDescent:
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
        return max(self.unit_score, self.head_score)


@dataclass(frozen=True)
class Descent:
    a: str
    b: str
    p_value: float
    basis: Basis
    depths: tuple[int, int]
    blocks: tuple[BlockDescent, ...]
    stem: dict[str, float]
    units: tuple[int, int]
    heads: tuple[int, int]

    @property
    def score(self) -> float:
        scores = sorted((block.score for block in self.blocks), reverse=True)
        return scores[max(3, len(scores) // 4) - 1] if len(scores)>=3 else 0.0

    @property
    def shared(self) -> bool:
        return self.score >= 0.3
