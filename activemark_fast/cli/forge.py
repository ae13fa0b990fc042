"""activemark forge: play the thief who claims somebody else's model."""

from __future__ import annotations

import argparse

from activemark_fast.cli.common import (
    MODEL_HELP,
    Outcome,
    Subparsers,
    add_command,
    add_compute,
    chosen_device,
    shows_progress,
)


def add_to(commands: Subparsers) -> None:
    """Adds `forge` to the command line."""
    forge = add_command(
        commands,
        "forge",
        _forge,
        "try every way there is to claim a model that was not marked, and print what verify says of each",
        epilog="Exit codes: 0 no forgery counts as evidence, 1 one does, 2 error.",
    )
    forge.add_argument("suspect", metavar="SUSPECT", help=MODEL_HELP)
    forge.add_argument(
        "--minutes", type=float, default=10, metavar="T", help="time for all attempts together (10)"
    )
    forge.add_argument("--seed", type=int, default=0, metavar="N", help="of the forger's keys (0)")
    add_compute(forge)


def _forge(args: argparse.Namespace) -> Outcome:
    from activemark_fast.checkpoints import load_model
    from activemark_fast.forge import forge
    from activemark_fast.freedoms import EVIDENCE_AT

    forgery = forge(
        load_model(args.suspect),
        minutes=args.minutes,
        seed=args.seed,
        device=chosen_device(args.device),
        precision=args.precision,
        progress=shows_progress(args),
    )
    forged = forgery.smallest is not None and forgery.smallest <= EVIDENCE_AT
    return Outcome(int(forged), {"suspect": args.suspect, **forgery.to_dict()}, str(forgery))
