"""activemark report: the evidence on a suspect, as one page for people."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from activemark_fast import __version__
from activemark_fast.cli.common import (
    Outcome,
    Subparsers,
    add_command,
    add_compute,
    add_images,
    add_key,
    add_register,
    add_watermark,
    check_output,
    read_key,
    read_register,
)
from activemark_fast.cli.open import add_timestamp, read_commitment
from activemark_fast.cli.suspect import add_suspect, judge
from activemark_fast.cli.verify import EXIT_CODES
from activemark_fast.defaults import ALPHA

if TYPE_CHECKING:
    from activemark_fast.verdict import Verdict
    from activemark_fast.watermark import Watermark


def add_to(commands: Subparsers) -> None:
    """Adds `report` to the command line."""
    report = add_command(
        commands,
        "report",
        _report,
        "write the evidence on a suspect as one HTML page that needs no network",
        epilog="Exit codes: as verify.",
    )
    add_suspect(report)
    add_watermark(report)
    add_key(report)
    add_images(report, "those the model was marked with")
    report.add_argument(
        "--journal",
        type=Path,
        metavar="FILE.jsonl",
        help="take the verdict on SUSPECT from this journal of verify-many: nothing is read, no key needed",
    )
    report.add_argument(
        "--evaluation", type=Path, metavar="DIR", help="what evaluate wrote: what the mark survives and costs"
    )
    report.add_argument(
        "--original",
        metavar="MODEL",
        help="the owner's model: what the weights alone say of a descent is shown beside the mark",
    )
    report.add_argument("--commitment", type=Path, metavar="FILE", help="what was published before release")
    add_timestamp(report)
    add_register(report, required=False)
    report.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page")
    add_compute(report)


def _report(args: argparse.Namespace) -> Outcome:
    check_output("--out", args.out, ".html")
    if args.timestamp is not None and args.commitment is None:
        raise ValueError("--timestamp: wanted with --commitment only")
    if args.journal is not None and args.commitment is not None:
        raise ValueError("--commitment: wanted without --journal, which says what was found of one")
    from activemark_fast.backbone import NotAViTError
    from activemark_fast.descent import compare
    from activemark_fast.evaluation import Evaluation
    from activemark_fast.files import write_whole
    from activemark_fast.profiling import profile
    from activemark_fast.report import Evidence, evidence_page
    from activemark_fast.watermark import Watermark

    watermark = Watermark.load(args.watermark)
    evaluation = None if args.evaluation is None else Evaluation.load(args.evaluation)
    if evaluation is not None and evaluation.header["watermark"] != watermark.mac.hex():
        raise ValueError(f"--evaluation: {args.evaluation} is about another watermark than {args.watermark}")
    whole = measured = None
    if args.journal is not None:
        verdict, record = _journalled(args, watermark)
        text = str(verdict)
    else:
        commitment = None if args.commitment is None else read_commitment(args.commitment, args)
        key = read_key(args.key, confirm=False)
        shown = {"register": read_register(args.register, key), "alpha": ALPHA, "tau": None, "align": None}
        judged = judge(args, watermark, key, commitment, exhaustive=True, **shown)
        verdict, record, text = judged.verdict, judged.record, judged.text
        whole = judged.whole(watermark, args)
        with suppress(NotAViTError):  # the verdict says what is wrong with it
            measured = None if whole is None else profile(whole, precision=args.precision)
    descent = None if args.original is None else compare(args.original, whole or args.suspect)
    page = evidence_page(
        Evidence(
            suspect=args.suspect,
            verdict=verdict,
            site=watermark.site,
            profile=measured,
            evaluation=evaluation,
            command=_command(args),
            facts=_facts(args, watermark.fingerprint) | _original_facts(args),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            descent=descent,
        )
    )
    write_whole(args.out, page.encode(), mode=0o644)
    record = {"page": str(args.out), "suspect": args.suspect, **record}
    if descent is not None:
        record["descent"] = descent.to_dict()
    return Outcome(EXIT_CODES[verdict.decision], record, text, f"  page: {args.out}")


def _journalled(args: argparse.Namespace, watermark: Watermark) -> tuple[Verdict, dict[str, object]]:
    """The verdict that the journal has on the suspect, and what it says besides, as JSON types."""
    from activemark_fast.bulk import journal_line, memory_limit
    from activemark_fast.checkpoints.files import Checkpoint
    from activemark_fast.verdict import Verdict

    path = Path(os.path.abspath(args.suspect))
    line = journal_line(args.journal, str(path), watermark.digest().hex())
    if line["verdict"] is None:
        raise ValueError(f"{args.journal}: has no verdict on {path}: {line['error'] or line['skipped']}")
    try:
        verdict = Verdict.from_dict(line["verdict"])
    except ValueError as error:
        raise ValueError(f"{args.journal}: its line on {path} holds {error}") from error
    if path.exists():
        with Checkpoint(path, memory_limit()) as checkpoint:
            if (checkpoint.size, checkpoint.modified) != (line["size"], line["modified"]):
                raise ValueError(f"{path}: was changed after the journal was written: read it again")
    return verdict, {**line["verdict"], "tensors": line["tensors"], "towers": line["towers"]}


def _command(args: argparse.Namespace) -> str:
    """The command that reads the mark again; the key is named by its place only."""
    command = "verify" if args.register is None else "trace"
    words = ["activemark", command, args.suspect, "--watermark", str(args.watermark)]
    if args.key is not None:
        words += ["--key", str(args.key)]
    for name in ("register", "images", "architecture", "commitment", "timestamp", "authority"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    if args.journal is None:  # the page's figures are of all images
        words.append("--exhaustive")
    return shlex.join(words)


def _facts(args: argparse.Namespace, fingerprint: str) -> dict[str, str]:
    facts = {}
    weights = Path(args.suspect.partition("@")[2] or args.suspect)
    if weights.is_file():
        facts[f"SHA-256 of {weights.name}"] = _sha256(weights)
    for file in (args.watermark, args.journal):
        if file is not None:
            facts[f"SHA-256 of {file.name}"] = _sha256(file)
    if args.journal is not None:
        facts["Where the verdict is from"] = f"{args.journal.name}, which verify-many wrote; not read again"
    facts["Fingerprint of the marked model's weights"] = fingerprint
    facts["Versions"] = (
        f"activemark_fast {__version__}, Python {platform.python_version()}, torch {version('torch')}"
    )
    return facts


def _original_facts(args: argparse.Namespace) -> dict[str, str]:
    if args.original is None:
        return {}
    facts = {"What compares the weights": shlex.join(["activemark", "compare", args.original, args.suspect])}
    weights = Path(args.original.partition("@")[2] or args.original)
    if weights.is_file():
        facts[f"SHA-256 of {weights.name}"] = _sha256(weights)
    return facts


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
