"""activemark verify-many: tell which of many suspects carry the mark."""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections import Counter
from pathlib import Path
from typing import Any

from activemark_fast.cli.common import (
    Outcome,
    Subparsers,
    add_command,
    add_compute,
    add_decision,
    add_images,
    add_key,
    add_register,
    add_watermark,
    check_folder,
    chosen_device,
    decision_settings,
    printable,
    read_key,
    read_register,
    shows_progress,
)
from activemark_fast.cli.open import add_timestamp, read_commitment

MATCHED = 4
_OUTCOMES = ("match", "no match", "inconclusive", "not a model", "error")
_SHOWN = 50
"""Matches that are named, and errors; the journal has them all."""
_SUFFIXES_SHOWN = 10


def add_to(commands: Subparsers) -> None:
    """Adds `verify-many` to the command line. Long, for it is a table of options."""
    many = add_command(
        commands,
        "verify-many",
        _verify_many,
        "tell which of many suspects carry the mark",
        epilog="Exit codes: 0 all suspects were judged, 2 some could not be read, or another error, 4 with "
        "--fail-on-match: at least one matches, whatever became of the others.",
    )
    many.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="checkpoint files, safetensors or torch, never unpickled; folders of them or of Hugging Face "
        "models, searched to the bottom; globs",
    )
    add_watermark(many)
    add_key(many)
    add_images(many, "those the model was marked with")
    many.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="journal: each result is on the disk before the next is begun",
    )
    many.add_argument("--resume", action="store_true", help="go on with the journal that is there")
    many.add_argument(
        "--fail-on-match", action="store_true", help="exit with 4 if the journal has a match, such as for CI"
    )
    many.add_argument("--csv", type=Path, metavar="FILE", help="at the end, the journal as a table")
    many.add_argument(
        "--architecture",
        metavar="STRING",
        help="what all suspects are loaded into, a model string without @PATH; by default what the marked "
        "model is",
    )
    add_decision(many)
    many.add_argument(
        "--commitment", type=Path, metavar="FILE", help="tell whether the claim was committed to, and when"
    )
    add_timestamp(many)
    add_register(many, required=False)
    many.add_argument(
        "--power",
        type=float,
        default=0.999,
        metavar="P",
        help="chance that a suspect with a faint mark (12 of 32 bits wrong) is not given up early (0.999)",
    )
    many.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        help="most bytes of one suspect in memory (an eighth of the machine's memory)",
    )
    many.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="give a suspect up that takes longer: an error in its line, and the sweep goes on",
    )
    many.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: the workers of a Ray cluster, one for each GPU; needs --key, readable on all of them",
    )
    add_compute(many)


