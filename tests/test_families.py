"""A few families of the table in docs/models.md; `benchmarks/families.py` makes all of it."""

from __future__ import annotations

from types import ModuleType

import pytest
from benchmark_module import benchmark_module


@pytest.fixture(scope="module")
def families() -> ModuleType:
    return benchmark_module("families")


@pytest.mark.parametrize(
    ("family", "tower", "refused"),
    [
        ("transformers VitDet", "", ""),
        ("transformers PaliGemma", "model.vision_tower", ""),
        ("transformers MllamaVision", "", ""),
        ("transformers MiniCPMV4_7Vision", "", ""),
        ("transformers PaddleOCRVision", "", ""),
        ("transformers SegGpt", "", "it wants prompt_pixel_values, prompt_masks too"),
        ("transformers Vilt", "", "takes token ids, and images only beside them"),
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
    rows = [
        families.Row("one", refused="no blocks"),
        families.Row("two", failed="TypeError: nothing"),
        families.Row("transformers Llava", decision="match", after_noise="match", innocent="no match"),
        families.Row("three", decision="no match", innocent="match"),
    ]
    page = families.page(rows)
    for line in (
        "| families | 4 |",
        "| marked, and the mark found by `verify` | 1 |",
        "| refused in one sentence, before anything was handed out | 1 |",
        "| crashed, or marked and not found | 2 |",
        "| innocents of the same family that were accused | 1 |",
        "1 of 20 are marked and found.",
        "| one | refused: no blocks |",
        "| two | FAILED: TypeError: nothing |",
        "| LLaVA (CLIP): transformers Llava | the model |",
        "| ViT: timm vit_tiny_patch16_224 | not run |",
    ):
        assert line in page


def test_the_most_used_are_among_the_families(families: ModuleType) -> None:
    used = {**families.BACKBONES, **families.VLM_TOWERS}
    assert len(used) == 20
    assert set(used.values()) <= set(families.FAMILIES)
