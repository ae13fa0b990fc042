from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmark_module import benchmark_module
from PIL import Image

from activemark_fast import photographs
from activemark_fast.photographs import Photographs, shipped_photographs

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "activemark_fast" / "assets"


@pytest.fixture(scope="module")
def shipped() -> Photographs:
    return shipped_photographs()


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return benchmark_module("photographs")


def test_hundreds_of_crops_in_little_space(shipped: Photographs) -> None:
    count = len(shipped.images)
    assert count >= 384
    assert shipped.images.shape == (count, 3, 224, 224)
    assert shipped.images.dtype == torch.uint8
    assert shipped.images.is_contiguous()
    assert shipped.sources.shape == (count,)
    assert shipped.sources.dtype == torch.int64
    assert (ASSETS / "photographs.npz").stat().st_size <= 4_000_000


def test_no_crop_is_flat(shipped: Photographs) -> None:
    assert shipped.images.float().std((1, 2, 3)).min() > 20


def test_crops_of_different_sources_are_different(shipped: Photographs) -> None:
    grey = F.interpolate(shipped.images.float().mean(1, keepdim=True), size=32, mode="area").flatten(1)
    grey = F.normalize(grey - grey.mean(1, keepdim=True))
    alike = grey @ grey.T
    alike[shipped.sources[:, None] == shipped.sources] = 0
    assert alike.max() < 0.95


def test_any_part_of_the_list_holds_many_sources(shipped: Photographs) -> None:
    sources = shipped.sources
    assert (sources[1:] != sources[:-1]).all()
    for start in range(0, len(sources) - 64, 16):
        assert len(set(sources[start : start + 64].tolist())) >= 56
    for step in (2, 3, 4, 6):
        assert len(set(sources[::step].tolist())) >= 0.75 * len(sources[::step])


def test_every_source_is_named_with_its_licence(shipped: Photographs) -> None:
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in (ASSETS / "PHOTOGRAPHS.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and line[2].isdigit()
    ]
    assert [int(line[0]) for line in lines] == list(range(len(lines)))
    assert set(shipped.sources.tolist()) == set(range(len(lines)))
    for _, title, author, licence, package, file, _ in lines:
        assert all((title, author, package, file))
        assert licence in {"public domain", "CC0-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0"}
        assert licence in {"public domain", "CC0-1.0"} or author != "not named"


def test_without_the_archive_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "_ARCHIVE", tmp_path / "photographs.npz")
    with pytest.raises(FileNotFoundError, match=r"photographs\.npz.*install it again"):
        shipped_photographs.__wrapped__()  # it is kept once it was read


def test_the_table_makes_the_list(shipped: Photographs, maker: ModuleType) -> None:
    table = maker.read_table((ASSETS / "PHOTOGRAPHS.md").read_text(encoding="utf-8"))
    listed = maker.order([len(source.scales) for source in table])
    assert shipped.sources.tolist() == [source for source, _ in listed]
    assert len(set(listed)) == len(listed)


def test_parts_are_cut_where_there_is_something_and_apart(maker: ModuleType) -> None:
    pixels = np.zeros((1000, 1400, 3), dtype=np.uint8)
    pixels[:500, 900:] = np.random.default_rng(0).integers(0, 256, (500, 500, 3))  # in the right upper corner
    whole, half, quarter = maker.cut(Image.fromarray(pixels), (1, 2, 4))
    assert {crop.size for crop in (whole, half, quarter)} == {(224, 224)}
    assert np.asarray(half).std() > 20
    assert np.asarray(half)[:, 112:].max() > 0
    assert np.asarray(quarter).max() < np.asarray(half).max()  # all that there is was in the half
    with pytest.raises(ValueError, match="too small for 1/4"):
        maker.cut(Image.fromarray(pixels[:400]), (1, 4))
