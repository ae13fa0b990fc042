"""activemark commit: write what is published before a release."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from activemark_fast.cli.common import (
    Outcome,
    Subparsers,
    add_command,
    add_key,
    check_folder,
    read_key,
    read_register,
)

if TYPE_CHECKING:
    from activemark_fast.key import Key
    from activemark_fast.watermark import Watermark


def add_to(commands: Subparsers) -> None:
    """Adds `commit` to the command line."""
    commit = add_command(
        commands,
        "commit",
        _commit,
        "commit to keys, watermarks, models and lists of recipients without showing them",
        epilog="Send the request to a timestamping authority, for example with "
        "curl -H 'Content-Type: application/timestamp-query' --data-binary @FILE.tsq URL > FILE.tsr",
    )
    commit.add_argument(
        "--watermark",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="may be given repeatedly",
    )
    commit.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="a model to be released, marked or not: its sketch is committed to, which `activemark open "
        "--model` makes again; repeatable",
    )
    commit.add_argument(
        "--register",
        type=Path,
        metavar="FILE",
        help="the recipients so far, of whom `activemark open --recipient` opens one without the others",
    )
    add_key(commit)
    commit.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="TEXT",
        help="of a sub-key (activemark key derive) that some of the watermarks were made with, and that the "
        "models can be opened with, too; repeatable",
    )
    commit.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the commitment, to be published"
    )
    commit.add_argument(
        "--timestamp-request", type=Path, metavar="FILE.tsq", help="also write an RFC 3161 request for it"
    )
    commit.add_argument("--force", action="store_true", help="replace output files that exist")


def _commit(args: argparse.Namespace) -> Outcome:
    if not args.watermark and not args.model and args.register is None:
        raise ValueError("--watermark, --model, --register: wanted at least one of them")
    outputs = [("--out", args.out)]
    if args.timestamp_request is not None:
        outputs.append(("--timestamp-request", args.timestamp_request))
    for name, path in outputs:
        check_folder(name, path)
        if path.exists() and not args.force:
            raise ValueError(f"{name}: {path} is there already; --force replaces it")
    if len({path.resolve() for _, path in outputs}) < len(outputs):
        raise ValueError(f"--out, --timestamp-request: wanted two files, got {args.out} for both")
    from activemark_fast.commitment import Commitment, timestamp_request
    from activemark_fast.files import write_whole
    from activemark_fast.tracing import recipients_root
    from activemark_fast.watermark import Watermark

    watermarks = [Watermark.load(path) for path in args.watermark]
    digests = []
    if args.model:
        from activemark_fast.descent import Sketch

        digests = [Sketch.of(model).digest() for model in args.model]
    owner = read_key(args.key, confirm=False)
    keys = [owner, *(owner.subkey(label) for label in args.label)]
    marks = [
        (_maker(path, watermark, keys), watermark)
        for path, watermark in zip(args.watermark, watermarks, strict=True)
    ]
    models = [(key, digest) for digest in digests for key in keys]
    register = read_register(args.register, owner)
    roots = [] if register is None else [recipients_root(register, owner)]
    commitment = Commitment.make(owner, marks, models, roots)
    commitment.save(args.out)
    record = {
        "commitment": str(args.out),
        "claims": len(commitment.claims),
        "public_key": commitment.public_key.hex(),
        "created": commitment.created,
    }
    lines = [
        f"commitment: {args.out} ({len(commitment.claims)} claims)",
        f"  signed by {commitment.public_key.hex()}",
    ]
    if args.timestamp_request is not None:
        write_whole(args.timestamp_request, timestamp_request(commitment.to_bytes()), mode=0o644)
        record["timestamp_request"] = str(args.timestamp_request)
        lines.append(f"  timestamp request: {args.timestamp_request}")
    return Outcome(
        0, record, "\n".join(lines), "Publish it, or have it timestamped, before the model is released."
    )


def _maker(path: Path, watermark: Watermark, keys: list[Key]) -> Key:
    """The key that `watermark` was made with."""
    from activemark_fast.watermark import WatermarkError

    for key in keys:
        try:
            watermark.check(key)
        except WatermarkError:
            continue
        return key
    raise ValueError(f"{path}: made neither with the key nor with a sub-key of a label that was given")
