"""Minutes to mark a model, against the baselines, on the same model, images and machine.

    make bench PYTEST_ARGS="--quick benchmarks/test_embed_minutes.py"

A baseline runs for a fraction of its work; its minutes are extrapolated, and the row says from how much.
"times embed" compares its CPU time with that of `embed` right before and after it: machines change meanwhile.
Without `--quick` ViT-B/32 and ViT-L/14 follow (random weights: they are here for their size).
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
from activemark_fast.checkpoints import load_model
from activemark_fast.key import Key
from activemark_fast.normalisation import Preprocess
from activemark_fast.photographs import shipped_photographs
from activemark_fast.synthetic import synthetic_images

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


class Embed:
    """This package, with its defaults."""

    def prepare(self, subject: Subject) -> None:
        activemark_fast.embed(subject.model, KEY)  # the first call loads libraries

    def make(self, subject: Subject, fraction: float) -> activemark_fast.Embedding:
        return activemark_fast.embed(subject.model, KEY)

    def fraction(self, made: activemark_fast.Embedding) -> float:
        return 1.0

    def rates(self, subject: Subject, made: activemark_fast.Embedding) -> list[float]:
        suspects = [made.model, subject.model, subject.other]
        return [activemark_fast.verify(s, made.watermark, KEY).detection_rate for s in suspects]

    def sample(self, subject: Subject) -> None:
        """A piece of the work, to count its operations."""
        activemark_fast.embed(subject.model, KEY)


class Recipe:
    def prepare(self, subject: Subject) -> None:
        self.sample(subject)

    def make(self, subject: Subject, fraction: float) -> reference_recipe.Mark:
        return reference_recipe.generate(subject.model, KEY, fraction=fraction)

    def fraction(self, made: Any) -> float:
        return made.cost.fraction

    def rates(self, subject: Subject, made: reference_recipe.Mark) -> list[float]:
        suspects = [made.model, subject.model, subject.other]
        return [reference_recipe.verify(suspect, made).detection_rate for suspect in suspects]

    def sample(self, subject: Subject) -> None:
        reference_recipe.generate(subject.model, KEY, epochs=1, steps_per_epoch=4)


class Fingerprints(Recipe):
    def __init__(self, module: Any) -> None:
        self.module = module

    def prepare(self, subject: Subject) -> None:
        assert subject.classifiers  # fitting a head is no part of a fingerprint

    def make(self, subject: Subject, fraction: float) -> Any:
        return self.module.generate(subject.classifiers[0], KEY, fraction=fraction)

    def rates(self, subject: Subject, made: Any) -> list[float]:
        return [self.module.verify(suspect, made).detection_rate for suspect in subject.classifiers]

    def sample(self, subject: Subject) -> None:
        model = subject.classifiers[0]
        images = model.base_images(None, Key(KEY), 16)[:4]
        first = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        if self.module is ipguard:
            ipguard._descend(model, images, first, first + 1, ipguard.MARGIN, 4)
        else:
            adv_tra._step_sizes(model, images, first, adv_tra.LENGTH // 2, 4)


METHODS = {
    "embed": Embed(),
    "reference recipe": Recipe(),
    "IPGuard": Fingerprints(ipguard),
    "ADV-TRA": Fingerprints(adv_tra),
}
FRACTIONS: dict[str, dict[str, float]] = {  # of each method's whole work
    "demo": {"embed": 1.0, "reference recipe": 0.01, "IPGuard": 0.02, "ADV-TRA": 0.01},
    "ViT-B/32": {"embed": 1.0, "reference recipe": 0.004, "IPGuard": 0.01, "ADV-TRA": 0.01},
    "ViT-L/14": {"embed": 1.0, "reference recipe": 0.0004},
}


def seconds_of_embed(subject: Subject) -> float:
    """CPU time of `embed`."""
    started = time.process_time()
    METHODS["embed"].make(subject, 1.0)
    synchronise(DEVICE)
    return time.process_time() - started


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
    subject, fraction, how = subjects[name], FRACTIONS[name][method], METHODS[method]
    how.prepare(subject)
    made: list[Any] = []
    beside = [] if method == "embed" else [seconds_of_embed(subject)]
    rate = matmul_flops(DEVICE)
    with presentations(subject.model) as shown, PeakMemory(DEVICE) as peak:
        cpu, wall = time.process_time(), time.perf_counter()
        benchmark.pedantic(lambda: made.append(how.make(subject, fraction)), rounds=1)
        synchronise(DEVICE)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    rate = max(rate, matmul_flops(DEVICE))
    beside += [seconds_of_embed(subject) for _ in beside]
    part = how.fraction(made[0])
    images = shown[0] / part
    with presentations(subject.model) as counted:
        flops = flops_of(lambda: how.sample(subject)) / counted[0] * images
    found, *innocent = how.rates(subject, made[0])
    row = {
        "model": name,
        "method": method,
        "minutes": f"{wall / part / 60:.3g}",
        "CPU minutes": f"{cpu / part / 60:.3g}",
        "times embed": f"{cpu / part / (sum(beside) / 2):.0f}" if beside else "1",
        "of which run": f"{part:.1%}",
        "images through the model": f"{images:.3g}",
        "TFLOP": f"{flops / 1e12:.3g}",
        "FLOP/s over a matmul's": f"{flops / (wall / part) / rate:.2f}",
        "peak MiB over the model": f"{peak.bytes / 2**20:.0f}",
        "detected": f"{found:.3f}",
        "negatives": f"{max(innocent):.3f}",
    }
    if method == "embed":
        row["MiB stated"] = f"{made[0].engine.peak_bytes / 2**20:.0f}"
    benchmark.extra_info.update(row, threads=torch.get_num_threads(), torch=torch.__version__)
    record_row(row)
    if method == "embed" and name == "demo":
        assert found >= 0.99
        assert max(innocent) <= 0.01


@pytest.mark.parametrize(
    "settings",
    [{"clean": 64}, {"clean": 128}, {"clean": 256}, {"bits": 16}, {"bits": 32}],
    ids=str,
)
def test_minutes_grow(benchmark: BenchmarkFixture, record_row: Any, settings: dict[str, int]) -> None:
    model = load_model("demo").to(DEVICE)
    clean = shipped_photographs().images[: settings.get("clean", 256)]
    embedding = benchmark.pedantic(
        lambda: activemark_fast.embed(model, KEY, clean=clean, bits=settings.get("bits", 32)),
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
