"""activemark verify: tell whether a suspect carries the mark."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

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
    chosen_device,
    decision_settings,
    read_key,
    write_figure,
)
from activemark_fast.cli.open import add_timestamp, read_commitment
from activemark_fast.cli.suspect import Judged, add_suspect, judge, named_suspect, own_architecture

if TYPE_CHECKING:
    from activemark_fast.commitment import Commitment
    from activemark_fast.key import Key
    from activemark_fast.watermark import Watermark

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
        "--stream",
        action="store_true",
        help="for suspects larger than memory, or than the GPU's: a safetensors file or a folder of shards, "
        "read a block at a time; it has to fit the architecture as it is",
    )
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
    if args.stream:
        judged = _judge_stored(args, watermark, key, commitment)
    else:
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


def _judge_stored(
    args: argparse.Namespace, watermark: Watermark, key: Key, commitment: Commitment | None
) -> Judged:
    """`judge` over the files of the suspect."""
    from activemark_fast.bulk import SuspectResult
    from activemark_fast.giants import verify_stored

    named, path = named_suspect(args.suspect)
    if path is None:
        raise ValueError(f"--stream: wanted a suspect that is a file or a folder, got {args.suspect}")
    given = args.architecture or named or own_architecture(path, watermark)
    verdict = verify_stored(
        f"{given or watermark.architecture}@{path}",
        watermark,
        key,
        args.images,
        commitment=commitment,
        exhaustive=args.exhaustive,
        architecture=watermark.architecture if given is None else None,
        device=chosen_device(args.device),
        precision=args.precision,
        **decision_settings(args),
    )
    return Judged(SuspectResult(args.suspect, verdict), verdict, None, None, None)
