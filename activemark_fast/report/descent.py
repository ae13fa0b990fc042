"""The picture of a descent: which blocks and matrices of a model are another's."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from activemark_fast.descent import MATRICES, SHARED, Descent, State
from activemark_fast.report.style import BLUE, GREY, VERMILION

_COLOURS: dict[State, str] = {
    "frozen": BLUE,
    "tuned": "#56B4E9",
    "replaced": VERMILION,
    "re-initialised": "#F0E442",
}
_MISSING = "#FFFFFF"


def descent_figure(descent: Descent) -> Figure:
    """A heat map: a column for each pair of blocks, a row for each matrix; below, how well blocks agree."""
    blocks = descent.blocks
    figure = Figure(figsize=(max(7.5, 2.5 + 0.55 * len(blocks)), 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.3, 1))
    states = list(_COLOURS)
    cells = np.array(
        [
            [states.index(block.states[name]) if name in block.states else len(states) for block in blocks]
            for name in MATRICES
        ],
        dtype=float,
    ).reshape(len(MATRICES), len(blocks))
    colours = ListedColormap([*_COLOURS.values(), _MISSING])
    upper.imshow(cells, cmap=colours, vmin=-0.5, vmax=len(states) + 0.5, aspect="auto")
    for column, block in enumerate(blocks):
        for row, name in enumerate(MATRICES):
            if name in block.likeness:
                value = f"{block.likeness[name]:.2f}"
                dark = block.states[name] in ("frozen", "replaced")
                upper.text(
                    column,
                    row,
                    value,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
    upper.set_yticks(range(len(MATRICES)), MATRICES)
    upper.tick_params(length=0)
    upper.set_title("Each matrix of B against A's: likeness of matched units and heads", loc="left")
    figure.legend(
        handles=[Patch(facecolor=colour, edgecolor=GREY, label=state) for state, colour in _COLOURS.items()],
        loc="outside lower center",
        ncols=len(_COLOURS),
        frameon=False,
    )
    places = np.arange(len(blocks))
    agree = [
        [found / matched if matched else np.nan for found, matched in counts]
        for counts in ([block.units for block in blocks], [block.heads for block in blocks])
    ]
    lower.plot(places, [block.score for block in blocks], "o-", color=BLUE, label="score (robust)")
    lower.plot(places, agree[0], "s:", color=GREY, label="units with the same number, share")
    lower.plot(places, agree[1], "^:", color=GREY, alpha=0.6, label="heads with the same number, share")
    lower.axhline(SHARED, color="black", lw=1, ls="--")
    lower.set_ylim(-0.1, 1.1)
    lower.set_xticks(
        places, [f"{block.a}" if block.a == block.b else f"{block.a}/{block.b}" for block in blocks]
    )
    lower.set_xlabel("block, counted from 0 (A's / B's where they differ)")
    lower.legend(fontsize=8, loc="center right")
    lower.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        textwrap.fill(f"{descent.decision}: {descent.reason}", 110), x=0.01, ha="left", fontsize=10
    )
    return figure
