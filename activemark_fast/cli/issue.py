"""activemark issue: copies of a marked model for recipients."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from activemark_fast.cli.common import (
    MODEL_HELP,
    Outcome,
    Subparsers,
    add_command,
    add_key,
    copy_paths,
    read_key,
    read_names,
    weights_path,
)

if TYPE_CHECKING:
    from torch import nn

    from activemark_fast.key import Key
    from activemark_fast.tracing import Register


def add_to(commands: Subparsers) -> None:
    """Adds `issue` to the command line."""
    issue = add_command(commands, "issue", _issue, "make copies of a marked model for further recipients")
    issue.add_argument("model", metavar="MODEL", help=f"the marked model, as embed wrote it: {MODEL_HELP}")
    issue.add_argument(
        "--register", type=Path, required=True, metavar="FILE", help="what embed wrote; it is added to"
    )
    issue.add_argument(
        "--recipients",
        type=Path,
        required=True,
        metavar="FILE",
        help="their names, one a line; who is in the register already gets the same copy again",
    )
    issue.add_argument(
        "--copies",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where the copies go, each named after its recipient",
    )
    add_key(issue)
    issue.add_argument("--force", action="store_true", help="replace copies that exist")


def _issue(args: argparse.Namespace) -> Outcome:
    from activemark_fast.tracing import Register, check_names

    names = check_names(read_names(args.recipients))
    paths = copy_paths(
        args.copies,
        names,
        (weights_path(args.model), args.register, args.recipients, args.key),
        force=args.force,
    )
    key = read_key(args.key, confirm=False)
    register = Register.load(args.register, key)
    before = len(register.names)
    register = register.added(names)
    from activemark_fast.checkpoints import architecture_of, load_model

    architecture = architecture_of(args.model)
    model = load_model(args.model)
    register.check_model(model)
    register.save(args.register, key)  # first: a copy whose recipient is not in it could not be traced
    seconds = write_copies(register, key, model, architecture, paths)
    added = len(register.names) - before
    record: dict[str, object] = {
        "copies": {name: str(path) for name, path in paths.items()},
        "added": added,
        "recipients": len(register.names),
        "seconds": seconds,
    }
    text = (
        f"{len(paths)} copies in {args.copies}, {seconds:.1f} s\n"
        f"  {added} new recipients, {len(register.names)} altogether in {args.register}"
    )
    return Outcome(0, record, text)


def write_copies(
    register: Register, key: Key, model: nn.Module, architecture: str, paths: dict[str, Path]
) -> float:
    """Writes the copies of the recipients in `paths`, each whole, and returns the seconds that took.

    model: the marked model; it is left as it was.
    """
    from activemark_fast.checkpoints import save_model
    from activemark_fast.dress import copied

    started = time.perf_counter()
    made = copied(model)
    for name, path in paths.items():
        made.load_state_dict(register.weights(key, model, name), strict=False)
        save_model(made, path, architecture)
    return time.perf_counter() - started
