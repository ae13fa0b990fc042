from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import profile_of

from activemark_fast.block_choice import RULES
from activemark_fast.profiling import Profile
from activemark_fast.site import Site, SiteError


def profile_with_rise(depth: int, rise: int | None) -> Profile:
    largest = np.ones(depth + 1)
    if rise is not None:
        largest[rise + 1 :] = 1000
    return profile_of(largest, places=((0, 7), (0, 9), (4, 7)))


@given(st.integers(3, 40), st.sampled_from(sorted(RULES)), st.data())
def test_there_is_always_a_marked_block_and_the_last_tap_feeds_the_last_block(
    depth: int, rule: str, data: st.DataObject
) -> None:
    rise = data.draw(st.none() | st.integers(0, depth - 1))
    asked = data.draw(st.none() | st.integers(0, depth - 3))
    placement = profile_with_rise(depth, rise).site(rule, block=asked)
    site = placement.site
    assert site.taps[-1] == depth - 2
    assert 0 <= site.block < site.taps[0]
    assert list(site.taps) == sorted(set(site.taps))
    assert len(site.taps) == (1 if depth - 2 - site.block < 2 else 2)
    assert f"block {site.block}" in placement.reason
    assert placement.emergence == rise
    assert placement.agreement == 1
    if asked is not None:
        assert site.block == asked
        assert "asked" in placement.reason


@pytest.mark.parametrize("rule", ["paper", "reference"])
@pytest.mark.parametrize(
    ("depth", "rise", "block", "taps", "why"),
    [
        (12, 0, 0, (5, 10), "where massive activations emerge"),
        (12, 5, 5, (8, 10), "where massive activations emerge"),
        (24, 12, 12, (17, 22), "where massive activations emerge"),
        (12, None, 5, (8, 10), "no massive activations"),
        (12, 8, 8, (9, 10), "where massive activations emerge"),
        (12, 9, 5, (8, 10), "after block 9, too late"),
        (12, 11, 5, (8, 10), "after block 11, too late"),
        (3, None, 0, (1,), "no massive activations"),
        (4, 2, 1, (2,), "too late"),
    ],
)
def test_where_the_mark_goes(
    depth: int, rise: int | None, block: int, taps: tuple[int, ...], why: str, rule: str
) -> None:
    placement = profile_with_rise(depth, rise).site(rule)
    assert (placement.site.block, placement.site.taps) == (block, taps)
    assert why in placement.reason
    times = "at most 1 times" if rise is None else "1000 times"
    assert placement.reason.endswith(f"({times} the median; 2 of 2 images agree)")


@pytest.mark.parametrize(
    ("depth", "rise", "block", "taps", "why"),
    [
        (12, None, 8, (9, 10), "two taps: the model has no massive activations"),
        (12, 5, 8, (9, 10), "two taps: massive activations emerge after block 5"),
        (12, 8, 8, (9, 10), "after block 8"),
        (12, 9, 5, (8, 10), "the middle: massive activations emerge after block 9, too late"),
        (24, 12, 20, (21, 22), "after block 12"),
        (3, None, 0, (1,), "no massive activations"),
    ],
)
def test_the_late_rule(depth: int, rise: int | None, block: int, taps: tuple[int, ...], why: str) -> None:
    placement = profile_with_rise(depth, rise).site("late")
    assert (placement.site.block, placement.site.taps) == (block, taps)
    assert placement.emergence == rise
    assert why in placement.reason


@pytest.mark.parametrize(
    ("largest", "medians", "paper", "reference"),
    [
        ([1, 1, 1, 1, 1], 0.5, None, None),
        ([1, 1, 1, 100, 100], 0.5, 2, 2),
        ([1, 1, 1, 100, 1000], 0.5, 2, 3),  # the first rise, the largest jump
        ([1, 1, 10, 100, 100], 0.5, 2, 2),  # 10 is a rise, but not massive
        ([1, 1, 30, 80, 81], 1.0, None, 2),  # massive, but by small steps
        ([100, 100, 100, 100, 100], 0.5, None, None),  # massive from the start: nothing rises
        ([1, 100, 100, 100, 100], 0.5, 0, 0),
        ([1, 1, 1, 2.9, 50], 0.5, 3, 3),
        ([1, 1, 1, 1, 150], 3.0, 3, 3),
        ([1, 1, 1, 1, 149], 3.0, None, None),
        ([np.nan, 1, np.nan, 1, 100], 1.0, 3, 3),
        ([np.nan] * 5, np.nan, None, None),
    ],
)
def test_rules(largest: list[float], medians: float, paper: int | None, reference: int | None) -> None:
    measured = profile_of(largest, medians)
    assert measured.site("paper").emergence == paper
    assert measured.site("reference").emergence == reference


def test_reasons_of_a_fallback_differ() -> None:
    assert "there before block 0" in profile_of([100, 100, 100, 100, 100]).site().reason
    assert "without a sharp rise" in profile_of([1, 1, 30, 80, 81]).site().reason


def test_agreement_is_the_share_of_images_that_say_the_same() -> None:
    values = np.ones((7, 4, 5))
    values[3:, :3] = 900  # after block 2, in three images
    values[4:, 3] = 900  # in the fourth one block later
    placement = profile_of(values).site()
    assert placement.emergence == 2
    assert placement.agreement == 0.75
    assert "3 of 4 images" in placement.reason


def test_massive_places_are_those_at_the_block_of_the_mark() -> None:
    measured = profile_with_rise(12, 5)
    site = measured.site().site
    assert (site.massive_tokens, site.massive_channels) == ((0, 4), (7, 9))
    assert site.patch_tokens == [1, 2, 3, *range(5, 17)]
    early = measured.site(block=3).site
    assert (early.massive_tokens, early.massive_channels) == ((), ())
    assert early.patch_tokens == list(range(1, 17))


def test_class_and_register_tokens_are_no_patches() -> None:
    assert Site(1, (2,), 10, 5, 32, (7,), ()).patch_tokens == [5, 6, 8, 9]


@pytest.mark.parametrize("block", [-1, 10, 11, 12, 100])
def test_a_block_without_room(block: int) -> None:
    with pytest.raises(SiteError, match=rf"^block: wanted 0 to 9 .*12 blocks.*, got {block}$"):
        profile_with_rise(12, None).site(block=block)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_model_without_room(depth: int) -> None:
    with pytest.raises(SiteError, match=f"^model: wanted at least 3 blocks .*, got {depth}$"):
        profile_with_rise(depth, None).site()


@pytest.mark.parametrize("block", ["3", 3.0, True])
def test_a_block_of_another_type(block: object) -> None:
    with pytest.raises(TypeError, match=r"^block: wanted int, got "):
        profile_with_rise(6, 2).site(block=block)  # type: ignore[arg-type]


def test_an_unknown_rule() -> None:
    with pytest.raises(
        ValueError, match=r"^rule: wanted one of \['late', 'paper', 'reference'\], got 'best'$"
    ):
        profile_with_rise(6, 2).site("best")
