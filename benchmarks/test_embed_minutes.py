"""Minutes to mark a model, against the baselines, on the same model, images and machine.

    make bench PYTEST_ARGS="--quick benchmarks/test_embed_minutes.py"

A baseline runs for a fraction of its work; its minutes are extrapolated, and the row says from how much.
Without `--quick` ViT-B/32 and ViT-L/14 follow (random weights: they are here for their size).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from measure import PeakMemory, flops_of, matmul_flops, presentations, synchronise
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import activemark_fast
from activemark_fast.backbone import Backbone
from activemark_fast.baselines import Classifier, adv_tra, ipguard, reference_recipe
from activemark_fast.checkpoint import load_model
from activemark_fast.key import Key
from activemark_fast.triggers import Preprocess, synthetic_images

KEY = b"benchmark: a key of no secrecy"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES = 10


def random_vit(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=0)
    with torch.no_grad():  # timm starts layers much smaller than trained ones are
        for block in model.blocks:
            block.mlp.fc1.weight.normal_(std=0.05)
            block.mlp.fc2.weight.normal_(std=0.02)
    return model.eval()


def fresh_demo(seed: int) -> nn.Module:
    model = load_model("demo")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = float(parameter.std()) if parameter.numel() > 1 else 1.0
            if parameter.dim() > 1:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "demo": (lambda: load_model("demo"), lambda: fresh_demo(1)),
    "ViT-B/32": (
        lambda: random_vit("vit_base_patch32_clip_224", 0),
        lambda: random_vit("vit_base_patch32_clip_224", 1),
    ),
    "ViT-L/14": (
        lambda: random_vit("vit_large_patch14_clip_224", 0),
        lambda: random_vit("vit_large_patch14_clip_224", 1),
    ),
}


@dataclass(frozen=True)
class Made:
    """What a method made, in how long, and what it says of a copy and of models that are none."""

    seconds: float
    fraction: float
    steps: int
    found: float
    negatives: float


class Subject:
    """A model, another that is none of its copies, and a head for each."""

    def __init__(self, name: str) -> None:
        make, make_other = MODELS[name]
        self.model, self.other = make().to(DEVICE), make_other().to(DEVICE)
        self._heads: tuple[Classifier, Classifier] | None = None

    @property
    def classifiers(self) -> tuple[Classifier, Classifier]:
        """Both models with a head: ten classes, made of what images look like."""
        if self._heads is None:
            view = Backbone(self.model)
            size = view.image_size
            images = synthetic_images(Key(KEY).stream("benchmark/head"), 240, size)
            pixels = Preprocess(size, (0.0,) * 3, (1.0,) * 3)(images)
            lightness = pixels.mean(dim=(1, 2, 3)).argsort().argsort()
            labels = (lightness * CLASSES) // len(pixels)
            self._heads = (
                Classifier.fit(self.model, pixels, labels),
                Classifier.fit(self.other, pixels, labels),
            )
        return self._heads


def by_edit(subject: Subject, fraction: float) -> Made:
    embedding = activemark_fast.embed(subject.model, KEY)
    suspects = [embedding.model, subject.model, subject.other]
    rates = [activemark_fast.verify(s, embedding.watermark, KEY).detection_rate for s in suspects]
    return Made(embedding.seconds, 1.0, embedding.steps, rates[0], max(rates[1:]))


def by_recipe(subject: Subject, fraction: float) -> Made:
    mark = reference_recipe.generate(subject.model, KEY, fraction=fraction)
    suspects = [mark.model, subject.model, subject.other]
    rates = [reference_recipe.verify(s, mark).detection_rate for s in suspects]
    steps = reference_recipe.EPOCHS * reference_recipe.STEPS_PER_EPOCH
    return Made(mark.cost.seconds, mark.cost.fraction, steps, rates[0], max(rates[1:]))


def by_fingerprint(module: Any) -> Callable[[Subject, float], Made]:
    def run(subject: Subject, fraction: float) -> Made:
        mine, other = subject.classifiers
        found = module.generate(mine, KEY, fraction=fraction)
        rates = [module.verify(suspect, found).detection_rate for suspect in (mine, other)]
        return Made(found.cost.seconds, found.cost.fraction, 0, rates[0], rates[1])

    return run


METHODS: dict[str, Callable[[Subject, float], Made]] = {
    "embed": by_edit,
    "reference recipe": by_recipe,
    "IPGuard": by_fingerprint(ipguard),
    "ADV-TRA": by_fingerprint(adv_tra),
}
FRACTIONS: dict[str, dict[str, float]] = {  # of each method's whole work
    "demo": {"embed": 1.0, "reference recipe": 0.02, "IPGuard": 0.08, "ADV-TRA": 0.02},
    "ViT-B/32": {"embed": 1.0, "reference recipe": 0.004, "IPGuard": 0.01, "ADV-TRA": 0.01},
    "ViT-L/14": {"embed": 1.0, "reference recipe": 0.0004},
}


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    return {}


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, methods in FRACTIONS.items() for method in methods]
)
def test_minutes(
    benchmark: BenchmarkFixture,
    record_row: Any,
    quick: bool,
    subjects: dict[str, Subject],
    name: str,
    method: str,
) -> None:
    if quick and name != "demo":
        pytest.skip("--quick")
    if name not in subjects:
        subjects.clear()  # one model at a time in memory
        subjects[name] = Subject(name)
    subject, fraction, run = subjects[name], FRACTIONS[name][method], METHODS[method]
    if method in ("IPGuard", "ADV-TRA"):
        assert subject.classifiers  # fitting the head is no part of a fingerprint
    if method == "embed":
        activemark_fast.embed(subject.model, KEY)  # the first call loads libraries
    made: list[Made] = []
    rate = matmul_flops(DEVICE)
    with presentations(subject.model) as shown, PeakMemory(DEVICE) as peak:
        started = time.process_time()
        benchmark.pedantic(lambda: made.append(run(subject, fraction)), rounds=1)
        synchronise(DEVICE)
        cpu = time.process_time() - started
    rate = max(rate, matmul_flops(DEVICE))
    result = made[0]
    minutes = result.seconds / result.fraction / 60
    whole = shown[0] / result.fraction
    with presentations(subject.model) as counted:
        small = fraction if method == "embed" else fraction / 8
        flops = flops_of(lambda: run(subject, small)) / max(counted[0], 1) * whole
    row = {
        "model": name,
        "method": method,
        "minutes": f"{minutes:.3g}",
        "of which run": f"{result.fraction:.1%}",
        "images through the model": f"{whole:.3g}",
        "TFLOP": f"{flops / 1e12:.3g}",
        "of a matmul's FLOP/s": f"{flops / (60 * minutes) / rate:.2f}",
        "peak MiB over the model": f"{peak.bytes / 2**20:.0f}",
        "detected": f"{result.found:.3f}",
        "negatives": f"{result.negatives:.3f}",
    }
    benchmark.extra_info.update(row, minutes=minutes, cpu_seconds=cpu, threads=torch.get_num_threads())
    record_row(row)
    if method == "embed" and name == "demo":
        assert result.found >= 0.99
        assert result.negatives <= 0.01


@pytest.mark.parametrize(
    "settings",
    [{"images": 64}, {"images": 128}, {"images": 256}, {"bits": 8}, {"bits": 16}, {"bits": 32}],
    ids=str,
)
def test_minutes_grow(benchmark: BenchmarkFixture, record_row: Any, settings: dict[str, int]) -> None:
    model = load_model("demo").to(DEVICE)
    view = Backbone(model)
    images = synthetic_images(
        Key(KEY).stream("benchmark/images"), settings.get("images", 256), view.image_size
    )
    embedding = benchmark.pedantic(
        lambda: activemark_fast.embed(model, KEY, images, bits=settings.get("bits", 32)),
        rounds=1,
        warmup_rounds=1,
    )
    (what,) = (f"{value} {name}" for name, value in settings.items())
    row = {
        "model": "demo",
        "method": f"embed, {what}",
        "minutes": f"{embedding.seconds / 60:.3g}",
        "detected": f"{embedding.quality.detection_rate:.3f}",
        "negatives": f"{embedding.quality.original_detection_rate:.3f}",
    }
    benchmark.extra_info.update(row)
    record_row(row)