def _verify_many(args: argparse.Namespace) -> Outcome:
    _check_arguments(args)
    from activemark_fast.bulk import find_suspects, read_journal, verify_many
    from activemark_fast.files import write_whole
    from activemark_fast.progress import Progress
    from activemark_fast.watermark import Watermark

    watermark = Watermark.load(args.watermark)
    commitment = None if args.commitment is None else read_commitment(args.commitment, args)
    key = read_key(args.key, confirm=False)
    passed_by: Counter[str] = Counter()
    suspects = list(find_suspects(args.paths, passed_by))
    if not suspects:
        raise ValueError(f"PATH: wanted checkpoints, found none in {', '.join(args.paths)}")
    results = verify_many(
        suspects,
        watermark,
        key if args.engine == "local" else args.key,
        args.architecture,
        args.images,
        power=None if args.exhaustive else args.power,
        device=chosen_device(args.device),
        commitment=commitment,
        register=read_register(args.register, key),
        precision=args.precision,
        max_bytes=args.max_bytes,
        timeout=args.timeout,
        journal=args.out,
        resume=args.resume,
        engine=args.engine,
        **decision_settings(args),
    )
    started = time.perf_counter()
    matches = errors = done = 0
    earlier = {record["suspect"] for record in read_journal(args.out)}
    with Progress(shows_progress(args)) as bar:
        bar.stage("suspects", sum(suspect.name not in earlier for suspect in suspects))
        for result in results:
            done += 1
            matches += result.verdict is not None and result.verdict.decision == "match"
            errors += result.error is not None
            minutes = (time.perf_counter() - started) / 60
            bar.advance(matches=matches, errors=errors, per_minute=done / minutes)
    records = read_journal(args.out)
    if args.csv is not None:
        write_whole(args.csv, _csv(records).encode())
    counts = Counter(_outcome(record) for record in records)
    record = {
        "journal": str(args.out),
        "suspects": len(records),
        **{name.replace(" ", "_"): counts[name] for name in _OUTCOMES},
        "judged_now": done,
        "other_files": sum(passed_by.values()),
        "seconds": time.perf_counter() - started,
    }
    code = MATCHED if args.fail_on_match and counts["match"] else 2 if counts["error"] else 0
    suffixes = sorted(suffix for suffix, _ in passed_by.most_common(_SUFFIXES_SHOWN))
    hint = f"not looked at: {sum(passed_by.values())} files with other suffixes ({', '.join(suffixes)})"
    return Outcome(code, record, _table(records, counts), hint if passed_by else "")


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuses, before any work, arguments that do not go together."""
    check_folder("--out", args.out)
    if args.csv is not None:
        check_folder("--csv", args.csv)
        if args.csv.resolve() == args.out.resolve():
            raise ValueError(f"--out, --csv: wanted two files, got {args.out} for both")
    if args.timestamp is not None and args.commitment is None:
        raise ValueError("--timestamp: wanted with --commitment only")
    if args.engine == "ray" and args.key is None:
        raise ValueError("--key: wanted a key file, which all workers can read, with --engine ray")


def _outcome(record: dict[str, Any]) -> str:
    if record["verdict"] is not None:
        return str(record["verdict"]["decision"])
    return "error" if record.get("skipped") is None else "not a model"


def _table(records: list[dict[str, Any]], counts: Counter[str]) -> str:
    """The counts, the suspects that match and what could not be read, as text."""
    lines = [f"{name:<12} {counts[name]:>7}" for name in _OUTCOMES]
    lines.append(f"{'suspects':<12} {len(records):>7}")
    matches = [record for record in records if _outcome(record) == "match"]
    for record in matches[:_SHOWN]:
        p_value = record["verdict"]["p_value"]
        lines.append(
            f"match{'' if p_value is None else f', p = {p_value:.2g}'}: {printable(record['suspect'])}"
            f"{_accused(record)}"
        )
    if len(matches) > _SHOWN:
        lines.append(f"and {len(matches) - _SHOWN} more matches in the journal")
    errors = [record for record in records if _outcome(record) == "error"]
    for record in errors[:_SHOWN]:
        told = record["error"].removeprefix(f"{record['suspect']}: ")
        lines.append(f"error: {printable(record['suspect'])}: {printable(told)}")
    if len(errors) > _SHOWN:
        lines.append(f"and {len(errors) - _SHOWN} more errors in the journal")
    return "\n".join(lines)


def _accused(record: dict[str, Any]) -> str:
    """Whose copy it is, where that was asked for."""
    trace = record["verdict"].get("trace")
    if trace is None:
        return ""
    names = ", ".join(accused["name"] for accused in trace["accused"])
    return f", of {names}" if names else ", nobody's copy"


def _csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    columns = ("decision", "p_value", "detection_rate", "images", "identical", "reason")
    table = csv.writer(text)
    table.writerow(["suspect", *columns, "error", "skipped", "size", "modified", "seconds"])
    for record in records:
        verdict = record["verdict"] or {}
        table.writerow(
            [
                printable(record["suspect"]),
                *(verdict.get(column) for column in columns),
                *(record.get(column) for column in ("error", "skipped", "size", "modified", "seconds")),
            ]
        )
    return text.getvalue()
