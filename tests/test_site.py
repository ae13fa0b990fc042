from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activemark_fast.backbone import Backbone
from activemark_fast.profile import Profile
from activemark_fast.site import Site, SiteError, place_site


def backbone(depth: int) -> Backbone:
    return SimpleNamespace(depth=depth, num_tokens=17, prefix_tokens=1, width=32)  # type: ignore[return-value]


def profile_with_rise(depth: int, rise: int | None) -> Profile:
    top = np.ones((depth, 5))
    massive: list[tuple[tuple[int, int], ...]] = [()] * depth
    if rise is not None:
        top[rise:] = 1000
        massive[rise:] = [((0, 7), (0, 9), (4, 7))] * (depth - rise)
    return Profile(top, np.ones(depth), tuple(massive))


@given(st.integers(3, 40), st.data())
def test_there_is_always_a_marked_block_and_the_last_tap_feeds_the_last_block(
    depth: int, data: st.DataObject
) -> None:
    rise = data.draw(st.none() | st.integers(1, depth - 1))
    asked = data.draw(st.none() | st.integers(0, depth - 3))
    site, reason = place_site(backbone(depth), profile_with_rise(depth, rise), asked)
    assert site.taps[-1] == depth - 2
    assert 0 <= site.block < site.taps[0]
    assert list(site.taps) == sorted(set(site.taps))
    assert len(site.taps) == (1 if depth - 2 - site.block < 2 else 2)
    assert f"block {site.block}" in reason
    if asked is not None:
        assert site.block == asked
        assert "asked" in reason


@pytest.mark.parametrize(
    ("depth", "rise", "block", "taps", "why"),
    [
        (12, 5, 5, (8, 10), "where massive activations emerge"),
        (24, 12, 12, (17, 22), "where massive activations emerge"),
        (12, None, 5, (8, 10), "no massive activations"),
        (12, 8, 8, (9, 10), "where massive activations emerge"),
        (12, 9, 5, (8, 10), "too late, after block 9"),
        (12, 11, 5, (8, 10), "too late, after block 11"),
        (3, None, 0, (1,), "no massive activations"),
        (4, 2, 1, (2,), "too late"),
    ],
)
def test_where_the_mark_goes(
    depth: int, rise: int | None, block: int, taps: tuple[int, ...], why: str
) -> None:
    site, reason = place_site(backbone(depth), profile_with_rise(depth, rise))
    assert (site.block, site.taps) == (block, taps)
    assert why in reason


def test_massive_places_are_those_at_the_block_of_the_mark() -> None:
    measured = profile_with_rise(12, 5)
    site, _ = place_site(backbone(12), measured)
    assert (site.massive_tokens, site.massive_channels) == ((0, 4), (7, 9))
    assert site.patch_tokens == [1, 2, 3, *range(5, 17)]
    early, _ = place_site(backbone(12), measured, 3)
    assert (early.massive_tokens, early.massive_channels) == ((), ())
    assert early.patch_tokens == list(range(1, 17))


def test_class_and_register_tokens_are_no_patches() -> None:
    assert Site(1, (2,), 10, 5, 32, (7,), ()).patch_tokens == [5, 6, 8, 9]


@pytest.mark.parametrize("block", [-1, 10, 11, 12, 100])
def test_a_block_without_room(block: int) -> None:
    with pytest.raises(SiteError, match=rf"^block: wanted 0 to 9 .*12 blocks.*, got {block}$"):
        place_site(backbone(12), profile_with_rise(12, None), block)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_model_without_room(depth: int) -> None:
    with pytest.raises(SiteError, match=f"^model: wanted at least 3 blocks .*, got {depth}$"):
        place_site(backbone(depth), profile_with_rise(depth, None))
