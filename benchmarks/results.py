"""Makes docs/results.md: what a mark survives and costs, by attack, by block, by codec and beside baselines.

    python benchmarks/results.py --vfm ../shared/vfm --data ../shared/data/cifar10.npz \
        --segmentation ../shared/data/camvid.npz --work /tmp/results
    python benchmarks/results.py --vfm 'timm:VisionTransformer?{…}@dinov2.safetensors' --images 128 128 \
        --parts attacks --data ../shared/data/cifar10.npz --segmentation ../shared/data/camvid.npz \
        --work /tmp/results --out /tmp/dinov2.md

What has been measured stays in `--work`, and a run goes on from there; `--parts` without any makes the page
of that, which says what is missing.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from models import Model, add_models, made_by, models
from torch import nn

import activemark_fast
from activemark_fast.attacks import finetune, prune
from activemark_fast.attacks.suite import BATCH_SIZE
from activemark_fast.backbone import Backbone
from activemark_fast.baselines import Classifier, adv_tra, ipguard
from activemark_fast.checkpoints import load_model, save_model
from activemark_fast.datasets import Task, load_task, synthetic_task
from activemark_fast.evaluate import SIZES, Size, evaluate
from activemark_fast.evaluation import Evaluation
from activemark_fast.key import Key
from activemark_fast.normalisation import Preprocess
from activemark_fast.verification import verify
from activemark_fast.watermark import Watermark

OWNER = Key(b"evidence: the owner's key, 1")
ADV_TRA_SHARE = 0.05
"""Of ADV-TRA's 100 trajectories: all of them take hours on a CPU."""
PARTS = ("blocks", "attacks", "methods")
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
PUBLISHED = """As published (arXiv 2510.04966; its models, data and machine, not ours): minutes to protect one
model are 34.63 for ActiveMark, 1663.70 for ADV-TRA and 1868.54 for IPGuard."""


