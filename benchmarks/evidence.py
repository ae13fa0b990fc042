"""What a mark survives, what it costs, and what innocent models show: makes docs/evidence.md.

    python benchmarks/evidence.py --vfm demo --data ../shared/data/cifar10.npz --work /tmp/evidence \
        --segmentation ../shared/data/camvid.npz --photographs ../shared/data/natural256.npz
    python benchmarks/evidence.py --vfm 'timm:VisionTransformer?{…}@dinov2.safetensors' --tuning 512 \
        --probe 1000 500 --scenes 150 75 --natural 200 --out /tmp/dinov2.md …

`--data` and `--segmentation` are archives of labelled images (`activemark_fast.datasets`), `--photographs`
is one with arrays `jpeg` and `offset`: of its first half some are given to `embed` in a second marking, the
other half tells what a mark costs. What has been measured stays in `--work`, a run goes on from there, and
`--parts` without any only writes the page. `--parts curve` marks the model at other fidelities.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from models import Model, add_models, made_by, models, photographs
from torch import Tensor, nn

import activemark_fast
from activemark_fast import Embedding, Key, Watermark, load_model, save_model, verify
from activemark_fast.attacks.suite import Attack, suite
from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled, Task, load_task
from activemark_fast.evaluation import KEPT_ACCURACY
from activemark_fast.utility import features, knn_accuracy, probe_accuracy, segmentation_iou

OWNER, OTHER_OWNER = Key(b"evidence: the owner's key, 1"), Key(b"evidence: another owner's key")
PARTS = ("utility", "given", "suspects", "curve")
SUSPECTS = (
    "as released",
    "40% of weights",
    "int8 weights and activations",
    "int4 weights in groups of 32",
    "bf16 weights",
    "50% of it, 50% of the original",
    "second mark, features to 0.996",
    "all, 1e-5",
    "all, 3e-5",
    "all, 1e-4",
    "all, 3e-5, from a linear probe",
    "all, 1e-4, layer-wise decay 0.75",
    "LoRA, 1e-4",
    "LoRA, 1e-3",
)
"""Attacks of the full suite."""
CURVE = (0.999, 0.998, 0.997, 0.995, 0.99, 0.985, 0.98)
GIVEN = 256
"""Photographs given to `embed`, at most."""
TAIL = 0.05
PAGE = Path(__file__).parent.parent / "docs" / "evidence.md"


class Bench:
    """A model, its mark, the images, and what has been measured."""

    def __init__(self, model: Model, arguments: argparse.Namespace) -> None:
        self.model, self.arguments = model, arguments
        self.codec: str = arguments.codec
        self.original = model.load(arguments.device)
        view = Backbone(self.original)
        self.preprocess, self.depth = view.preprocess, view.depth
        self.columns = ("class token", "mean patch") if view.has_class_token else ("mean patch",)
        self.folder: Path = arguments.work / f"{model.name}-{self.codec}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "evidence.json"
        self.record: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.features = cache(self._features)

    @property
    def sizes(self) -> dict[str, Any]:
        """How many images: rows that stand together are of as many."""
        names = ("tuning", "probe", "scenes", "natural")
        return {name: json.loads(json.dumps(getattr(self.arguments, name))) for name in names}

    def once(self, name: str, measure: Callable[[], Any]) -> None:
        """Measures what is not there yet, and writes it down."""
        if name not in self.record:
            self.record[name] = measure()
            self.file.write_text(json.dumps(self.record, indent=1))
            print(f"{self.model.name}, {name}: {json.dumps(self.record[name])}", flush=True)

    @cached_property
    def marked(self) -> tuple[nn.Module, Watermark]:
        """The model under the default embedding, which is made once."""
        weights, watermark = (self.folder / f"{name}.safetensors" for name in ("marked", "watermark"))
        if not watermark.exists():
            embedding, said = self.embedded()
            save_model(embedding.model, weights, self.model.architecture)
            embedding.watermark.save(watermark)
            self.once("embedding", lambda: said)
        return load_model(weights, device=self.arguments.device), Watermark.load(watermark)

    def embedded(self, **settings: Any) -> tuple[Embedding, dict[str, Any]]:
        """The marked model, and what `embed` says of it."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", RuntimeWarning)
            embedding = activemark_fast.embed(self.original, OWNER, codec=self.codec, **settings)
        said = asdict(embedding.quality) | {
            "site": embedding.site_reason,
            "clean": embedding.clean_source,
            "seconds": embedding.seconds,
            "steps": embedding.steps,
            "warnings": [str(w.message) for w in told if issubclass(w.category, RuntimeWarning)],
        }
        return embedding, said

    def measure(self, parts: list[str]) -> None:
        """Parts of it, as far as they are not there yet."""
        if not parts:
            return
        if self.record.setdefault("sizes", self.sizes) != self.sizes:
            raise ValueError(f"{self.file} was measured with {self.record['sizes']}, wanted {self.sizes}")
        self.record.setdefault("made by", []).append(made_by(self.arguments.device))
        assert self.marked
        if "utility" in parts:
            for subject in ("original", "marked"):
                self.once(f"utility, {subject}", lambda subject=subject: self.utility(subject))
            for part in self.test_images:
                self.once(
                    f"cosine, {part}", lambda part=part: self.cosine(self.features("marked", part), part)
                )
        if "given" in parts:
            self.once("given", lambda: self.point(clean=self.photographs[0]))
        if "suspects" in parts:
            for name, make, probed in self.suspects():
                whole = name.endswith("as released")
                if any(fnmatch(name, pattern) for pattern in self.arguments.only):
                    self.once(
                        f"suspect, {name}",
                        lambda make=make, probed=probed, whole=whole: self.judged(make(), probed, whole),
                    )
        if "curve" in parts:
            for fidelity in CURVE:
                self.once(f"curve, {fidelity}", lambda fidelity=fidelity: self.point(fidelity=fidelity))

    @cached_property
    def images(self) -> tuple[Labelled, Task]:
        """The thief's, and those of the probe, which the thief does not have."""
        tuning, (train, test) = self.arguments.tuning, self.arguments.probe
        task = load_task(self.arguments.data, self.preprocess, tuning + train, test)
        of_thief, of_probe = (
            Labelled(task.train.images[part], task.train.labels[part])
            for part in (slice(tuning), slice(tuning, None))
        )
        return of_thief, Task(of_probe, task.test)

    @cached_property
    def scenes(self) -> Task:
        return load_task(self.arguments.segmentation, self.preprocess, *self.arguments.scenes)

    @cached_property
    def photographs(self) -> tuple[Tensor, Tensor]:
        """Those given to `embed`, as they are, and those that tell what it costs, as the model takes them."""
        found = photographs(self.arguments.photographs)
        given, kept = found[: len(found) // 2], found[len(found) // 2 :]
        return (
            torch.stack(given[:GIVEN]),
            torch.cat([self.preprocess(image[None]) for image in kept[: self.arguments.natural]]),
        )

    @property
    def test_images(self) -> dict[str, Callable[[], Tensor]]:
        """What the mark has not seen, by name."""
        return {
            "photographs": lambda: self.photographs[1],
            "CIFAR-10": lambda: self.images[1].test.images,
            "CamVid": lambda: self.scenes.test.images,
        }

    def _features(self, subject: str, part: str) -> Tensor:
        """(n, F, D) of one of the two models."""
        model = self.original if subject == "original" else self.marked[0]
        return features(model, self.test_images[part]())

    def cosine(self, found: Tensor, part: str) -> dict[str, list[float]]:
        """Mean and 5th percentile of the cosine to the original's features, for each kind of them."""
        cosines = torch.cosine_similarity(found, self.features("original", part), dim=-1).double()
        tails = torch.quantile(cosines, TAIL, dim=0, interpolation="lower")
        return {
            name: [float(column.mean()), float(tail)]
            for name, column, tail in zip(self.columns, cosines.T, tails, strict=True)
        }

    def utility(self, subject: str) -> dict[str, float]:
        model, task = self.original if subject == "original" else self.marked[0], self.images[1]
        train = features(model, task.train.images), task.train.labels
        test = self.features(subject, "CIFAR-10"), task.test.labels
        return {
            "linear probe, CIFAR-10": probe_accuracy(*train, *test),
            "k-NN, CIFAR-10": knn_accuracy(*train, *test),
            "CamVid, mean IoU": segmentation_iou(model, self.scenes),
        }

    def point(self, **settings: Any) -> dict[str, Any]:
        """A mark made with other settings: what `embed` says, what it costs photographs, how it reads."""
        embedding, said = self.embedded(**settings)
        photographs = self.cosine(features(embedding.model, self.photographs[1]), "photographs")
        return {"said": said, "photographs": photographs} | _read(
            embedding.model, embedding.watermark, exhaustive=True
        )

    def suspects(self) -> Iterator[tuple[str, Callable[[], nn.Module], bool]]:
        """Every suspect by name, and whether it is one that a probe judges."""
        attacks = {attack.name: attack for attack in suite("full", self.depth)}
        for name in SUSPECTS:
            attack = attacks[name]
            tuned = attack.family == "fine-tuning"
            title = name if attack.run is None else f"{attack.family}: {name}"
            yield f"marked, {title}", lambda attack=attack: self.attacked(attack, self.marked[0]), tuned
            if self.arguments.original or attack.run is None:
                yield f"original, {title}", lambda attack=attack: self.attacked(attack, self.original), False
        yield "original, under another key", self.other, False
        yield "independent weights", lambda: self.model.fresh(0).to(self.arguments.device), False

    def attacked(self, attack: Attack, model: nn.Module) -> nn.Module:
        if attack.run is None:
            return model
        other = {} if attack.other is None else {"other": self.original}
        return attack.run(model, self.images[0], 0, attack.strength, **attack.settings, **other)

    def other(self) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return activemark_fast.embed(self.original, OTHER_OWNER).model

    def judged(self, suspect: nn.Module, probed: bool, exhaustive: bool) -> dict[str, Any]:
        row = _read(suspect, self.marked[1], exhaustive)
        if probed:
            task = self.images[1]
            train, test = (features(suspect, part.images) for part in (task.train, task.test))
            row["probe"] = probe_accuracy(train, task.train.labels, test, task.test.labels)
        return row


def _read(suspect: nn.Module, watermark: Watermark, exhaustive: bool) -> dict[str, Any]:
    verdict = verify(suspect, watermark, OWNER, exhaustive=exhaustive)
    told = {name: value for name, value in verdict.to_dict().items() if name != "bit_errors"}
    return told | {"wrong_bits": float(verdict.bit_errors.mean()) if verdict.images else None}


def page(benches: list[Bench]) -> str:
    """docs/evidence.md."""
    parts = [
        "# Evidence\n",
        "Made by the commands below, nothing is written by hand. R is the share of the key's images of which "
        "at most 5 of 32 bits are read wrongly (loud band); p the exact p-value of both bands; paid: after "
        "all that an owner could have chosen is paid for, which is what a verdict goes by. Fine-tuning: "
        "AdamW, 3 epochs, batches of 16.\n",
    ]
    for bench in benches:
        record = bench.record
        parts += [f"## {bench.model.name}, {bench.codec} codec\n", *record.get("made by", [])]
        parts += _embedding(record)
        parts += _utility(record, bench.columns)
        parts += _suspects(record)
        parts += _curve(record, bench.columns)
    return "\n".join(parts)


def _named(record: dict[str, Any], part: str) -> dict[str, Any]:
    """What was measured of a part, by name."""
    return {name.partition(", ")[2]: row for name, row in record.items() if name.startswith(f"{part}, ")}


def _embedding(record: dict[str, Any]) -> Iterator[str]:
    if "embedding" not in record:
        yield "Not measured.\n"
        return
    said = record["embedding"]
    yield f"`embed` said, after {said['seconds']:.1f} s and {said['steps']} gradient steps:\n"
    yield f"- site: {said['site']}"
    yield f"- clean images: {said['clean']}"
    kept = ", ".join(
        f"{name.replace('_', ' ')} {mean:.4f} ({tail:.4f})" for name, (mean, tail) in said["features"].items()
    )
    yield f"- fidelity {said['fidelity']:.4f}, 5th percentile {said['fidelity_tail']:.4f}: {kept}"
    margins = f"margin {said['margin']:.2f}, of the natural band {said['natural_margin']:.2f}"
    unmarked = f"{said['original_detection_rate']:.3f} on the original"
    yield f"- {margins}; R {said['detection_rate']:.3f}, {unmarked}"
    yield from (f"- warned: {warning}" for warning in said["warnings"])
    yield ""


def _utility(record: dict[str, Any], columns: tuple[str, ...]) -> Iterator[str]:
    yield "### What it costs\n"
    utility, cosines = _named(record, "utility"), _named(record, "cosine")
    rows = {f"no images given: {name}": row for name, row in cosines.items()}
    if "given" in record:
        rows["photographs given: other photographs"] = record["given"]["photographs"]
    if not rows and not utility:
        yield "Not measured.\n"
        return
    sizes = record["sizes"]
    if rows:
        yield (
            "Cosine to the original's features on images that the marking never saw, mean (5th percentile); "
            f"{sizes['natural']} photographs, {sizes['probe'][1]} images of CIFAR-10 enlarged, "
            f"{sizes['scenes'][1]} street scenes.\n"
        )
        yield f"| | {' | '.join(columns)} |"
        yield f"|---{'|---' * len(columns)}|"
        for name, row in rows.items():
            cells = " | ".join("{:.4f} ({:.4f})".format(*row[column]) for column in columns)
            yield f"| {name} | {cells} |"
        yield ""
    if len(utility) == 2:
        yield (
            f"Probe and neighbours on {sizes['probe'][0]} images, tested on {sizes['probe'][1]}; a linear "
            f"probe of patches on {sizes['scenes'][0]} scenes, tested on {sizes['scenes'][1]}.\n"
        )
        yield "| | original | marked | points |"
        yield "|---|---|---|---|"
        for name, before in utility["original"].items():
            after = utility["marked"][name]
            yield f"| {name} | {before:.4f} | {after:.4f} | {100 * (after - before):+.2f} |"
        yield ""


def _suspects(record: dict[str, Any]) -> Iterator[str]:
    yield "### Suspects\n"
    rows = _named(record, "suspect")
    if not rows:
        yield "Not measured.\n"
        return
    tuned = {name: row for name, row in rows.items() if "probe" in row}
    if tuned:
        best = max(row["probe"] for row in tuned.values())
        useful = [row for row in tuned.values() if row["probe"] >= KEPT_ACCURACY * best]
        held = sum(row["p_value"] is not None and row["p_value"] <= 1e-9 for row in useful)
        rate = min(row["detection_rate"] for row in useful)
        yield (
            f"Fine-tuned on {record['sizes']['tuning']} images of CIFAR-10; the probe is fitted to others. "
            f"Of {len(useful)} settings that keep {KEPT_ACCURACY:.0%} of the best probe ({best:.3f}), p is "
            f"at most 1e-9 in {held}, and R at least {rate:.3f}.\n"
        )
    yield ("All images are read of what is as released; of others as many as `verify` reads.\n")
    yield "| suspect | verdict | images | R | wrong bits | p | paid | loud band | natural band | probe |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, row in rows.items():
        cells = [
            name,
            row["decision"],
            str(row["images"]),
            _told(row["detection_rate"], ".3f"),
            _told(row["wrong_bits"], ".2f"),
            _told(row["p_value"], ".1e"),
            _told(row["paid_p_value"], ".1e"),
            *(_told(row["bands"].get(band), ".1e") for band in ("loud", "natural")),
            _told(row.get("probe"), ".3f"),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _curve(record: dict[str, Any], columns: tuple[str, ...]) -> Iterator[str]:
    rows = _named(record, "curve")
    if not rows:
        return
    yield "### Against the fidelity asked for\n"
    yield "Read from the model as released. Cosines: photographs, mean (5th percentile).\n"
    yield f"| asked | said | margin | natural | R | p | natural band | {' | '.join(columns)} |"
    yield f"|---|---|---|---|---|---|---{'|---' * len(columns)}|"
    for fidelity, row in rows.items():
        said = row["said"]
        cells = [
            fidelity,
            f"{said['fidelity']:.4f} ({said['fidelity_tail']:.4f})",
            f"{said['margin']:.2f}",
            f"{said['natural_margin']:.2f}",
            _told(row["detection_rate"], ".3f"),
            _told(row["p_value"], ".1e"),
            _told(row["bands"].get("natural"), ".1e"),
            *("{:.4f} ({:.4f})".format(*row["photographs"][column]) for column in columns),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _told(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_models(parser)
    for name in ("data", "segmentation", "photographs", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--codec", choices=["keyed", "learned"], default="keyed")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS[:-1], help="what is measured now")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of suspects")
    parser.add_argument("--original", action="store_true", help="attack the unmarked original, too")
    parser.add_argument("--tuning", type=int, default=4000, help="images to fine-tune on")
    parser.add_argument("--probe", type=int, nargs=2, default=(10_000, 4000), metavar=("TRAIN", "TEST"))
    parser.add_argument("--scenes", type=int, nargs=2, default=(367, 233), metavar=("TRAIN", "TEST"))
    parser.add_argument("--natural", type=int, default=500, help="photographs to compare features on")
    arguments = parser.parse_args()
    benches = [Bench(model, arguments) for model in models(arguments.vfm)]
    for bench in benches:
        bench.measure(arguments.parts)
    arguments.out.write_text(page(benches), encoding="utf-8")


if __name__ == "__main__":
    main()
