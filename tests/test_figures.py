from __future__ import annotations

import math
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from tiny import profile_of

from activemark_fast.profiling import Profile
from activemark_fast.report import profile_figure, verdict_figure, verdicts_figure
from activemark_fast.site import Site
from activemark_fast.verdict import Decision, Verdict

BITS, TAU, ALPHA = 32, 5, 1e-6
SITE = Site(
    block=5,
    taps=(8, 10),
    num_tokens=65,
    prefix_tokens=1,
    width=128,
    massive_tokens=(0,),
    massive_channels=(93,),
)


def verdict_of(
    decision: Decision,
    errors: np.ndarray,
    p_value: float | None,
    reason: str = "because",
    codec: str = "keyed",
) -> Verdict:
    rate = float((errors <= TAU).mean()) if len(errors) else math.nan
    return Verdict(decision, reason, errors, BITS, TAU, rate, p_value, ALPHA, codec)


def at_chance(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).binomial(BITS, 0.5, 256)


def keyed_rows() -> list[tuple[str, Verdict]]:
    return [
        ("marked", verdict_of("match", np.zeros(256, dtype=np.int64), 5.4e-20)),
        ("marked, fine-tuned", verdict_of("match", np.arange(256) % 9, 3e-17)),
        ("half forgotten", verdict_of("inconclusive", np.arange(256) % 30, 5e-5)),
        ("broken", verdict_of("inconclusive", np.zeros(0, dtype=np.int64), None)),
        ("a stranger's", verdict_of("no match", at_chance(0), 0.37)),
        ("$original", verdict_of("no match", at_chance(1), 1.0)),
    ]


@pytest.fixture
def profile() -> Profile:
    values = np.full((13, 4, 5), 8.0) - np.arange(5)
    values[6:11, :, 0] = 170.0
    return profile_of(values, np.linspace(0.8, 1.5, 13))


def drawn(figure: Figure) -> Figure:
    FigureCanvasAgg(figure).draw()
    return figure


def texts_of(axes: Axes) -> list[Text]:
    texts = [child for child in axes.get_children() if isinstance(child, Text)]  # titles included
    if axes.axison:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [axis.label, *(label for tick in ticks for label in (tick.label1, tick.label2))]
    legend = axes.get_legend()
    texts += legend.get_texts() if legend else []
    return [text for text in texts if text.get_text() and text.get_visible()]