class Bench:
    """One model, its tasks, and the folder of what has been measured on it."""

    def __init__(self, model: Model, arguments: argparse.Namespace) -> None:
        self.name = model.name
        self.device: str = arguments.device
        self.original = model.load(self.device)
        self.architecture = model.architecture
        self.suite: str = arguments.suite
        self.jobs: int | None = arguments.jobs
        self.folder: Path = arguments.work / model.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.commands = self.folder / "commands.md"
        view = Backbone(self.original)
        self.depth, self.size = view.depth, Size(*arguments.images) if arguments.images else SIZES[self.suite]
        self.preprocess = view.preprocess
        self.sources: tuple[Path, Path] = arguments.data, arguments.segmentation

    def tasks(self) -> dict[str, Task]:
        size, (data, masks) = self.size, self.sources
        return {
            "similar": load_task(data, self.preprocess, size.train, size.test),
            "dissimilar": synthetic_task(self.preprocess, size.train, size.test),
            "segmentation": load_task(masks, self.preprocess, size.train, size.test),
        }

    def marked(self) -> tuple[nn.Module, Watermark]:
        """The model under the default embedding, which is made once."""
        record, weights, watermark = (
            self.folder / name for name in ("embedding.json", "marked.safetensors", "watermark.safetensors")
        )
        if not record.exists():
            embedding = activemark_fast.embed(self.original, OWNER)
            save_model(embedding.model, weights, self.architecture)
            embedding.watermark.save(watermark)
            measured = {"site": embedding.site_reason, "seconds": embedding.seconds}
            record.write_text(json.dumps(measured))
        return load_model(weights, device=self.device), Watermark.load(watermark)

    def measure(self, parts: Sequence[str]) -> None:
        """Parts of it, as far as they are not there yet."""
        if parts:
            with self.commands.open("a", encoding="utf-8") as file:
                file.write(f"{made_by(self.device)}\n")
        if "blocks" in parts:
            self.rows("blocks", map(str, range(self.depth - 2)), self.block)
        if "attacks" in parts:
            self.attack()
        if "methods" in parts:
            self.rows("methods", ("keyed", "learned", "IPGuard", "ADV-TRA"), self.method)

    def attack(self) -> None:
        model, watermark = self.marked()
        data, masks = self.sources
        evaluate(
            model,
            self.original,
            watermark,
            OWNER,
            self.folder / "attacks",
            tasks=self.tasks(),
            data=f"{data.name}; dissimilar: made images; segmentation: {masks.name}",
            name=self.name,
            suite_name=self.suite,
            jobs=self.jobs,
            progress=True,
        )

    def rows(self, part: str, names: Iterator[str] | tuple[str, ...], measure: Callable[[str], Any]) -> None:
        """Measures the rows of a part that are not in its file, and writes the file after each."""
        known = self.found(part)
        for name in names:
            if name not in known:
                known[name] = measure(name)
                (self.folder / f"{part}.json").write_text(json.dumps(known, indent=1))

    def found(self, part: str) -> dict[str, Any]:
        path = self.folder / f"{part}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def block(self, name: str) -> dict[str, Any]:
        """The default embedding at one block: its quality, the mark in it, pruned, and in the original."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that targets are missed is what the row says
            embedding = activemark_fast.embed(self.original, OWNER, block=int(name))
        pruned = prune(embedding.model, None, 0, 0.6)
        read = {
            suspect: verify(model, embedding.watermark, OWNER, align=False, exhaustive=True)
            for suspect, model in (
                ("marked", embedding.model),
                ("pruned", pruned),
                ("original", self.original),
            )
        }
        quality = embedding.quality
        return {
            "fidelity": quality.fidelity,
            "margin": quality.margin,
            **{
                suspect: {"R": verdict.detection_rate, "p": verdict.p_value}
                for suspect, verdict in read.items()
            },
        }

    def method(self, name: str) -> dict[str, float]:
        """Detection (or matching) rates of one method on the marked model's descendants and on innocents."""
        train = self.tasks()["similar"].train
        changes: dict[str, Callable[[nn.Module], nn.Module]] = {
            "as released": lambda model: model,
            "40 % pruned": lambda model: prune(model, None, 0, 0.4),
            "fine-tuned at 1e-4": lambda model: finetune(model, train, 0, batch_size=BATCH_SIZE),
        }
        if name in ("keyed", "learned"):
            if name == "keyed":
                model, watermark = self.marked()
            else:
                embedding = activemark_fast.embed(self.original, OWNER, codec="learned")
                model, watermark = embedding.model, embedding.watermark

            def rate(suspect: nn.Module) -> float:
                return verify(suspect, watermark, OWNER, align=False, exhaustive=True).detection_rate

        else:
            baseline = {"IPGuard": ipguard, "ADV-TRA": adv_tra}[name]
            model = self.original  # neither changes the model
            pixels = _unprepared(train.images, self.preprocess)
            fraction = ADV_TRA_SHARE if baseline is adv_tra else 1.0
            classifier = Classifier.fit(model, pixels, train.labels)
            fingerprint = baseline.generate(classifier, OWNER, pixels, fraction=fraction)

            def rate(suspect: nn.Module) -> float:
                fitted = Classifier.fit(suspect, pixels, train.labels)
                return baseline.verify(fitted, fingerprint).detection_rate

        rates = {change: rate(make(model)) for change, make in changes.items()}
        fresh = activemark_fast.attacks.reinitialise(self.original, None, 1, self.depth)
        if name in ("keyed", "learned"):
            rates["original"] = rate(self.original)
        rates["blocks re-initialised"] = rate(fresh)
        return rates


