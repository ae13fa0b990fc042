"""Whether p-values mean what they say: innocent suspects under many random keys, and the power of the test.

    python benchmarks/calibration.py --vfm ../shared/vfm --out calibration
    python benchmarks/calibration.py --vfm 'timm:VisionTransformer?{…}@dinov2.safetensors' --keys 10 \
        --only 'dinov2*' --aligned 0 --out /tmp/dinov2

Each of 2,000 pairs is an innocent suspect and a random key, judged by `Verifier` on 16 images. The images are
not the key's, so what a suspect makes of them up to the site is computed once for all keys; all else is
computed for each pair. Suspects: small random models, degenerate ones; of each model given itself, a
fine-tune, a copy marked under another key, and independent weights. A second series rotates a suspect and
aligns it back. Of each pair four p-values: the verdict's, the same after what an owner could choose is paid
for, and each band's. Writes calibration.png and calibration.json into `--out`; exits with 1 if the verdict's
are at most 0.05 in more than 6 % of the pairs, or at most 1e-6 in any.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from models import Model, add_models, made_by, models
from scipy.stats import kstest
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from activemark_fast import Embedding, Key, Watermark, embed, load_model
from activemark_fast.align import site_sample
from activemark_fast.attacks import finetune, noise, rotate_residual
from activemark_fast.backbone import Backbone
from activemark_fast.codec.codebooks import (
    BANDS,
    MEASURED_IMAGES,
    SiteMeasure,
    codebooks,
    draw_sent,
)
from activemark_fast.codec.passive import BAND_NAMES
from activemark_fast.datasets import synthetic_task
from activemark_fast.looks import Prefix
from activemark_fast.marking.reading import Channel, row_scores
from activemark_fast.marking.suffix import site_activations
from activemark_fast.p_value import sign_flip_p_value
from activemark_fast.profiling import measure
from activemark_fast.synthetic import synthetic_images
from activemark_fast.triggers import trigger_images
from activemark_fast.verdict import Verdict
from activemark_fast.verifier import Verifier
from activemark_fast.watermark import TRIGGER_IMAGES

IMAGES = 16
BITS = 32
OWNER, OTHER = Key(b"calibration: the owner's key"), Key(b"calibration: another owner's key")
POWER_IMAGES = (4, 8, 16, 32, 64)
POWER_BITS = (4, 8, 16, 32)
POWER_NOISE = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0)


class Constant(nn.Module):
    """A block that puts out the same whatever comes in."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **_kwargs: object) -> Tensor:
        return torch.ones_like(x)


class DeadTokens(nn.Module):
    """A block that puts out nothing at every fourth token."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **_kwargs: object) -> Tensor:
        dead = self.block(x).clone()
        dead[:, ::4] = 0
        return dead


def degenerate(model: nn.Module, kind: str) -> nn.Module:
    """A copy of `model` that has lost its function."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        if kind == "identity blocks":
            for parameter in broken.blocks.parameters():
                parameter.zero_()
        elif kind == "dead tokens":
            broken.blocks = nn.Sequential(*(DeadTokens(block) for block in broken.blocks))
        else:
            broken.blocks = nn.Sequential(*(Constant(block) for block in broken.blocks))
    return broken


def small_vit(seed: int, **kwargs: Any) -> Any:
    """A ViT of 6 blocks and 17 tokens, cheap enough for many keys."""
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=0, **kwargs
    ).eval()


def innocents(
    given: list[Model], keys: int, device: str
) -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """Suspects that are made without any of the keys they are judged under, and how many keys for each.

    keys: for each suspect that comes from a model given. Most pairs are of small models: the argument for the
    p-value does not depend on size.
    """
    for seed in range(8):
        yield f"small {seed}", lambda seed=seed: small_vit(seed).to(device), 100
    yield "small, massive activations", lambda: massive_vit().to(device), 160
    for kind in ("identity blocks", "dead tokens", "constant output"):
        yield f"small, {kind}", lambda kind=kind: degenerate(small_vit(9), kind).to(device), 160
    yield "small, LayerScale of 1e-5", lambda: small_vit(10, init_values=1e-5).to(device), 160
    for model in given:
        yield model.name, lambda model=model: model.load(device), keys
        yield f"{model.name}, fine-tuned", lambda model=model: tuned(model.load(device)), keys
        for name, make in (
            ("marked under another key", lambda model=model: marked(model.load(device)).model),
            ("independently initialised", lambda model=model: model.fresh(len(model.name)).to(device)),
        ):
            yield f"{model.name}, {name}", make, keys


