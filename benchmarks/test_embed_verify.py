"""Wall time of embedding and verification on the model that ships with the package: `make bench`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import activemark_fast
from activemark_fast.checkpoint import load_model
from activemark_fast.ops.magnitude import top_magnitudes
from activemark_fast.ops.magnitude.reference import top_magnitudes_reference

KEY = b"benchmark: a key of no secrecy"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_model("demo")


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


@pytest.mark.parametrize("implementation", [top_magnitudes, top_magnitudes_reference])
def test_top_magnitudes(benchmark: BenchmarkFixture, implementation) -> None:
    activation = torch.randn(16, 257, 1024, generator=torch.Generator().manual_seed(0))
    benchmark(implementation, activation, 5)
