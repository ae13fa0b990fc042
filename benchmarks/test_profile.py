"""What profiling adds to a forward pass: `make bench`.

The model is a ViT-B/16 of 224 x 224 images with random weights, which takes the same time as trained ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import timm
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from activemark_fast.backbone import Backbone
from activemark_fast.profiling import KEPT, measure

IMAGES, ROUNDS = 8, 5


@torch.no_grad()
def processor_seconds(run: Callable[[], object]) -> float:
    """Of all threads: what else runs on the machine does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_profile_over_a_bare_forward_pass(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=0).eval().to(dtype)
    images = torch.randn(IMAGES, 3, 224, 224).to(dtype)
    finding = processor_seconds(lambda: Backbone(model))
    backbone = Backbone(model)
    assert measure(backbone, images).top.shape == (12, KEPT)
    bare: list[float] = []
    profiled: list[float] = []

    def both() -> None:
        bare.append(processor_seconds(lambda: model(images)))
        profiled.append(processor_seconds(lambda: measure(backbone, images)))

    benchmark.pedantic(both, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["overhead %"] = round(100 * (min(profiled) / min(bare) - 1), 2)
    benchmark.extra_info["finding the blocks, in images"] = round(finding / min(bare) * IMAGES, 1)