def bars_of(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def assert_legible(figure: Figure) -> None:
    """No two texts overlap, and none leaves the picture."""
    boxes = [(text, text.get_window_extent()) for axes in figure.axes for text in texts_of(axes)]
    for i, (text, box) in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
        for other, other_box in boxes[i + 1 :]:
            overlap = box.overlaps(other_box)
            assert not overlap, f"{text.get_text()!r} lies over {other.get_text()!r}"


def test_verdicts_figure_is_legible(profile: Profile) -> None:
    assert_legible(drawn(verdicts_figure(keyed_rows(), profile, SITE)))


def test_verdicts_figure_shows_site_taps_tau_alpha(profile: Profile) -> None:
    left, middle, right = verdicts_figure(keyed_rows(), profile, SITE).axes
    upright = [
        {x[0] for x in (np.asarray(line.get_xdata()) for line in axes.lines) if len(set(x)) == 1}
        for axes in (left, middle, right)
    ]
    assert upright[0] == {5, 8, 10}
    assert upright[1] == {TAU + 0.5, BITS / 2}
    assert list(upright[2]) == pytest.approx([6.0])
    assert left.get_yscale() == "log"
    heights = {tuple(np.asarray(line.get_ydata())) for line in left.lines}
    assert all(tuple(profile.top[:, rank]) in heights for rank in range(5))
    assert tuple(profile.median) in heights


def test_verdicts_figure_shows_every_verdict(profile: Profile) -> None:
    rows = keyed_rows()
    _, middle, right = verdicts_figure(rows, profile, SITE).axes
    assert [label.get_text() for label in middle.get_yticklabels()] == [name for name, _ in rows]
    assert [label.get_text() for label in right.get_yticklabels()] == [v.decision for _, v in rows]
    lengths = [bar.get_width() for bar in bars_of(right)]
    assert lengths == pytest.approx([0.0 if v.p_value is None else -math.log10(v.p_value) for _, v in rows])
    shown = [text.get_text() for text in middle.texts]
    for _, verdict in rows:
        assert (f"R = {verdict.detection_rate:.3f}" if verdict.images else "not read") in shown


def test_bars_are_shares_of_images(profile: Profile) -> None:
    rows = keyed_rows()
    middle = verdicts_figure(rows, profile, SITE).axes[1]
    bars = np.array([abs(bar.get_height()) for bar in bars_of(middle)]).reshape(len(rows), BITS + 1)
    for drawn_row, (_, verdict) in zip(bars, rows, strict=True):
        counts = np.bincount(verdict.bit_errors, minlength=BITS + 1)
        assert drawn_row * counts.max() == pytest.approx(drawn_row.max() * counts)


def test_learned_codec_has_no_p_values(profile: Profile) -> None:
    rows = [
        ("a", verdict_of("match", np.zeros(64, dtype=np.int64), None, codec="learned")),
        ("b", verdict_of("no match", at_chance(2), None, codec="learned")),
    ]
    figure = drawn(verdicts_figure(rows, profile, SITE))
    right = figure.axes[2]
    assert not right.patches
    assert any("no exact test" in text.get_text() for text in right.texts)
    assert_legible(figure)
    drawn(verdict_figure(rows[0][1]))


def test_verdicts_figure_refuses_no_rows(profile: Profile) -> None:
    with pytest.raises(ValueError, match="rows: wanted at least one"):
        verdicts_figure([], profile, SITE)


@pytest.mark.parametrize("name", ["marked", "half forgotten", "a stranger's"])
def test_verdict_figure_compares_with_fair_coins(name: str) -> None:
    verdict = dict(keyed_rows())[name]
    figure = drawn(verdict_figure(verdict))
    (axes,) = figure.axes
    counts = [bar.get_height() for bar in bars_of(axes)]
    assert counts == list(np.bincount(verdict.bit_errors, minlength=BITS + 1))
    coins, threshold = axes.lines
    expected = np.asarray(coins.get_ydata())
    assert expected.sum() == pytest.approx(verdict.images)
    assert expected.argmax() == BITS // 2
    assert expected[16] == pytest.approx(256 * math.comb(32, 16) / 2**32)
    assert set(np.asarray(threshold.get_xdata())) == {TAU + 0.5}
    title = axes.get_title("left")
    assert title.startswith(verdict.decision.upper())
    assert f"{verdict.p_value:.2g}" in title
    assert_legible(figure)


def test_verdict_figure_of_an_unreadable_suspect() -> None:
    reason = r"the suspect has NaN or infinite weights in '$\frac{$ of a hostile file', " + "a long name " * 8
    figure = drawn(verdict_figure(verdict_of("inconclusive", np.zeros(0, dtype=np.int64), None, reason)))
    (axes,) = figure.axes
    assert re.sub(r"\s+", " ", axes.get_title("left")) == f"INCONCLUSIVE: {reason.strip()}"
    assert not axes.patches
    assert_legible(figure)


def test_a_hostile_suspect_name_is_text(profile: Profile) -> None:
    rows = [(r"$\frac{$", keyed_rows()[0][1])]
    drawn(verdicts_figure(rows, profile, SITE))


PROFILES = {
    "massive at one place": [1.0] * 6 + [150.0] * 7,
    "massive nowhere": [1.0] * 13,
    "massive too late": [1.0] * 12 + [3e6],
    "24 blocks": [1.0] * 12 + [300.0] * 13,
    "zeros": [0.0] * 4,
    "not finite": [np.nan] * 5,
}


@pytest.mark.parametrize("name", PROFILES)
def test_profile_figure_is_legible(name: str) -> None:
    measured = profile_of(PROFILES[name], medians=0.8)
    assert_legible(drawn(profile_figure(measured, measured.site())))


def test_profile_figure_shows_curves_site_and_places(profile: Profile) -> None:
    placement = profile.site()
    figure = drawn(profile_figure(profile, placement))
    curves, places = figure.axes[:2]
    heights = {tuple(np.asarray(line.get_ydata())) for line in curves.lines}
    assert all(tuple(profile.top[:, rank]) in heights for rank in range(5))
    assert tuple(profile.median) in heights
    for axes in (curves, places):
        upright = {line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1}
        assert placement.site.block == 5
        assert placement.site.block in upright
    assert [label.get_text() for label in places.get_yticklabels()] == ["class token, channel 7"]
    (dots,) = places.collections
    assert dots.get_offsets().tolist() == [[block, 0] for block in range(5, 10)]
    times = [profile.ratio[block, 0] for block in range(5, 10)]
    assert np.asarray(dots.get_array()) == pytest.approx(times)
    assert placement.reason in figure.get_suptitle().replace("\n", " ")


def test_profile_figure_shows_the_most_frequent_places_and_counts_all() -> None:
    places = [(token, 3) for token in range(17)] + [(token, 9) for token in range(3)]
    values = np.ones((7, 5, 20))
    values[3:] = 100
    values[3:, 2:, :4] = 1  # these in two images of five
    measured = profile_of(values, places=places)
    figure = drawn(profile_figure(measured, measured.site()))
    places_axes = figure.axes[1]
    names = [label.get_text() for label in places_axes.get_yticklabels()]
    assert len(names) == 16
    assert "class token, channel 3" not in names
    assert "16 most frequent of 20" in places_axes.get_title("left")
    assert_legible(figure)


def test_no_pyplot_and_no_matplotlib_without_report() -> None:
    script = (
        "import sys; import activemark_fast.cli; assert 'matplotlib' not in sys.modules; "
        "import activemark_fast.report; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