def massive_vit() -> nn.Module:
    """A small ViT with one channel of the class token hundreds of times the median."""
    massive = small_vit(8)
    with torch.no_grad():
        massive.pos_embed[0, 0, 7] = 300.0
    return massive


def tuned(model: nn.Module) -> nn.Module:
    task = synthetic_task(Backbone(model).preprocess, 64, 4)
    return finetune(model, task.train, 0, epochs=1, batch_size=16)


def marked(model: nn.Module, key: Key = OTHER) -> Embedding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mark that misses its targets is one, too
        return embed(model, key)


class Judge:
    """Judges one suspect under many keys."""

    def __init__(self, suspect: nn.Module, images: Tensor) -> None:
        self.backbone = Backbone(suspect)
        self.preprocess = self.backbone.preprocess
        self.pixels = self.preprocess(images)
        with torch.no_grad():
            measured = measure(self.backbone, self.pixels.to(self.backbone.device))
        site = measured.site(block=self.backbone.depth // 2 - 1).site
        self.site = replace(site, massive_tokens=(), massive_channels=())
        self.prefix = Prefix()

    def watermark(self, key: Key, alignment: Tensor | None = None) -> Watermark:
        """What an owner of `key` would bring along, had they marked a model of this shape."""
        return Watermark.seal(
            key,
            codec="keyed",
            bits=BITS,
            axis="token",
            site=self.site,
            preprocess=self.preprocess,
            digests=trigger_images(self.pixels, key, self.preprocess, IMAGES).digests,
            image_source="tensor",
            state={},
            fingerprint="0" * 64,
            architecture=None,
            alignment=alignment,
        )

    def p_values(self, key: Key) -> dict[str, float]:
        """The p-values of the plain reading; none of a suspect that cannot be read."""
        watermark = self.watermark(key)
        verifier = Verifier(watermark, key, self.pixels, align=False, device=self.backbone.device)
        return p_values_of(verifier.read(self.backbone, self.backbone.depth, self.prefix))


def p_values_of(verdict: Verdict) -> dict[str, float]:
    """The verdict's p-value, paid or not, and each band's."""
    if verdict.p_value is None or verdict.paid_p_value is None:
        return {}
    return {"p": verdict.p_value, "paid p": verdict.paid_p_value, **verdict.bands}


def aligned_p_values(judge: Judge, model: nn.Module, key: Key, seed: int) -> dict[str, float]:
    """Those of the aligned reading of `model`, rotated; the owner's original is `model` itself."""
    sample = site_sample(judge.backbone, key, judge.site, judge.preprocess, nullcontext).half()
    watermark = judge.watermark(key, sample)
    verifier = Verifier(watermark, key, judge.pixels, align=True)
    return p_values_of(verifier.judge(rotate_residual(model, None, seed, 1)))


def summary(p_values: list[float]) -> dict[str, float]:
    """What is asked of the p-values of innocents; `ks_too_small` tests whether they tend to be too small."""
    values = np.array(p_values)
    return {
        "pairs": len(values),
        "smallest": float(values.min()),
        "share_at_most_0.05": float((values <= 0.05).mean()),
        "share_at_most_0.01": float((values <= 0.01).mean()),
        "share_at_most_0.001": float((values <= 0.001).mean()),
        "at_most_1e-6": int((values <= 1e-6).sum()),
        "ks_uniform": float(kstest(values, "uniform").pvalue),
        "ks_too_small": float(kstest(values, "uniform", alternative="greater").pvalue),
    }


def power(model: nn.Module) -> dict[str, list[list[float]]]:
    """p of a marked model, disturbed by noise on its weights: against images and against bits of a tap."""
    embedding = marked(model, OWNER)
    watermark, stretched = embedding.watermark, OWNER.stretched()
    site = watermark.site
    pixels = trigger_images(None, OWNER, watermark.preprocess, TRIGGER_IMAGES).pixels
    sent = draw_sent(stretched, "verify", TRIGGER_IMAGES, BITS)
    by_images, by_bits = [], []
    for strength in POWER_NOISE:
        backbone = Backbone(noise(embedding.model, None, 0, strength) if strength else embedding.model)
        activations = site_activations(backbone, pixels, site.block, nullcontext)
        measured = SiteMeasure.of(activations.output[:MEASURED_IMAGES], site.prefix_tokens)
        agreements: dict[str, list[tuple[Channel, Tensor]]] = {band.name: [] for band in BANDS}
        for book, messages in zip(codebooks(stretched, site, BITS, measured), sent, strict=True):
            channel = Channel(book, messages)
            read = channel.agreement(backbone, activations, 0, site.block, nullcontext)
            agreements[book.band.name].append((channel, read))

        def p_value(images: int, bits: int, bands: Any = agreements) -> float:
            scores = (
                row_scores([channel.cleared(part[:, :images])[..., :bits] for channel, part in parts])
                for parts in bands.values()
            )
            return min(1.0, len(BAND_NAMES) * min(map(sign_flip_p_value, scores)))

        by_images.append([p_value(images, BITS) for images in POWER_IMAGES])
        by_bits.append([p_value(IMAGES, bits) for bits in POWER_BITS])
    return {"images": by_images, "bits": by_bits}


def draw(series: dict[str, list[float]], curves: dict[str, list[list[float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name, values in series.items():
        ordered = np.sort(values)
        axes[0].loglog(
            ordered, np.arange(1, len(ordered) + 1) / len(ordered), label=f"{name} ({len(values)})"
        )
    axes[0].loglog([1e-4, 1], [1e-4, 1], "k--", label="uniform")
    axes[0].set(title="innocent suspects", xlabel="p-value", ylabel="share of pairs at or below")
    for axis, name, at in ((axes[1], "images", POWER_IMAGES), (axes[2], "bits", POWER_BITS)):
        for strength, values in zip(POWER_NOISE, curves[name], strict=True):
            axis.semilogy(at, values, "o-", label=f"noise {strength}")
        axis.axhline(1e-6, color="k", linestyle="--", label="match at 1e-6")
        axis.set(title="marked model, noise on its weights", xlabel=name, ylabel="p-value")
    axes[1].set_xscale("log", base=2)
    axes[2].set_xlabel(f"bits of each of two taps, {IMAGES} images")
    for axis in axes:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_models(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keys", type=int, default=50, help="for each suspect that comes from a model given")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of suspects")
    parser.add_argument("--aligned", type=int, default=200, help="pairs of the second series")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    images = synthetic_images(Key(b"calibration: everybody's images").stream("images"), IMAGES, (32, 32))
    keys = iter(Key(f"calibration: random key {index}".encode()) for index in range(10**9))
    pairs: dict[str, list[dict[str, float]]] = {}
    for name, make, count in innocents(models(arguments.vfm), arguments.keys, arguments.device):
        if any(fnmatch(name, pattern) for pattern in arguments.only):
            judge = Judge(make(), images)
            read = [judge.p_values(next(keys)) for _ in range(count)]
            pairs[name] = [p_values for p_values in read if p_values]
            told = summary([p["p"] for p in pairs[name]]) if pairs[name] else "not readable"
            print(name, json.dumps(told), flush=True)
    if arguments.aligned:
        model = small_vit(0)
        judge = Judge(model, images)
        turned = [aligned_p_values(judge, model, next(keys), seed) for seed in range(arguments.aligned)]
    pooled = [p_values for read in pairs.values() for p_values in read]
    series = {name: [p_values[name] for p_values in pooled] for name in pooled[0]}
    if arguments.aligned:
        series["p, rotated and aligned"] = [p_values["p"] for p_values in turned]
    result = {name: summary(values) for name, values in series.items()}
    print(json.dumps(result, indent=1), flush=True)
    curves = power(load_model("demo"))
    draw(series, curves, arguments.out / "calibration.png")
    record = {"made_by": made_by(arguments.device), "series": result, "power": curves, "pairs": pairs}
    (arguments.out / "calibration.json").write_text(json.dumps(record, indent=1))
    held = result["p"]["share_at_most_0.05"] <= 0.06 and not result["p"]["at_most_1e-6"]
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
