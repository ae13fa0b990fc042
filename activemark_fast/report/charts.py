"""Charts of the evidence page, as SVG: text stays text, so that numbers can be selected and found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from markupsafe import Markup

from activemark_fast.profiling import Profile
from activemark_fast.site import Site

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 410, 34, 206


def error_histogram(suspect: Sequence[int], innocent: Sequence[float], tau: int, innocents: str) -> Markup:
    """Wrong bits of every image: the suspect's as bars, those of innocent models as a dotted outline.

    Args:
        suspect: (bits + 1) images with 0, 1, … wrong bits.
        innocent: (bits + 1) the same of innocent models, in any unit.
        tau: most wrong bits of a detected image.
        innocents: what the innocents are, for the legend.
    """
    bits = len(suspect) - 1
    shares = [count / max(sum(suspect), 1) for count in suspect]
    expected = [count / max(sum(innocent), 1e-300) for count in innocent]
    most = max(*shares, *expected)
    step = (_RIGHT - _LEFT) / (bits + 1)

    def x(errors: float) -> float:
        return _LEFT + step * errors

    def y(share: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * share / most

    bars = [
        f'<rect x="{x(k) + 0.1 * step:.1f}" y="{y(share):.1f}" width="{0.8 * step:.1f}" '
        f'height="{_BOTTOM - y(share):.1f}" class="suspect"><title>{k} wrong: {share:.1%}</title></rect>'
        for k, share in enumerate(shares)
        if share > 0
    ]
    outline = f"M{x(0):.1f} {_BOTTOM}" + "".join(
        f"V{y(share):.1f}H{x(k + 1):.1f}" for k, share in enumerate(expected)
    )
    limit = x(tau + 1)
    parts = [
        *bars,
        f'<path d="{outline}V{_BOTTOM}" class="innocent"/>',
        f'<path d="M{limit:.1f} {_TOP}V{_BOTTOM}" class="limit"/>',
        _text(limit + 4, _TOP + 10, f"detected: at most {tau} wrong"),
        *(_text(x(k + 0.5), _BOTTOM + 14, str(k), "middle") for k in range(0, bits + 1, max(bits // 8, 1))),
        *(_text(_LEFT - 4, y(s) + 4, f"{s:.0%}", "end") for s in (0, most / 2, most)),
        _text((_LEFT + _RIGHT) / 2, _BOTTOM + 32, f"wrong bits of {bits}", "middle"),
        _text(4, 12, "share of the images"),
        '<rect x="150" y="4" width="12" height="9" class="suspect"/>',
        _text(166, 12, "suspect"),
        '<path d="M226 9h16" class="innocent"/>',
        _text(246, 12, innocents),
    ]
    return _svg("Wrong bits of every image: the suspect and innocent models", parts)


def profile_chart(profile: Profile, site: Site) -> Markup:
    """Largest and median |activation| after every block, with the site and the taps."""
    largest, median = profile.top[:, 0], profile.median
    positive = np.concatenate([largest, median])
    positive = positive[positive > 0]
    low, high = math.floor(np.log10(positive.min())), math.ceil(np.log10(positive.max()))
    high = max(high, low + 1)
    step = (_RIGHT - _LEFT) / max(len(median) - 1, 1)

    def x(block: int) -> float:
        return _LEFT + step * block

    def y(value: float) -> float:
        place = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return _BOTTOM - (_BOTTOM - _TOP) * place

    def line(values: np.ndarray, name: str) -> str:
        points = " ".join(f"{x(block):.1f},{y(float(value)):.1f}" for block, value in enumerate(values))
        return f'<polyline points="{points}" class="{name}"/>'

    every = max(math.ceil(len(median) / 12), 1)
    parts = [
        *(
            f'<path d="M{_LEFT} {y(10.0**power):.1f}H{_RIGHT}" class="grid"/>'
            + _text(_LEFT - 4, y(10.0**power) + 4, f"{10.0**power:g}", "end")
            for power in range(low, high + 1)
        ),
        f'<path d="M{x(site.block):.1f} {_TOP}V{_BOTTOM}" class="site"/>',
        _text(x(site.block), _TOP - 4, "written", "middle"),
        *(f'<path d="M{x(tap):.1f} {_TOP}V{_BOTTOM}" class="limit"/>' for tap in site.taps),
        *(_text(x(tap), _TOP - 4, "read", "middle") for tap in site.taps),
        line(largest, "largest"),
        line(median, "median"),
        *(_text(x(b), _BOTTOM + 14, str(b), "middle") for b in range(0, len(median), every)),
        _text((_LEFT + _RIGHT) / 2, _BOTTOM + 32, "block, counted from 0", "middle"),
        '<path d="M110 9h16" class="largest"/>',
        _text(130, 12, "largest |activation|"),
        '<path d="M268 9h16" class="median"/>',
        _text(288, 12, "median"),
    ]
    return _svg("Activation profile: largest and median value after every block", parts)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
