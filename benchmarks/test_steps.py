"""Gradient steps of the learned codec, eager and in the other ways of `embed(compile=...)`.

Seconds a step, and before the first:

python -m pytest benchmarks/test_steps.py --benchmark-only
"""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
from measure import flops_of, matmul_flops, synchronise
from pytest_benchmark.fixture import BenchmarkFixture
from test_embed_minutes import DEVICE, KEY, MODELS

from activemark_fast.backbone import Backbone
from activemark_fast.codec import CODECS
from activemark_fast.key import Key
from activemark_fast.marking.finetune import finetune
from activemark_fast.marking.suffix import final_features, site_activations
from activemark_fast.profiling import measure

IMAGES, STEPS = 64, 5


@pytest.fixture
def once_compiled():
    """Compiling starts from nothing, but for PyTorch's own cache of an earlier run."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("once_compiled")
@pytest.mark.parametrize("name", ["demo", "ViT-B/32"])
@pytest.mark.parametrize("way", ["regional", pytest.param("graph", marks=pytest.mark.gpu)])
def test_steps(benchmark: BenchmarkFixture, quick: bool, name: str, way: str) -> None:
    if quick and name != "demo":
        pytest.skip("--quick")
    torch.manual_seed(0)
    model = MODELS[name][0]().to(DEVICE)
    backbone, secret = Backbone(model), Key(KEY)
    pixels = torch.randn(IMAGES, 3, *backbone.image_size).to(DEVICE)
    site = measure(backbone, pixels[:8]).site().site
    activations = site_activations(backbone, pixels, site.block, nullcontext)
    coder = CODECS["learned"].create(secret, site, 32, activations.output, "token").to(DEVICE)
    features = final_features(backbone, activations, site.block, nullcontext)
    original = Backbone(MODELS[name][0]().to(DEVICE))

    def train(steps: int, compile: str) -> float:
        stream = secret.stream("benchmark/steps")
        synchronise(DEVICE)
        start = time.perf_counter()
        finetune(
            backbone,
            original,
            coder,
            site,
            activations,
            features,
            stream,
            steps,
            nullcontext,
            compile,
            lambda *_: False,
        )
        synchronise(DEVICE)
        return time.perf_counter() - start

    first = train(1, way)
    train(1, "eager")
    eager, rounds = [], 3

    def by_turns() -> None:  # what slows one down slows down the other
        eager.append(train(STEPS, "eager") / STEPS)

    benchmark.pedantic(lambda: train(STEPS, way), setup=by_turns, rounds=rounds)
    seconds = benchmark.stats["min"] / STEPS
    flops = flops_of(lambda: train(1, "eager"))
    benchmark.extra_info.update(
        {
            "times faster than eager": round(min(eager) / seconds, 2),
            "seconds before the first step": round(first - seconds, 1),
            "FLOP/s of eager over a matmul's": round(flops / min(eager) / matmul_flops(DEVICE), 2),
        }
    )
