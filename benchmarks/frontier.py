"""Marks a model, removes the mark in every adaptive way, and draws what is left against what it costs.

    python benchmarks/frontier.py --model demo --data ../shared/data/cifar10.npz --out /tmp/frontier
    python benchmarks/frontier.py --model dinov2.safetensors --data ../shared/data/cifar10.npz \
        --photographs ../shared/data/natural256.npz --segmentation ../shared/data/camvid.npz --out /tmp/dinov2
    python benchmarks/frontier.py --model 'timm:VisionTransformer?{"img_size": 224, …}@dinov2.safetensors' \
        --data ../shared/data/cifar10.npz --images 300 --only 'loudest*' --out /tmp/dinov2

With `--photographs`, an archive with arrays `jpeg` and `offset`, the thief has these images instead of
some of the probe's. With `--segmentation` a row also tells what a linear probe of patches loses on
labelled scenes.

Leaves frontier.json, frontier.md and frontier.png in `--out`, with the marked model and the watermark. A run
goes on from what is there.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from models import photographs
from torch import Tensor, nn

import activemark_fast
from activemark_fast.attacks.suite import RELEASED, Attack, adaptive_attacks
from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints import architecture_of, load_model, save_model
from activemark_fast.codec.passive import PASSIVE
from activemark_fast.datasets import Labelled, Task, load_task
from activemark_fast.evaluate import cost
from activemark_fast.evaluation import Evaluation
from activemark_fast.key import Key
from activemark_fast.report import frontier_figure
from activemark_fast.runtime import resolve_autocast
from activemark_fast.utility import features, probe_accuracy, segmentation_iou
from activemark_fast.verifier import Verifier
from activemark_fast.watermark import Watermark

COLUMNS = (
    *("attack", "p", "passive band", "R", "points lost", "IoU points lost", "p, original"),
    *("images", "steps", "seconds"),
)


class Bench:
    """A model, its mark, the thief's images, the probe's, and the rows that have been measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.out
        self.folder.mkdir(parents=True, exist_ok=True)
        device = torch.device(arguments.device)
        original = load_model(arguments.model, device=device)
        view = Backbone(original)
        attacks = [a for a in adaptive_attacks() if a.quick or not arguments.quick]
        self.attacks = [RELEASED, *(a for a in attacks if any(fnmatch(a.name, p) for p in arguments.only))]
        train, test = arguments.probe
        taken = 0 if arguments.photographs else arguments.images
        task = load_task(arguments.data, view.preprocess, taken + train, test)
        # The probe is fitted to images which the thief does not have.
        of_thief, of_probe = task.train.images.split([taken, len(task.train) - taken])
        labels = task.train.labels
        self.thief: Labelled | Tensor = Labelled(of_thief, labels[:taken])
        if arguments.photographs:
            found = photographs(arguments.photographs)[: arguments.images]
            self.thief = torch.cat([view.preprocess(image[None]) for image in found])
        self.task = Task(Labelled(of_probe, labels[taken:]), task.test)
        self.scenes: Task | None = None
        if arguments.segmentation:
            self.scenes = load_task(arguments.segmentation, view.preprocess, *arguments.scenes)
        owner = Key(arguments.key.encode())
        weights, watermark = (self.folder / f"{name}.safetensors" for name in ("marked", "watermark"))
        if not watermark.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # what the mark is worth is what the rows say
                embedding = activemark_fast.embed(original, owner)
            save_model(embedding.model, weights, architecture_of(arguments.model))
            embedding.watermark.save(watermark)
        self.models = {"marked": load_model(weights, device=device)}
        if arguments.original:
            self.models["original"] = original
        self.verifier = Verifier(Watermark.load(watermark), owner, align=False, device=device)
        self.rows = json.loads(self.file.read_text())["rows"] if self.file.exists() else []

    @property
    def file(self) -> Path:
        return self.folder / "frontier.json"

    def measure(self, header: dict[str, Any]) -> Evaluation:
        """All rows, as far as they are not there yet; each is written as soon as it is there."""
        done = {(row["attack"], row["subject"]) for row in self.rows}
        for attack in self.attacks:
            for subject, model in self.models.items():
                if (attack.name, subject) not in done:
                    self.rows.append(self.row(attack, subject, model))
                    content = {"header": header, "rows": self.rows}
                    self.file.write_text(json.dumps(content, indent=1))
                    print(*(f"{name} {value}" for name, value in self.rows[-1].items()), sep=", ", flush=True)
        return Evaluation(header, self.rows)

    def row(self, attack: Attack, subject: str, model: nn.Module) -> dict[str, Any]:
        started = time.perf_counter()
        if attack.run is not None:
            model = attack.run(model, self.thief, 0, attack.strength, **attack.settings)
        seconds = time.perf_counter() - started
        verdict = self.verifier.judge(model)
        view = Backbone(model)
        with resolve_autocast("auto", view.device)(view.dtype):
            train, test = (features(model, part.images) for part in (self.task.train, self.task.test))
        iou = None if self.scenes is None else segmentation_iou(model, self.scenes)
        return {
            "attack": attack.name,
            "family": attack.family,
            "strength": attack.strength,
            "subject": subject,
            "key": "owner",
            "p_value": verdict.p_value,
            "passive": verdict.bands.get(PASSIVE),
            "detection_rate": verdict.detection_rate if verdict.images else None,
            "mean_bit_errors": float(verdict.bit_errors.mean()) if verdict.images else None,
            "probe_accuracy": probe_accuracy(train, self.task.train.labels, test, self.task.test.labels),
            "iou": iou,
            **cost(attack, len(self.thief)),
            "attack_seconds": round(seconds, 2),
        }


