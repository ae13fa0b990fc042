"""The scores of all recipients, as a picture."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from activemark_fast.report.style import BLUE, GREY, VERMILION
from activemark_fast.tracing import Trace

_NAMED = 8
"""Accused recipients whose names are written beside their scores, at most."""


def trace_figure(trace: Trace) -> Figure:
    """The score of every recipient, in the order of the register; the accused stand out and are named."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    count = len(trace.names)
    accused = trace.p_values <= trace.alpha
    places = np.arange(1, count + 1)
    axes.scatter(places[~accused], trace.deviations[~accused], s=6, color=GREY, label="not accused")
    axes.scatter(places[accused], trace.deviations[accused], s=36, color=VERMILION, label="accused")
    if not accused.all():
        highest = float(trace.deviations[~accused].max())
        axes.axhline(highest, color=BLUE, lw=0.8, ls=":", label=f"highest of the others: {highest:.1f}")
    index = {name: place for place, name in enumerate(trace.names)}
    for name, p in trace.accused[:_NAMED]:
        place = index[name]
        axes.annotate(
            f"{name}, p = {p:.2g}",
            (places[place], trace.deviations[place]),
            xytext=(6 if place < count / 2 else -6, 4),
            textcoords="offset points",
            ha="left" if place < count / 2 else "right",
            fontsize=9,
            parse_math=False,
        )
    found = ", ".join(name for name, _ in trace.accused[:_NAMED]) or "nobody"
    more = len(trace.accused) - _NAMED
    title = f"Whose copy: {found}{f' and {more} more' if more > 0 else ''}"
    axes.set_title(
        f"{title}\n{count} recipients, {trace.positions} positions, accused at p = {trace.alpha:g} over all",
        loc="left",
        fontsize=11,
        parse_math=False,
    )
    axes.set_xlabel("recipient, in the order of the register")
    axes.set_ylabel("score, in standard deviations\nover an innocent recipient's mean")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False, fontsize=9)
    return figure
