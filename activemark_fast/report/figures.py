"""Figures, for files only: matplotlib's object interface, no window, no global state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from activemark_fast.profiling import Profile
from activemark_fast.report.profile import draw_profile
from activemark_fast.report.style import BLUE, GREY, VERMILION
from activemark_fast.site import Site
from activemark_fast.verdict import Decision, Verdict

_COLOURS: dict[Decision, str] = {"match": BLUE, "no match": VERMILION, "inconclusive": GREY}
_ROW_HEIGHT = 0.8


def verdicts_figure(rows: Sequence[tuple[str, Verdict]], profile: Profile, site: Site) -> Figure:
    """Where the mark is, and how suspects were told apart: profile, bit errors, p-values.

    Args:
        rows: name and verdict of each suspect, of one watermark; at least one.
        profile: of the original model.
        site: where the mark is.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError("rows: wanted at least one suspect, got none")
    figure = Figure(figsize=(15, 2.4 + 0.5 * max(len(rows), 5)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1.2, 1))
    draw_profile(left, profile, site)
    left.set_title("Where the mark goes: activation profile", loc="left")
    names = [name for name, _ in rows]
    verdicts = [verdict for _, verdict in rows]
    _draw_error_rows(middle, verdicts)
    _draw_p_values(right, verdicts)
    for axes in (middle, right):
        axes.set_ylim(len(rows) - 0.45, -0.75)
        axes.spines[["top", "right"]].set_visible(False)
    middle.set_yticks(range(len(rows)), names, parse_math=False)
    middle.tick_params(axis="y", length=0)
    right.set_yticks(range(len(rows)), [verdict.decision for verdict in verdicts])
    right.tick_params(axis="y", length=0)
    for label, verdict in zip(right.get_yticklabels(), verdicts, strict=True):
        label.set_color(_COLOURS[verdict.decision])
        label.set_fontweight("bold")
    return figure


def verdict_figure(verdict: Verdict) -> Figure:
    """Bit errors of every image beside what chance would give; decision and p-value in the title."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    heading = f"{verdict.decision.upper()}: {verdict.reason}"
    title = textwrap.fill(heading, 80, break_on_hyphens=False)
    if not verdict.images:
        axes.axis("off")
        axes.text(0.5, 0.5, "no image could be read", ha="center", va="center", color=GREY)
    else:
        p_value = "none (learned codec)" if verdict.p_value is None else f"{verdict.p_value:.2g} (exact)"
        title += (
            f"\ndetection rate R = {verdict.detection_rate:.3f}, mean bit errors "
            f"{verdict.bit_errors.mean():.2f}, p-value {p_value}"
        )
        _draw_errors(axes, verdict)
    # A reason may quote a name from the suspect's file, which must not be read as a formula.
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    return figure


def _draw_error_rows(axes: Axes, verdicts: Sequence[Verdict]) -> None:
    bits, tau = verdicts[0].bits, verdicts[0].tau
    for row, verdict in enumerate(verdicts):
        counts = np.bincount(verdict.bit_errors, minlength=bits + 1)
        height = _ROW_HEIGHT * counts / max(counts.max(), 1)
        colour = _COLOURS[verdict.decision]
        axes.bar(range(bits + 1), -height, bottom=row + _ROW_HEIGHT / 2, width=0.9, color=colour)
        axes.axhline(row + _ROW_HEIGHT / 2, color=GREY, lw=0.5)
        text = f"R = {verdict.detection_rate:.3f}" if verdict.images else "not read"
        axes.text(bits + 0.5, row, text, ha="right", va="center", fontsize=9)
    axes.axvline(tau + 0.5, color="black", ls="--", lw=1)
    axes.axvline(bits / 2, color=GREY, ls=":", lw=1.5)
    axes.text(tau + 0.7, -0.52, f"τ = {tau}", ha="left", va="bottom", fontsize=9)
    axes.text(bits / 2 + 0.3, -0.52, f"chance: {bits / 2:g}", ha="left", va="bottom", fontsize=9)
    axes.set_xlim(-0.7, bits + 0.7)
    axes.set_xlabel(f"wrong bits of {bits}   (R: share of images with at most τ)")
    axes.set_title("What was read: bit errors of every image", loc="left")


def _draw_p_values(axes: Axes, verdicts: Sequence[Verdict]) -> None:
    axes.set_title("What it proves: p-values", loc="left")
    axes.set_xlabel(r"$-\log_{10}$ p-value, exact sign-flip test")
    if all(verdict.p_value is None for verdict in verdicts):
        text = "none: the learned codec is fitted,\nso no exact test exists for it"
        axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)
        axes.set_xticks([])
        return
    threshold = -math.log10(verdicts[0].alpha)
    axes.axvline(threshold, color="black", ls="--", lw=1)
    evidence = [0.0 if v.p_value is None else -math.log10(v.p_value) for v in verdicts]
    end = max(1.35 * max(evidence), 2 * threshold)
    gap = 0.015 * end
    for row, (verdict, length) in enumerate(zip(verdicts, evidence, strict=True)):
        axes.barh(row, length, height=0.5, color=_COLOURS[verdict.decision])
        text = "none" if verdict.p_value is None else f"p = {verdict.p_value:.2g}"
        backing = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(length + gap, row, text, va="center", fontsize=9, bbox=backing)
    label = rf"match from $\alpha$ = {verdicts[0].alpha:g}"
    axes.text(threshold + gap, -0.52, label, va="bottom", fontsize=9)
    axes.set_xlim(0, end)


def _draw_errors(axes: Axes, verdict: Verdict) -> None:
    errors = np.arange(verdict.bits + 1)
    by_chance = [verdict.images * math.comb(verdict.bits, k) / 2**verdict.bits for k in errors]
    counts = np.bincount(verdict.bit_errors, minlength=verdict.bits + 1)
    axes.bar(errors, counts, width=0.9, color=_COLOURS[verdict.decision], label="this suspect")
    axes.plot(errors, by_chance, color="black", marker="o", ms=3, lw=1, label="fair coins")
    axes.axvline(verdict.tau + 0.5, color="black", ls="--", lw=1, label=f"detected up to τ = {verdict.tau}")
    axes.set_xlim(-0.7, verdict.bits + 0.7)
    axes.set_xlabel(f"wrong bits of {verdict.bits}")
    axes.set_ylabel(f"images of {verdict.images}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