def _unprepared(images: Any, preprocess: Preprocess) -> Any:
    """Model input back to [0, 1]."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return (images * std + mean).clamp(0, 1)


def page(benches: list[Bench]) -> str:
    """docs/results.md."""
    parts = [
        "# Results\n",
        "Made by the commands below, nothing is written by hand. The suite is `activemark evaluate`'s. R is "
        "the share of trigger images of which at most 5 of 32 bits are read wrongly, p the exact p-value, "
        "before what an owner could choose is paid for. The images are small and few: accuracies are good to "
        "about three points.\n",
    ]
    for bench in benches:
        commands = bench.commands.read_text(encoding="utf-8") if bench.commands.exists() else ""
        parts += [f"## {bench.name}\n", commands, *_attacks(bench), *_blocks(bench), *_methods(bench)]
    return "\n".join([*parts, "## Published figures\n", PUBLISHED, ""])


def _attacks(bench: Bench) -> Iterator[str]:
    yield "### By attack\n"
    folder = bench.folder / "attacks"
    if not (folder / "results.json").exists():
        yield "Not measured.\n"
        return
    evaluation = Evaluation.load(folder)
    summary, header = evaluation.summary(), evaluation.header
    yield (
        f"Suite `{header['suite']}`, seed {header['seed']}, {header['images']['similar'][0]} training and "
        f"{header['images']['similar'][1]} test images, torch {header['versions']['torch']} on "
        f"{header['device']}. Found {summary['found']} of {summary['positives']}; accused "
        f"{summary['accused']} of {summary['negatives']} innocent readings. Fine-tuning that keeps 95 % of "
        f"the best accuracy: R of at least 0.95 in {summary['finetuning_held']} of {summary['finetuning']}.\n"
    )
    columns = ["attack", "R", "p", "p, original", "p, other key", "cosine", "cosine, original"]
    columns += ["probe", "probe, original", "own task"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in evaluation.rows:
        if (row["subject"], row["key"]) == ("marked", "owner"):
            original = evaluation.row(row["attack"], "original") or {}
            other = evaluation.row(row["attack"], "marked", "another") or {}
            cells = [
                f"{row['family']}: {row['attack']}",
                _fixed(row["detection_rate"]),
                _small(row["p_value"]),
                _small(original.get("p_value")),
                _small(other.get("p_value")),
                *(_fixed(r.get(name)) for name in ("cosine", "probe_accuracy") for r in (row, original)),
                _fixed(row["task_score"]),
            ]
            yield f"| {' | '.join(cells)} |"
    yield ""
    wanted = activemark_fast.attacks.suite.suite(bench.suite, bench.depth)
    missing = [a.name for a in wanted if evaluation.row(a.name) is None and a.name not in header["left_out"]]
    if missing:
        yield f"Not measured: {'; '.join(missing)}.\n"
    if summary["unexpected"]:
        yield f"Not as expected: {'; '.join(summary['unexpected'])}.\n"


def _blocks(bench: Bench) -> Iterator[str]:
    yield "### By block\n"
    rows = bench.found("blocks")
    if not rows:
        yield "Not measured.\n"
        return
    yield "The default edit at each block, whether it reaches its targets or not.\n"
    yield "| block | fidelity | margin | R | R, 60 % pruned | p, 60 % pruned | R, original | p, original |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in rows.items():
        cells = [
            name,
            f"{row['fidelity']:.4f}",
            f"{row['margin']:.2f}",
            _fixed(row["marked"]["R"]),
            _fixed(row["pruned"]["R"]),
            _small(row["pruned"]["p"]),
            _fixed(row["original"]["R"]),
            _small(row["original"]["p"]),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _methods(bench: Bench) -> Iterator[str]:
    yield "### Beside the learned codec and the baselines\n"
    rows = bench.found("methods")
    if not rows:
        yield "Not measured.\n"
        return
    yield (
        "Detection rates of the codecs, matching rates of the baselines (a copy is claimed above one half). "
        "The baselines look at a linear classifier on the features and mark nothing: what descends from the "
        f"original counts as a copy. ADV-TRA with {ADV_TRA_SHARE:.0%} of its trajectories.\n"
    )
    suspects = ["as released", "40 % pruned", "fine-tuned at 1e-4", "original", "blocks re-initialised"]
    yield f"| method | {' | '.join(suspects)} |"
    yield f"|---|{'---|' * len(suspects)}"
    for name, rates in rows.items():
        yield f"| {name} | {' | '.join(_fixed(rates.get(suspect)) for suspect in suspects)} |"
    yield ""


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_models(parser)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--segmentation", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--suite", choices=sorted(SIZES), default="quick")
    parser.add_argument(
        "--images", type=int, nargs=2, metavar=("TRAIN", "TEST"), help="of each task; as the suite's"
    )
    parser.add_argument("--jobs", type=int, help="attacks at a time")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what is measured now")
    arguments = parser.parse_args()
    benches = [Bench(model, arguments) for model in models(arguments.vfm)]
    for bench in benches:
        bench.measure(arguments.parts)
    arguments.out.write_text(page(benches), encoding="utf-8")


if __name__ == "__main__":
    main()
