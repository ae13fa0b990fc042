"""The frontier of removal: what is left of a mark against what the thief loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from activemark_fast.defaults import ALPHA
from activemark_fast.report.style import GREY

# Okabe and Ito's colours, and markers that repeat after another number.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B2A800")
_MARKERS = ("o", "s", "^", "D", "v")
_ALLOWED = (1, 2)
"""Points of accuracy within which a removal counts as cheap."""


def frontier_figure(points: Sequence[dict[str, Any]], alpha: float = ALPHA) -> Figure:
    """p-value and detection rate against points of accuracy lost, one curve an attack.

    Args:
        points: what `Evaluation.frontier` returns, or a part of it; a curve joins those of one family, in
            their order.
        alpha: p-value from which on it is a match.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("points: wanted at least one attack, got none")
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours, markers = cycle(_COLOURS), cycle(_MARKERS)
    for family in dict.fromkeys(point["family"] for point in points):
        curve = [p for p in points if p["family"] == family]
        read = [p for p in curve if p["p_value"] is not None]
        style: dict[str, Any] = {
            "color": next(colours),
            "marker": next(markers),
            "ms": 6,
            "lw": 1.2,
            "alpha": 0.85,
        }
        left.plot([p["lost"] for p in read], [-math.log10(p["p_value"]) for p in read], label=family, **style)
        read = [p for p in curve if p["detection_rate"] is not None]
        right.plot([p["lost"] for p in read], [p["detection_rate"] for p in read], **style)
    left.axhline(-math.log10(alpha), color="black", ls="--", lw=1)
    left.set_ylabel(rf"$-\log_{{10}}$ p-value (dashed: match from {alpha:g})")
    left.set_title("What is left to prove with", loc="left")
    right.set_ylabel("detection rate R")
    right.set_title("What is left of the detection rate", loc="left")
    for axes in (left, right):
        axes.set_xlabel("points of linear-probe accuracy lost (dotted: 1 and 2)")
        axes.spines[["top", "right"]].set_visible(False)
        for points_lost in _ALLOWED:
            axes.axvline(points_lost, color=GREY, ls=":", lw=1.2)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure
