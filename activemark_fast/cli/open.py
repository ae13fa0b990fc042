"""activemark open: check that a key and a watermark are the committed ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from activemark_fast.cli.common import Outcome, Subparsers, add_command, add_key, read_key

if TYPE_CHECKING:
    from activemark_fast.commitment import Commitment


def add_to(commands: Subparsers) -> None:
    """Adds `open` to the command line."""
    opening = add_command(
        commands,
        "open",
        _open,
        "tell whether a key and a watermark, or a model, are the committed ones, and since when",
        epilog="Exit codes: 0 committed, 1 not committed, 2 error.",
    )
    opening.add_argument("commitment", type=Path, metavar="COMMITMENT", help="what activemark commit wrote")
    what = opening.add_mutually_exclusive_group(required=True)
    what.add_argument("--watermark", type=Path, metavar="FILE", help="what embed wrote")
    what.add_argument("--model", metavar="MODEL", help="the model, as it was committed to")
    add_key(opening)
    add_timestamp(opening)


def add_timestamp(command: argparse.ArgumentParser) -> None:
    """The options --timestamp and --authority."""
    command.add_argument(
        "--timestamp", type=Path, metavar="FILE.tsr", help="RFC 3161 response for the commitment"
    )
    command.add_argument(
        "--authority",
        type=Path,
        metavar="FILE.pem",
        help="root certificate of the timestamping authority; without it the time is not checked",
    )


def read_commitment(path: Path, args: argparse.Namespace) -> Commitment:
    """The commitment in a file, with the timestamp that the options name."""
    from activemark_fast.commitment import Commitment

    if args.authority is not None and args.timestamp is None:
        raise ValueError("--authority: wanted with --timestamp only")
    return Commitment.load(path, args.timestamp, args.authority)


def _open(args: argparse.Namespace) -> Outcome:
    from activemark_fast.commitment import Opening
    from activemark_fast.watermark import Watermark

    commitment = read_commitment(args.commitment, args)
    if args.model is not None:
        from activemark_fast.descent import Sketch

        digest = Sketch.of(args.model).digest()
        opening = Opening.of_model(commitment, read_key(args.key, confirm=False), digest)
    else:
        watermark = Watermark.load(args.watermark)
        key = read_key(args.key, confirm=False)
        watermark.check(key)
        opening = Opening.of(commitment, key, watermark)
    record = {"commitment_file": str(args.commitment), **opening.to_dict()}
    return Outcome(0 if opening.committed else 1, record, str(opening))
