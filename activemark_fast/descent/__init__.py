"""Descent without a mark: whether two models have a common origin, by their weights alone."""

from activemark_fast.descent.compare import compare
from activemark_fast.descent.result import Descent

__all__ = ["Descent", "compare"]
