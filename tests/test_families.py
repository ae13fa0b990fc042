"""A few families of the table in docs/models.md; `benchmarks/families.py` makes all of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def families() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("families", BENCHMARKS / "families.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["families"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.parametrize(
    ("family", "tower", "refused"),
    [
        ("transformers VitDet", "", ""),
        ("transformers PaliGemma", "model.vision_tower", ""),
        ("timm gcvit_xxtiny", "", "further arguments do not depend on the image"),
        ("timm vgg11", "", "found none in VGG"),
    ],
)
def test_marked_and_verified_or_refused(families: ModuleType, family: str, tower: str, refused: str) -> None:
    row = families.run(family)
    assert refused in row.refused
    assert bool(row.refused) == bool(refused)
    if not refused:
        assert (row.tower, row.after_noise) == (tower, "match")
        assert row.innocent != "match"
        assert row.fidelity >= families.FIDELITY


def test_the_page_tells_what_came_of_each(families: ModuleType) -> None:
    rows = [families.Row("one", "no blocks"), families.Row("two", after_noise="match")]
    page = families.page(rows)
    assert "1 of 2 were" in " ".join(page.split())
    assert "| one | refused: no blocks |" in page
