"""activemark verify: tell whether a suspect carries the mark."""

from __future__ import annotations

import argparse
from pathlib import Path

from activemark_fast.cli.common import (
    Outcome,
    Subparsers,
    add_command,
    add_compute,
    add_decision,
    add_images,
    add_key,
    add_watermark,
    check_output,
    decision_settings,
    read_key,
    write_figure,
)
from activemark_fast.cli.open import add_timestamp, read_commitment
from activemark_fast.cli.suspect import add_suspect, judge

EXIT_CODES = {"match": 0, "no match": 1, "inconclusive": 3}
HINT = "activemark compare ORIGINAL SUSPECT tells what the weights alone say of a descent"


def add_to(commands: Subparsers) -> None:
    """Adds `verify` to the command line."""
    verify = add_command(
        commands,
        "verify",
        _verify,
        "tell whether a suspect carries the mark",
        epilog="Exit codes: 0 match, 1 no match, 2 error, 3 inconclusive.",
    )
    add_suspect(verify)
    add_watermark(verify)
    add_key(verify)
    add_images(verify, "those the model was marked with")
    add_decision(verify)
    verify.add_argument(
        "--commitment", type=Path, metavar="FILE", help="tell whether the claim was committed to, and when"
    )
    add_timestamp(verify)
    verify.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the bit errors")
    add_compute(verify)


def _verify(args: argparse.Namespace) -> Outcome:
    if args.plot is not None:
        check_output("--plot", args.plot, ".png")
    if args.timestamp is not None and args.commitment is None:
        raise ValueError("--timestamp: wanted with --commitment only")
    from activemark_fast.watermark import Watermark

    watermark = Watermark.load(args.watermark)
    key = read_key(args.key, confirm=False)
    commitment = None if args.commitment is None else read_commitment(args.commitment, args)
    judged = judge(args, watermark, key, commitment, args.exhaustive, **decision_settings(args))
    hints = []
    if judged.verdict.decision == "inconclusive":
        hints.append(f"  {HINT}")
    if args.plot is not None:
        from activemark_fast.report import verdict_figure

        write_figure(verdict_figure(judged.verdict), args.plot)
        hints.append(f"  drawn in {args.plot}")
    record = {"suspect": args.suspect, **judged.record}
    return Outcome(EXIT_CODES[judged.verdict.decision], record, judged.text, "\n".join(hints))
