"""Whether p-values mean what they say: innocent suspects under many random keys, and the power of the test.

    python benchmarks/calibration.py --vfm ../shared/vfm --out calibration

Each of 2,000 pairs is an innocent suspect and a random key, judged by `Verifier` on 16 images. The images are
not the key's, so what a suspect makes of them up to the site is computed once for all keys; all else is
computed for each pair. Suspects: the original models (one with massive activations), fine-tunes of them,
models marked under another key, independent initialisations, degenerate models. A second series rotates the
suspects and aligns them back. Writes calibration.png and calibration.json into `--out`.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import kstest
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from activemark_fast import Key, Watermark, embed, load_model
from activemark_fast.align import site_sample
from activemark_fast.attacks import finetune, noise, rotate_residual
from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints import architecture_of, build_model
from activemark_fast.codec import KeyedCodec
from activemark_fast.datasets import synthetic_task
from activemark_fast.marking.suffix import SiteActivations, read_mark, site_activations
from activemark_fast.profile import measure
from activemark_fast.triggers import holdout_images, synthetic_images
from activemark_fast.verdict import bit_scores, sign_flip_p_value
from activemark_fast.verify import Verifier

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


def innocents(folder: Path, images: Tensor) -> Iterator[tuple[str, nn.Module, int]]:
    """Suspects that were made without any of the keys they are judged under, and how many keys for each.

    Most pairs are of small models: the argument for the p-value does not depend on size.
    """
    for seed in range(8):
        yield f"small {seed}", small_vit(seed), 100
    massive = small_vit(8)
    with torch.no_grad():  # one channel of the class token, hundreds of times the median
        massive.pos_embed[0, 0, 7] = 300.0
    yield "small, massive activations", massive, 160
    for kind in ("identity blocks", "dead tokens", "constant output"):
        yield f"small, {kind}", degenerate(small_vit(9), kind), 160
    yield "small, LayerScale of 1e-5", small_vit(10, init_values=1e-5), 160
    for path in sorted(folder.glob("*.safetensors")):
        model = load_model(path)
        view = Backbone(model)
        preprocess = view.preprocess
        task = synthetic_task(preprocess, 256, 4)
        name = path.stem
        yield name, model, 50
        yield f"{name}, fine-tuned", finetune(model, task.train, 0, epochs=1), 50
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # so few images may miss the targets
            marked = embed(model, OTHER, preprocess(images)).model
        yield f"{name}, marked under another key", marked, 50
        torch.manual_seed(len(name))
        yield f"{name}, independently initialised", build_model(architecture_of(path)).eval(), 50


class Judge:
    """Judges one suspect under many keys."""

    def __init__(self, suspect: nn.Module, images: Tensor) -> None:
        self.backbone = Backbone(suspect)
        self.preprocess = self.backbone.preprocess
        self.pixels = self.preprocess(images)
        with torch.no_grad():
            self.site = measure(self.backbone, self.pixels).site(block=self.backbone.depth // 2 - 1).site
        self.prefix: list[SiteActivations] = []
        self.output = site_activations(self.backbone, self.pixels, self.site.block, nullcontext).output

    def watermark(self, key: Key, alignment: Tensor | None = None) -> Watermark:
        """What an owner of `key` would bring along, had they marked a model of this shape."""
        codec = KeyedCodec.create(key, self.site, BITS, self.output, "token")
        return Watermark.seal(
            key,
            codec="keyed",
            bits=BITS,
            axis="token",
            site=self.site,
            preprocess=self.preprocess,
            digests=holdout_images(self.pixels, key, self.preprocess, IMAGES).digests,
            image_source="tensor",
            state=codec.state(),
            fingerprint="0" * 64,
            architecture=None,
            alignment=alignment,
        )

    def p_value(self, key: Key) -> float:
        """The p-value of the plain reading."""
        verifier = Verifier(self.watermark(key), key, self.pixels, align=False)
        p_value = verifier.read(self.backbone, self.backbone.depth, self.prefix).p_value
        assert p_value is not None
        return p_value


def aligned_p_value(judge: Judge, model: nn.Module, key: Key, seed: int) -> float:
    """The p-value of the aligned reading of `model`, rotated; the owner's original is `model` itself."""
    sample = site_sample(judge.backbone, key, judge.site, judge.preprocess, nullcontext).half()
    watermark = judge.watermark(key, sample)
    verdict = Verifier(watermark, key, judge.pixels, align=True).judge(rotate_residual(model, None, seed, 1))
    assert verdict.p_value is not None
    return verdict.p_value


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


def power(folder: Path) -> dict[str, list[list[float]]]:
    """p of a marked model, disturbed by noise on its weights: against images and against bits of a tap."""
    model = load_model(sorted(folder.glob("*.safetensors"))[-1])
    view = Backbone(model)
    count = max(POWER_IMAGES)
    pixels = view.preprocess(synthetic_images(OWNER.stream("power"), count, view.image_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        embedding = embed(model, OWNER, pixels)
    watermark = embedding.watermark
    message = torch.from_numpy(OWNER.stream("messages/verify").bits((count, BITS)))
    by_images, by_bits = [], []
    for strength in POWER_NOISE:
        suspect = noise(embedding.model, None, 0, strength) if strength else embedding.model
        backbone, codec = Backbone(suspect), watermark.restore_codec(OWNER)
        activations = site_activations(backbone, pixels, watermark.site.block, nullcontext)
        read = read_mark(backbone, codec, activations, message, watermark.site.block, nullcontext)
        logits = {tap: at_tap.logits for tap, at_tap in read.items()}

        def p_value(images: int, bits: int, logits: dict[int, Tensor] = logits) -> float:
            parts = (bit_scores(v[:images, :bits], message[:images, :bits]) for v in logits.values())
            return sign_flip_p_value([score for part in parts for score in part])

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vfm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--aligned", type=int, default=200)
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    images = synthetic_images(Key(b"calibration: everybody's images").stream("images"), IMAGES, (32, 32))
    keys = iter(Key(f"calibration: random key {index}".encode()) for index in range(10**9))
    plain: dict[str, list[float]] = {}
    for name, suspect, count in innocents(arguments.vfm, images):
        judge = Judge(suspect, images)
        plain[name] = [judge.p_value(next(keys)) for _ in range(count)]
        print(name, json.dumps(summary(plain[name])), flush=True)
    aligned: list[float] = []
    model = small_vit(0)
    judge = Judge(model, images)
    for seed in range(arguments.aligned):
        aligned.append(aligned_p_value(judge, model, next(keys), seed))
    pooled = [p for values in plain.values() for p in values]
    result = {"plain": summary(pooled), "aligned": summary(aligned), "suspects": {}}
    result["suspects"] = {name: summary(values) for name, values in plain.items()}
    print(json.dumps({name: result[name] for name in ("plain", "aligned")}, indent=1), flush=True)
    curves = power(arguments.vfm)
    print(json.dumps(curves), flush=True)
    draw({"plain": pooled, "aligned": aligned}, curves, arguments.out / "calibration.png")
    record = json.dumps({**result, "power": curves}, indent=1)
    (arguments.out / "calibration.json").write_text(record)


if __name__ == "__main__":
    main()
