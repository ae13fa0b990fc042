"""activemark open: check that a key and a watermark, a model or a recipient are the committed ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from activemark_fast.cli.common import Outcome, Subparsers, add_command, add_key, check_folder, read_key

if TYPE_CHECKING:
    from activemark_fast.commitment import Commitment


def add_to(commands: Subparsers) -> None:
    """Adds `open` to the command line."""
    opening = add_command(
        commands,
        "open",
        _open,
        "tell whether a key and a watermark, a model or a recipient are the committed ones, and since when",
        epilog="Exit codes: 0 committed, 1 not committed, 2 error.",
    )
    opening.add_argument("commitment", type=Path, metavar="COMMITMENT", help="what activemark commit wrote")
    what = opening.add_mutually_exclusive_group(required=True)
    what.add_argument("--watermark", type=Path, metavar="FILE", help="what embed wrote")
    what.add_argument("--model", metavar="MODEL", help="the model, as it was committed to")
    what.add_argument(
        "--register",
        type=Path,
        metavar="FILE",
        help="the recipients, as they were committed to; with --recipient and --proof",
    )
    what.add_argument(
        "--recipient-proof",
        type=Path,
        metavar="FILE.json",
        help="what --proof wrote: it opens one recipient, and takes no key",
    )
    opening.add_argument("--recipient", metavar="NAME", help="which recipient of --register is opened")
    opening.add_argument(
        "--proof", type=Path, metavar="FILE.json", help="written: opens --recipient without key and register"
    )
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

    of_recipient = (args.register, args.recipient, args.proof)
    if None in of_recipient and any(part is not None for part in of_recipient):
        raise ValueError("--register, --recipient, --proof: wanted all three or none of them")
    if args.proof is not None:
        check_folder("--proof", args.proof)
        if args.proof.exists():
            raise ValueError(f"--proof: {args.proof} exists")
    commitment = read_commitment(args.commitment, args)
    record: dict[str, object] = {"commitment_file": str(args.commitment)}
    if args.register is not None:
        from activemark_fast.tracing import RecipientProof, Register

        key = read_key(args.key, confirm=False)
        proof = RecipientProof.of(Register.load(args.register, key), key, args.recipient)
        opening = Opening.of_recipients(commitment, proof.root())
        if opening.committed:
            proof.save(args.proof)
            record["proof"] = str(args.proof)
    elif args.recipient_proof is not None:
        from activemark_fast.tracing import RecipientProof

        proof = RecipientProof.load(args.recipient_proof)
        opening = Opening.of_recipients(commitment, proof.root())
        record["recipient"] = proof.name
    elif args.model is not None:
        from activemark_fast.descent import Sketch

        digest = Sketch.of(args.model).digest()
        opening = Opening.of_model(commitment, read_key(args.key, confirm=False), digest)
    else:
        watermark = Watermark.load(args.watermark)
        key = read_key(args.key, confirm=False)
        watermark.check(key)
        opening = Opening.of(commitment, key, watermark)
    record |= opening.to_dict()
    text = f"recipient {record['recipient']}: {opening}" if "recipient" in record else str(opening)
    return Outcome(0 if opening.committed else 1, record, text)
