"""The picture of a profile: how large activations are after every block, and where the massive ones sit."""

from __future__ import annotations

import textwrap
from collections import defaultdict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from activemark_fast.block_choice import MASSIVE_RATIO, TOP
from activemark_fast.profiling import Profile
from activemark_fast.report.style import BLUE, GREY, PURPLE
from activemark_fast.site import Placement, Site

_MAX_PLACES = 16
_LARGEST_DOT = 130.0  # points²
_TICKS = (50, 100, 200, 500, 1000, 2000, 5000, 10_000, 100_000, 1_000_000)  # times the median


def profile_figure(profile: Profile, placement: Placement) -> Figure:
    """The curves of the paper's figure 2 with the site in them, and a map of the massive activations."""
    shown = min(len(_places(profile)), _MAX_PLACES)
    figure = Figure(figsize=(15, max(5.0, 2.6 + 0.3 * shown)), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_profile(left, profile, placement.site)
    left.set_title("How large activations are", loc="left")
    _draw_map(right, profile, placement.site)
    figure.suptitle(textwrap.fill(f"Site: {placement.reason}", 140), x=0.01, ha="left", fontsize=12)
    return figure


def draw_profile(axes: Axes, profile: Profile, site: Site) -> None:
    """The five largest magnitudes and the median after every block, and where the mark goes."""
    blocks = np.arange(profile.depth)
    top, median = profile.top, profile.median
    for rank in range(TOP):
        label = {0: "largest", 1: f"2nd to {TOP}th"}.get(rank)
        shade = 1.0 if rank == 0 else 0.7 - 0.12 * rank
        axes.plot(blocks, top[:, rank], color=BLUE, alpha=shade, marker="o", ms=3.5, label=label)
    axes.plot(blocks, median, color=GREY, ls="--", marker="s", ms=3, label="median")
    massive = MASSIVE_RATIO * median
    axes.plot(blocks, massive, color=GREY, ls=":", label=f"massive: {MASSIVE_RATIO:g} times the median")
    axes.axvline(site.block, color=PURPLE, lw=6, alpha=0.5, label=f"injected after {site.block}")
    for tap in site.taps:
        label = f"read after {' and '.join(map(str, site.taps))}" if tap == site.taps[0] else None
        axes.axvline(tap, color="black", ls=":", lw=1.5, label=label)
    axes.set_yscale("log")
    drawn = np.concatenate([top[:, :TOP].ravel(), median, massive])
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    if len(drawn):
        low, high = drawn.min(), drawn.max()
        axes.set_ylim(low / 1.5, 1.5 * high * (high / low) ** 0.4)
    axes.set_xlim(-0.5, profile.depth - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block, counted from 0")
    axes.set_ylabel("|activation| after the block, mean over images")
    axes.legend(loc="upper left", ncols=2, fontsize=9, framealpha=1, edgecolor="white")
    axes.spines[["top", "right"]].set_visible(False)


def _places(profile: Profile) -> list[tuple[int, int]]:
    """(token, channel) of all massive activations, those of most blocks and images first."""
    images: defaultdict[tuple[int, int], int] = defaultdict(int)
    for block in profile.massive:
        for massive in block:
            images[massive.token, massive.channel] += massive.images
    return sorted(images, key=lambda place: (-images[place], place))


def _draw_map(axes: Axes, profile: Profile, site: Site) -> None:
    places = _places(profile)
    title = "Where massive activations sit"
    if len(places) > _MAX_PLACES:
        title += f" (the {_MAX_PLACES} most frequent of {len(places)} places)"
    axes.set_title(title, loc="left")
    if not places:
        axes.axis("off")
        text = f"no value is {MASSIVE_RATIO:g} times the median of its block"
        axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)
        return
    rows = {place: row for row, place in enumerate(places[:_MAX_PLACES])}
    dots = [
        (
            block,
            rows[m.token, m.channel],
            m.images / profile.images,
            m.magnitude / profile.blocks[block].median,
        )
        for block, massive in enumerate(profile.massive)
        for m in massive
        if (m.token, m.channel) in rows
    ]
    x, y, share, times = np.array(dots).T
    axes.axvline(site.block, color=PURPLE, lw=6, alpha=0.5)
    most = max(times.max(), 2 * MASSIVE_RATIO)
    scale = LogNorm(MASSIVE_RATIO, most)
    drawn = axes.scatter(x, y, s=_LARGEST_DOT * share, c=times, cmap="viridis_r", norm=scale, zorder=2)
    names = [f"{profile.token_name(token)}, channel {channel}" for token, channel in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.5, profile.depth - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"block, counted from 0   (area of a dot: share of the {profile.images} images)")
    axes.grid(axis="y", color=GREY, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    bar = axes.figure.colorbar(drawn, ax=axes, label="times the median of the block", pad=0.02)
    bar.set_ticks([tick for tick in _TICKS if tick <= most], minor=False)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.minorticks_off()
