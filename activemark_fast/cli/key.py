"""activemark key new: make a key."""

from __future__ import annotations

import argparse
from pathlib import Path

from activemark_fast.cli.common import Outcome, Subparsers, add_command


def add_to(commands: Subparsers) -> None:
    """Adds `key new` to the command line."""
    key = commands.add_parser("key", help="make keys", description="make keys", allow_abbrev=False)
    keys = key.add_subparsers(title="commands", metavar="COMMAND", required=True)
    new = add_command(keys, "new", _new, "write a new random key, readable by its owner only")
    new.add_argument("path", metavar="PATH", type=Path, help="the key file; nothing is ever overwritten")


def _new(args: argparse.Namespace) -> Outcome:
    from activemark_fast.key import Key

    Key.write_new(args.path)
    return Outcome(0, {"key": str(args.path)}, f"new key: {args.path}", "Keep it secret, and keep a copy.")
