"""activemark evaluate: what a mark survives, and what each attack costs the model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activemark_fast.cli.common import (
    MODEL_HELP,
    Outcome,
    Subparsers,
    add_command,
    add_compute,
    add_images,
    add_key,
    add_watermark,
    check_folder,
    chosen_device,
    read_key,
    shows_progress,
    write_figure,
)
from activemark_fast.defaults import ALPHA

if TYPE_CHECKING:
    from activemark_fast.datasets import Task
    from activemark_fast.evaluate import Size
    from activemark_fast.evaluation import Evaluation
    from activemark_fast.normalisation import Preprocess


def add_to(commands: Subparsers) -> None:
    """Adds `evaluate` to the command line."""
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "attack the marked and the unmarked model in the same ways, and read the mark from all of them",
        epilog="Exit codes: 0 every reading as expected, 1 some not, 2 error.",
    )
    evaluate.add_argument("model", metavar="MODEL", help=f"the marked model: {MODEL_HELP}")
    evaluate.add_argument(
        "--original", required=True, metavar="MODEL", help="the model before it was marked, named likewise"
    )
    add_watermark(evaluate)
    add_key(evaluate)
    add_images(evaluate, "those the model was marked with")
    evaluate.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="labelled images to attack and to test with: a folder with one subfolder a class, or .npz; "
        "without, they are made",
    )
    evaluate.add_argument(
        "--segmentation",
        type=Path,
        metavar="FILE.npz",
        help="images with masks; without, none are attacked with",
    )
    evaluate.add_argument(
        "--suite",
        choices=("quick", "full", "adaptive"),
        default="quick",
        help="quick takes minutes, full hours; adaptive: a thief who knows the method, minutes (quick)",
    )
    evaluate.add_argument("--seed", type=int, default=0, metavar="N", help="of all attacks (0)")
    evaluate.add_argument("--jobs", type=int, metavar="N", help="attacks at a time (as many as CPUs)")
    evaluate.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for results.json and results.csv, and the adaptive suite's frontier.png; an interrupted "
        "evaluation goes on from there",
    )
    add_compute(evaluate)


def _evaluate(args: argparse.Namespace) -> Outcome:
    check_folder("--out", args.out)
    from activemark_fast.backbone import Backbone
    from activemark_fast.checkpoints import load_model
    from activemark_fast.evaluate import SIZES, evaluate
    from activemark_fast.watermark import Watermark

    watermark = Watermark.load(args.watermark)
    key = read_key(args.key, confirm=False)
    watermark.check(key)
    device = chosen_device(args.device)
    marked, original = (load_model(model, device=device) for model in (args.model, args.original))
    view = Backbone(original)
    tasks, data = _tasks(args.data, args.segmentation, view.preprocess, SIZES[args.suite])
    evaluation = evaluate(
        marked,
        original,
        watermark,
        key,
        args.out,
        images=args.images,
        tasks=tasks,
        data=data,
        name=args.model,
        suite_name=args.suite,
        seed=args.seed,
        jobs=args.jobs,
        device=device,
        precision=args.precision,
        progress=shows_progress(args),
    )
    summary = evaluation.summary()
    record = {"out": str(args.out), **summary, "header": evaluation.header, "rows": evaluation.rows}
    files = "results.json, results.csv"
    told = _told(summary)
    if args.suite == "adaptive":
        from activemark_fast.report import frontier_figure

        points = evaluation.frontier()
        write_figure(frontier_figure(points), args.out / "frontier.png")
        files += ", frontier.png"
        told += f"\n{_frontier(points)}"
        record["frontier"] = points
    hints = f"\nIn {args.out}: {files}. For people: activemark report --evaluation {args.out}"
    return Outcome(int(bool(summary["unexpected"])), record, f"{_table(evaluation)}\n\n{told}", hints)


def _tasks(
    data: Path | None, segmentation: Path | None, preprocess: Preprocess, size: Size
) -> tuple[dict[str, Task], str]:
    """The tasks by name, and in words what they are made of."""
    from activemark_fast.datasets import load_task, synthetic_task

    made = synthetic_task(preprocess, size.train, size.test)
    if data is None:
        tasks, told = {"similar": made}, "made images of leaves and clouds"
    else:
        read = load_task(data, preprocess, size.train, size.test)
        if read.train.dense:
            raise ValueError(f"--data: wanted one label an image, got masks in {data}; see --segmentation")
        tasks = {"similar": read, "dissimilar": made}
        told = f"{data.name}; dissimilar: made images of leaves and clouds"
    if segmentation is not None:
        masks = load_task(segmentation, preprocess, size.train, size.test)
        if not masks.train.dense:
            raise ValueError(f"--segmentation: wanted masks, got one label an image in {segmentation}")
        tasks["segmentation"] = masks
        told += f"; segmentation: {segmentation.name}"
    return tasks, told


def _table(evaluation: Evaluation) -> str:
    """One line an attack: the owner's reading of both models, the other key's, the descent, the utility."""
    head = ["attack", "marked", "R", "p-value", "original", "other key", "compare", "cosine", "probe", "task"]
    cells = [[*head, "images", "steps", "seconds"]]
    for row in evaluation.rows:
        if (row["subject"], row["key"]) != ("marked", "owner"):
            continue
        original = evaluation.row(row["attack"], "original")
        other = evaluation.row(row["attack"], "marked", "another")
        cells.append(
            [
                row["attack"],
                row["decision"] + ("" if row["as_expected"] else " (!)"),
                _number(row["detection_rate"], ".3f"),
                _number(row["p_value"], ".1e"),
                *(
                    "-" if r is None else r["decision"] + ("" if r["as_expected"] else " (!)")
                    for r in (original, other)
                ),
                "-" if row.get("descent") is None else f"{row['descent']} {row['descent_score']:.2f}",
                _number(row["cosine"], ".3f"),
                _number(row["probe_accuracy"], ".3f"),
                _number(row["task_score"], ".3f"),
                _number(row["images"], "d"),
                _number(row["steps"], "d"),
                _number(row["attack_seconds"], ".1f"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_line(line, widths) for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _frontier(points: Sequence[dict[str, Any]]) -> str:
    """How well the mark holds against the attacks that cost little."""
    lines = []
    for allowed in (1, 2):
        cheap = [p for p in points if p["lost"] <= allowed and p["p_value"] is not None]
        if cheap:
            worst = max(cheap, key=lambda p: p["p_value"])
            held = sum(p["p_value"] <= ALPHA for p in cheap)
            shown = sum(p["descent"] == "descent" for p in cheap)
            lines.append(
                f"attacks that cost at most {allowed} of 100 points of the probe: a match after {held} of "
                f"{len(cheap)}, `compare` still shows the descent after {shown}; worst p-value "
                f"{worst['p_value']:.1e} ({worst['attack']}: {worst['lost']:.1f} "
                f"points, R {worst['detection_rate']:.3f}, {worst['seconds']:.0f} s)"
            )
    return "\n".join(lines)


def _told(summary: dict[str, Any]) -> str:
    lines = [
        f"marked models found: {summary['found']} of {summary['positives']}",
        f"innocent models accused: {summary['accused']} of {summary['negatives']}",
        f"fine-tuning that keeps 95 % of the best accuracy: R of at least 0.95 in "
        f"{summary['finetuning_held']} of {summary['finetuning']}",
    ]
    lines += [f"not as expected (!): {name}" for name in summary["unexpected"]]
    return "\n".join(lines)
