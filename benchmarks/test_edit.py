"""The closed-form edit: seconds, and its FLOP/s over a large matrix product's.

    python -m pytest benchmarks/test_edit.py --benchmark-only

The same work as in `embed` with its defaults: 192 images, two messages each, in bf16 on a GPU. What it does
beside matrix products and attention (norms, copies, the solves) takes time and counts for nothing.
"""

from __future__ import annotations

import pytest
import torch
from measure import flops_of, matmul_flops, synchronise
from pytest_benchmark.fixture import BenchmarkFixture
from test_embed_minutes import DEVICE, KEY, MODELS

from activemark_fast.backbone import Backbone
from activemark_fast.codec.codebooks import MEASURED_IMAGES, SiteMeasure, codebooks
from activemark_fast.codec.passive import passive_rows
from activemark_fast.key import Key
from activemark_fast.marking.edit import edit, edit_steps
from activemark_fast.marking.engine import plan_engine
from activemark_fast.marking.subject import FITTED_IMAGES, HELD_IMAGES, MESSAGES_PER_IMAGE
from activemark_fast.marking.suffix import site_activations
from activemark_fast.profiling import measure
from activemark_fast.progress import Progress


@pytest.mark.parametrize("name", ["demo", "ViT-B/32", pytest.param("ViT-L/14", marks=pytest.mark.gpu)])
def test_edit(benchmark: BenchmarkFixture, quick: bool, name: str) -> None:
    if quick and name != "demo":
        pytest.skip("--quick")
    torch.manual_seed(0)
    backbone, secret = Backbone(MODELS[name][0]().to(DEVICE)), Key(KEY)
    pixels = torch.randn(FITTED_IMAGES, 3, *backbone.image_size)
    site = measure(backbone, pixels[:8]).site().site
    engine = plan_engine(
        backbone,
        site,
        "auto",
        0,
        pixels.nbytes,
        FITTED_IMAGES,
        HELD_IMAGES,
        MEASURED_IMAGES,
        3,
        32,
        MESSAGES_PER_IMAGE,
    )
    output = site_activations(backbone, pixels, site.block, engine.autocast).output
    measured = SiteMeasure.of(output, site.prefix_tokens)
    books = [book.to(DEVICE) for book in codebooks(secret.stretched(), site, 32, measured)]
    sent = [torch.randint(0, 2, (len(output[i :: len(books)]), 32), device=DEVICE) for i in range(len(books))]
    passive, steps = passive_rows(secret.stretched(), site), edit_steps(backbone, site)
    weights = [step.matrix.clone() for step in steps]

    def restored() -> None:
        with torch.no_grad():
            for step, weight in zip(steps, weights, strict=True):
                step.matrix.copy_(weight)

    def run() -> None:
        edit(backbone, books, passive, steps, output, sent, engine, Progress(False))
        synchronise(DEVICE)

    rate = matmul_flops(DEVICE)
    benchmark.pedantic(run, setup=restored, rounds=3, warmup_rounds=1)
    rate = max(rate, matmul_flops(DEVICE))
    restored()
    flops = flops_of(run)
    benchmark.extra_info.update(
        {
            "steps": len(steps),
            "images at a time": engine.batch,
            "TFLOP": round(flops / 1e12, 2),
            "FLOP/s over a matmul's": round(flops / benchmark.stats["min"] / rate, 2),
        }
    )
