from __future__ import annotations

from typing import Any

import numpy as np
import painting_reference as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activemark_fast import synthetic
from activemark_fast.key import Key
from activemark_fast.ops.native import load_native
from activemark_fast.synthetic import synthetic_images


def assert_paints_the_reference(key: Key, count: int, size: tuple[int, int]) -> None:
    images = synthetic_images(key.stream("test"), count, size).numpy()
    expected = reference.synthetic_images(key.stream("test"), count, size)
    for index, (image, wanted) in enumerate(zip(images, expected, strict=True)):
        np.testing.assert_array_equal(image, wanted, err_msg=f"image {index} of {size}")


@pytest.mark.parametrize(
    ("size", "seeds", "count"),
    [((8, 8), 64, 8), ((32, 32), 32, 8), ((33, 57), 32, 8), ((224, 224), 3, 8), ((336, 336), 1, 8)],
)
def test_images_are_the_reference_to_the_bit(size: tuple[int, int], seeds: int, count: int) -> None:
    for seed in range(seeds):
        assert_paints_the_reference(Key(seed.to_bytes(16, "little")), count, size)


@given(st.integers(8, 150), st.integers(8, 150), st.binary(min_size=16, max_size=16))
@settings(max_examples=50)
def test_images_of_any_size_are_the_reference_to_the_bit(h: int, w: int, material: bytes) -> None:
    assert_paints_the_reference(Key(material), 4, (h, w))


def test_images_in_excess_of_those_in_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "IMAGES_IN_WORK", 3)
    assert_paints_the_reference(Key(bytes(16)), 8, (11, 10))


# Eighths are exact, so there are pixels which lie just on a circle.
eighths = st.integers(-80, 320).map(lambda value: value / 8)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.tuples(eighths, eighths, eighths.map(abs)), min_size=1, max_size=250),
)
def test_discs_hide_one_another_as_in_the_reference(
    h: int, w: int, circles: list[tuple[float, float, float]]
) -> None:
    discs = np.zeros((len(circles), 9))
    discs[:, :3] = circles
    discs[:, 3] = np.arange(len(circles))  # the lightness of each is its index
    image = np.empty((3, h, w), dtype=np.uint8)
    load_native().paint_leaves(
        height=h,
        width=w,
        discs=discs.ctypes.data,
        disc_count=len(discs),
        octaves=[],
        image=image.ctypes.data,
    )
    x, y, r = discs[:, :3].T
    np.testing.assert_array_equal(image[0], reference.seen_discs(x, y, r, (h, w)))


LEAVES: dict[str, Any] = {"height": 8, "width": 8, "discs": 0, "disc_count": 1, "octaves": [], "image": 0}
CLOUDS: dict[str, Any] = {
    "height": 8,
    "width": 8,
    "octaves": [(0, 0, 0)],
    "gain": 1,
    "lightness": (0, 1),
    "yellow": (0, 1),
    "red": (0, 1),
    "image": 0,
}


@pytest.mark.parametrize(
    "bad",
    [
        {"height": 0},
        {"width": -1},
        {"height": 2**24 + 1},
        {"octaves": [(0, 0, 0)] * 33},
        {"octaves": [(0, 1, 0)]},
        {"octaves": [(0, 0, 0), (0, 0, 2)]},
        {"octaves": [(0, 0, 0), (0, -1, 0)]},
    ],
)
def test_binding_refuses_bad_sizes(bad: dict[str, Any]) -> None:
    for paint, arguments in (("paint_leaves", LEAVES), ("paint_clouds", CLOUDS)):
        with pytest.raises(ValueError, match="height and width must be"):
            getattr(load_native(), paint)(**arguments | bad)


def test_binding_refuses_no_discs_and_no_octaves() -> None:
    with pytest.raises(ValueError, match="discs"):
        load_native().paint_leaves(**LEAVES | {"disc_count": 0})
    with pytest.raises(ValueError, match="octaves"):
        load_native().paint_clouds(**CLOUDS | {"octaves": []})


def test_binding_reports_lack_of_memory() -> None:
    for paint, arguments in (("paint_leaves", LEAVES), ("paint_clouds", CLOUDS)):
        with pytest.raises(MemoryError):
            getattr(load_native(), paint)(**arguments | {"height": 2**24, "width": 2**24})
