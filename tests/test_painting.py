from __future__ import annotations

from typing import Any

import numpy as np
import painting_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activemark_fast import synthetic
from activemark_fast.key import Key
from activemark_fast.ops.native import load_native
from activemark_fast.ops.paint import Octave, paint_clouds, paint_leaves
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
    image = paint_leaves(torch.from_numpy(discs), [], (h, w)).numpy()
    x, y, r = discs[:, :3].T
    np.testing.assert_array_equal(image[0], reference.seen_discs(x, y, r, (h, w)))


DISCS = torch.ones(3, 9, dtype=torch.float64)


def field(channels: int, size: tuple[int, int]) -> list[Octave]:
    """Two octaves."""
    (h, w), shift = size, 1
    shapes = [(channels, h + 1, w + 1), (channels, (h - 1 + shift) // 2 + 2, (w - 1 + shift) // 2 + 2)]
    lattices = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    return [Octave(lattices[0], 0, 0), Octave(lattices[1], shift, shift)]


def test_registration() -> None:
    axes = ((85.0, 60.0), (0.0, 15.0), (0.0, 15.0))
    leaves, clouds = field(1, (8, 9)), field(3, (8, 9))
    assert paint_leaves(DISCS, leaves, (8, 9)).shape == paint_clouds(clouds, 1.5, *axes, (8, 9)).shape
    shifts = [0, 0, 1, 1]
    operators = torch.ops.activemark_fast
    for operator, arguments in (
        (operators.paint_leaves, (DISCS, [octave.lattice for octave in leaves], shifts, 8, 9)),
        (operators.paint_clouds, ([octave.lattice for octave in clouds], shifts, 1.5, *axes, 8, 9)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_layouts() -> None:
    texture = field(1, (8, 8))
    expected = paint_leaves(DISCS, texture, (8, 8))
    turned = [octave._replace(lattice=octave.lattice.mT.contiguous().mT) for octave in texture]
    assert torch.equal(paint_leaves(DISCS.T.contiguous().T, turned, (8, 8)), expected)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"discs": DISCS.float()}, TypeError, r"discs: wanted torch\.float64, got torch\.float32"),
        ({"discs": DISCS[:, :8]}, ValueError, r"discs: wanted the shape \(any, 9\), got \(3, 8\)"),
        ({"discs": DISCS[:0]}, ValueError, r"discs: wanted the shape \(any, 9\), got \(0, 9\)"),
        ({"discs": DISCS.to("meta")}, ValueError, "discs: wanted a tensor on cpu, got one on meta"),
        ({"size": (0, 8)}, ValueError, r"size: wanted \(h, w\), each at least 1, got \(0, 8\)"),
        ({"texture": field(3, (8, 8))}, ValueError, r"texture\[0\]\.lattice: wanted the shape \(1, 9, 9\)"),
        ({"texture": field(1, (8, 9))}, ValueError, r"texture\[0\]\.lattice: wanted .*, got \(1, 9, 10\)"),
        ({"texture": field(1, (8, 8))[1:]}, ValueError, r"texture\[0\]: wanted shifts in 0 \.\.\. 0, got"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paint_leaves(**{"discs": DISCS, "texture": [], "size": (8, 8)} | bad)


def test_clouds_of_nothing() -> None:
    with pytest.raises(ValueError, match="field: wanted at least one octave"):
        paint_clouds([], 1.0, (0, 1), (0, 1), (0, 1), (8, 8))


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
        with pytest.raises(ValueError, match="wanted height and width in"):
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
