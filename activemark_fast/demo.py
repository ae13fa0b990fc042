"""The demonstration: marks the shipped model, makes suspects of it, verifies them all."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from activemark_fast.attacks import finetune, prune
from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints import architecture_of, load_model, save_model
from activemark_fast.datasets import Labelled
from activemark_fast.embedding import embed
from activemark_fast.key import Key
from activemark_fast.marking.cosine import feature_cosine
from activemark_fast.marking.subject import PROFILED_IMAGES
from activemark_fast.profiling import profile
from activemark_fast.progress import Progress
from activemark_fast.report.figures import verdicts_figure
from activemark_fast.runtime import resolve_device
from activemark_fast.synthetic import synthetic_images
from activemark_fast.utility import features
from activemark_fast.verdict import Decision, Verdict
from activemark_fast.verification import verify

TUNING_IMAGES = 1024
FRESH_IMAGES = 256
"""Images to compare features on, which neither embedding nor fine-tuning has seen."""
EPOCHS = 3
BATCH_SIZE = 64
PRUNED_SHARE = 0.4
# Neither is a secret: whoever does not own the model has no part in the owner's key.
_STRANGER = Key(b"activemark_fast demo: the key of another owner")
_PUBLIC = Key(b"activemark_fast demo: everybody's images")


@dataclass(frozen=True, eq=False)
class DemoRow:
    """One suspect of the demonstration.

    Attributes:
        suspect: what was done to which model.
        expected: the right decision on it.
        verdict: what `verify` says.
        cosine: mean cosine between its features and the original's, on fresh images.
    """

    suspect: str
    expected: Decision
    verdict: Verdict
    cosine: float

    @property
    def as_expected(self) -> bool:
        """Whether the decision is the right one."""
        return self.verdict.decision == self.expected

    def to_dict(self) -> dict[str, object]:
        """The row as JSON types."""
        return {
            "suspect": self.suspect,
            "expected": self.expected,
            "decision": self.verdict.decision,
            "detection_rate": self.verdict.detection_rate,
            "mean_bit_errors": float(self.verdict.bit_errors.mean()),
            "p_value": self.verdict.p_value,
            "cosine": self.cosine,
        }


def run_demo(
    out: Path,
    *,
    device: str | torch.device | None = None,
    precision: str = "auto",
    progress: bool = False,
) -> list[DemoRow]:
    """Marks the demo model, verifies three models that descend from the marked one and three that do not.

    Leaves in `out` the files owner.key (one that is there is used again), marked, watermark, finetuned,
    pruned and original.safetensors, and demo.png; they are put there at the end, whole.

    Args:
        out: the folder; made if its parent is there.
        device: where to compute; by default the CPU.
        precision: as in `embed`.
        progress: show progress bars on standard error.

    Raises:
        ValueError: `out` cannot be a folder, or owner.key in it is no key file.
        OSError: a file cannot be written.
    """
    if not out.parent.is_dir():
        raise ValueError(f"out: there is no folder {out.parent}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, wanted a folder")
    device = resolve_device(device, torch.device("cpu"))
    architecture = architecture_of("demo")
    original = load_model("demo", device=device)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".activemark-demo-") as folder:
        staging = Path(folder)
        key_file = out / "owner.key"
        key = Key.of(key_file) if key_file.exists() else Key.write_new(staging / key_file.name)
        owners = embed(original, key, architecture=architecture, precision=precision, progress=progress)
        strangers = embed(original, _STRANGER, precision=precision, progress=progress)
        tuned = _finetuned(owners.model, progress)
        pruned = prune(owners.model, None, 0, PRUNED_SHARE)
        suspects: list[tuple[str, Decision, nn.Module]] = [
            ("marked", "match", owners.model),
            ("marked, fine-tuned", "match", tuned),
            (f"marked, {PRUNED_SHARE:.0%} pruned", "match", pruned),
            ("marked by another owner", "no match", strangers.model),
            ("original", "no match", original),
            ("original, fine-tuned", "no match", _finetuned(original, progress)),
        ]
        fresh = _images(original, "demo/fresh", FRESH_IMAGES)
        unmarked = features(original, fresh)
        rows = [
            DemoRow(
                name,
                expected,
                verify(suspect, owners.watermark, key, precision=precision),
                feature_cosine(features(suspect, fresh), unmarked),
            )
            for name, expected, suspect in suspects
        ]
        models = {"marked": owners.model, "finetuned": tuned, "pruned": pruned, "original": original}
        for name, model in models.items():
            save_model(model, staging / f"{name}.safetensors", architecture)
        owners.watermark.save(staging / "watermark.safetensors")
        measured = profile(original, fresh[:PROFILED_IMAGES])
        figure = verdicts_figure(
            [(row.suspect, row.verdict) for row in rows], measured, owners.watermark.site
        )
        figure.savefig(staging / "demo.png", dpi=150)
        out.mkdir(exist_ok=True)
        for file in staging.iterdir():
            shutil.move(file, out / file.name)
    return rows


def _images(model: nn.Module, purpose: str, count: int) -> Tensor:
    """(count, 3, H, W) float32 on the CPU, input of `model`; by turns leaves and clouds."""
    backbone = Backbone(model)
    return backbone.preprocess(synthetic_images(_PUBLIC.stream(purpose), count, backbone.image_size))


def _finetuned(model: nn.Module, progress: bool) -> nn.Module:
    """A copy of `model`, all its layers fine-tuned to tell leaves from clouds."""
    images = _images(model, "demo/tuning", TUNING_IMAGES)
    data = Labelled(images, torch.arange(len(images)) % 2)
    with Progress(progress) as bar:
        bar.stage("fine-tuning a suspect", EPOCHS * (len(images) // BATCH_SIZE))
        return finetune(model, data, 0, epochs=EPOCHS, batch_size=BATCH_SIZE, on_step=bar.advance)
