"""Wall time of embedding and verification, on the model that ships with the package or on another.

python -m pytest benchmarks/test_embed_verify.py --benchmark-only --model ../shared/dinov2/FILE.safetensors
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import activemark_fast
from activemark_fast.checkpoints import load_model

KEY = b"benchmark: a key of no secrecy"


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return load_model(request.config.getoption("--model"))


@pytest.fixture(scope="module")
def embedding(model: torch.nn.Module) -> activemark_fast.Embedding:
    return activemark_fast.embed(model, KEY)


def test_embed(benchmark: BenchmarkFixture, model: torch.nn.Module) -> None:
    embedding = benchmark.pedantic(activemark_fast.embed, (model, KEY), rounds=3, warmup_rounds=1)
    assert embedding.quality.detection_rate == 1


def test_verify(benchmark: BenchmarkFixture, embedding: activemark_fast.Embedding) -> None:
    arguments = (embedding.model, embedding.watermark, KEY)
    verdict = benchmark.pedantic(activemark_fast.verify, arguments, rounds=3, warmup_rounds=1)
    assert verdict.decision == "match"


def test_verify_the_original(
    benchmark: BenchmarkFixture, model: torch.nn.Module, embedding: activemark_fast.Embedding
) -> None:
    arguments = (model, embedding.watermark, KEY)
    verdict = benchmark.pedantic(activemark_fast.verify, arguments, rounds=3, warmup_rounds=1)
    assert verdict.decision == "no match"
