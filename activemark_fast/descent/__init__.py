"""Descent without a mark: whether two models have a common origin, by their weights alone."""

from activemark_fast.descent.compare import compare
from activemark_fast.descent.result import (
    ASSUMPTION,
    MATRICES,
    SHARED,
    BlockDescent,
    Descent,
    DescentDecision,
    State,
)
from activemark_fast.descent.sketch import Sketch

__all__ = [
    "ASSUMPTION",
    "MATRICES",
    "SHARED",
    "BlockDescent",
    "Descent",
    "DescentDecision",
    "Sketch",
    "State",
    "compare",
]
