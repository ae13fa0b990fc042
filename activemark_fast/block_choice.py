"""Which block a mark goes to: the one where massive activations emerge, by one of three rules.

`Profile.site` says what the rules are, and asks them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

TOP = 5
"""How many of them a rule looks at (paper, section 3.2)."""
SHARP_RISE = 3.0
"""A block whose mean top magnitude is this many times its predecessor's makes activations massive."""
MASSIVE_RATIO = 50.0
"""A magnitude this many times the median of its block is massive."""


def block_for(rule: str, emergence: int | None, ratios: np.ndarray) -> tuple[int, str]:
    """The block to mark and why, up to an open bracket.

    Args:
        rule: of `RULES`.
        emergence: what it answers.
        ratios: (depth + 1,) largest over median magnitude, the stem's first.
    """
    depth = len(ratios) - 1
    middle, late = max(depth // 2 - 1, 0), max(depth - 4, 0)
    if emergence is not None:
        found = f"massive activations emerge after block {emergence}"
        times = f"({ratios[emergence + 1]:.0f} times the median"
    else:
        times = f"(at most {ratios[1:].max():.0f} times the median"
        if not (ratios[1:] >= MASSIVE_RATIO).any():
            found = "the model has no massive activations"
        elif ratios[0] >= MASSIVE_RATIO:
            found = "massive activations are there before block 0"
        else:
            found = "massive activations emerge without a sharp rise"
    if emergence is not None and emergence > late:
        return middle, f"block {middle}, the middle: {found}, too late {times}"
    if rule == "late":
        return late, f"block {late}, the last with room for two taps: {found} {times}"
    if emergence is None:
        return middle, f"block {middle}, the middle: {found} {times}"
    return emergence, f"block {emergence}, where massive activations emerge {times}"


def _first_sharp_rise(heights: np.ndarray, ratios: np.ndarray) -> int | None:
    rises = (heights[1:] >= SHARP_RISE * heights[:-1]) & (ratios[1:] >= MASSIVE_RATIO)
    return int(rises.argmax()) if rises.any() else None


def _largest_jump(heights: np.ndarray, ratios: np.ndarray) -> int | None:
    jumps = np.diff(heights)
    if not (ratios[1:] >= MASSIVE_RATIO).any() or not (jumps > 0).any():
        return None
    return int(np.nanargmax(jumps))


# (depth + 1,) mean of the top magnitudes and (depth + 1,) largest over median, the stem's first → the block.
RULES: dict[str, Callable[[np.ndarray, np.ndarray], int | None]] = {
    "paper": _first_sharp_rise,
    "reference": _largest_jump,
    "late": _first_sharp_rise,
}