def page(evaluation: Evaluation) -> str:
    """The rows as a table in Markdown."""
    header, points = evaluation.header, evaluation.frontier()
    scenes = (
        f", of patches on {header['scenes'][0]} scenes, on {header['scenes'][1]}" if header["scenes"] else ""
    )
    lines = [
        f"# What removes the mark of {header['model']}, and what that costs\n",
        f"{header['images']} clean images for the thief ({header['thief']}); linear probe on "
        f"{header['probe'][0]} other images, tested on {header['probe'][1]} ({header['data']}){scenes}; "
        f"activemark_fast {header['version']}, {header['device']}.\n",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for point in points:
        original = evaluation.row(point["attack"], "original") or {"p_value": None}
        marked = evaluation.row(point["attack"], "marked") or {}
        cells = [
            point["attack"],
            _told(point["p_value"], ".1e"),
            _told(marked.get("passive"), ".1e"),
            _told(point["detection_rate"], ".3f"),
            _told(point["lost"], "+.1f"),
            _told(_lost(evaluation, point["attack"]), "+.1f"),
            _told(original["p_value"], ".1e"),
            _told(point["images"], "d"),
            _told(point["steps"], "d"),
            _told(point["seconds"], ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _lost(evaluation: Evaluation, attack: str) -> float | None:
    """Points of the scenes' IoU."""
    before, after = ((evaluation.row(name) or {}).get("iou") for name in (RELEASED.name, attack))
    return None if before is None or after is None else 100 * (before - after)


def _told(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000, help="the thief's")
    parser.add_argument("--probe", type=int, nargs=2, default=(2000, 1000), metavar=("TRAIN", "TEST"))
    parser.add_argument("--photographs", type=Path, help="archive of the thief's images")
    parser.add_argument("--segmentation", type=Path, help="archive of labelled scenes")
    parser.add_argument("--scenes", type=int, nargs=2, default=(150, 75), metavar=("TRAIN", "TEST"))
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of attacks")
    parser.add_argument("--quick", action="store_true", help="only the strengths of the suite")
    parser.add_argument("--original", action="store_true", help="attack the unmarked original, too")
    parser.add_argument("--key", default="frontier: the owner's key", help="what a mark leaves depends on it")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    evaluation = bench.measure(
        {
            "model": arguments.model.partition("?")[0],
            "data": arguments.data.name,
            "images": arguments.images,
            "thief": (arguments.photographs or arguments.data).name,
            "probe": list(arguments.probe),
            "scenes": list(arguments.scenes) if arguments.segmentation else None,
            "device": arguments.device,
            "version": activemark_fast.__version__,
        }
    )
    (bench.folder / "frontier.md").write_text(page(evaluation), encoding="utf-8")
    points = evaluation.frontier()
    for point in points:  # what it loses at most
        point["lost"] = max(point["lost"], _lost(evaluation, point["attack"]) or 0.0)
    frontier_figure(points).savefig(bench.folder / "frontier.png", dpi=150)


if __name__ == "__main__":
    main()
