"""activemark key new, key derive: make keys."""

from __future__ import annotations

import argparse
from pathlib import Path

from activemark_fast.cli.common import Outcome, Subparsers, add_command, add_key, check_folder, read_key


def add_to(commands: Subparsers) -> None:
    """Adds `key new` and `key derive` to the command line."""
    key = commands.add_parser("key", help="make keys", description="make keys", allow_abbrev=False)
    keys = key.add_subparsers(title="commands", metavar="COMMAND", required=True)
    new = add_command(keys, "new", _new, "write a new random key, readable by its owner only")
    new.add_argument("path", metavar="PATH", type=Path, help="the key file; nothing is ever overwritten")
    derive = add_command(
        keys, "derive", _derive, "write a sub-key, which can be shown without showing the key or another"
    )
    derive.add_argument("path", metavar="PATH", type=Path, help="the key file; nothing is ever overwritten")
    add_key(derive)
    derive.add_argument("--label", required=True, metavar="TEXT", help="what tells it from other sub-keys")


def _derive(args: argparse.Namespace) -> Outcome:
    check_folder("PATH", args.path)
    key = read_key(args.key, confirm=True)
    key.subkey(args.label).write(args.path)
    return Outcome(0, {"key": str(args.path)}, f"new sub-key: {args.path}")


def _new(args: argparse.Namespace) -> Outcome:
    from activemark_fast.key import Key

    Key.write_new(args.path)
    return Outcome(0, {"key": str(args.path)}, f"new key: {args.path}", "Keep it secret, and keep a copy.")
