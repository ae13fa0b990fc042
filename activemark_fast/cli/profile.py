"""activemark profile: show where activations are massive."""

from __future__ import annotations

import argparse
from pathlib import Path

from activemark_fast.cli.common import (
    MODEL_HELP,
    Outcome,
    Subparsers,
    add_command,
    add_compute,
    add_tower,
    check_output,
    chosen_device,
    shows_progress,
    write_figure,
)


def add_to(commands: Subparsers) -> None:
    """Adds `profile` to the command line."""
    profile = add_command(
        commands, "profile", _profile, "show where a model's activations are massive, and where a mark goes"
    )
    profile.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    profile.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of images, of which up to 256 are run; without, 32 are made",
    )
    profile.add_argument("--out", type=Path, metavar="FILE.png", help="draw the profile")
    profile.add_argument(
        "--rule",
        choices=("paper", "reference", "late"),
        default="paper",
        help="where the mark goes: at the first sharp rise (paper), at the largest (the authors' code), "
        "or as late as leaves room for two taps",
    )
    add_tower(profile)
    add_compute(profile)


def _profile(args: argparse.Namespace) -> Outcome:
    if args.out is not None:
        check_output("--out", args.out, ".png")
    from activemark_fast.checkpoints import load_model
    from activemark_fast.profiling import profile

    device = chosen_device(args.device)
    measured = profile(
        load_model(args.model, device=device),
        args.images,
        tower=args.tower,
        precision=args.precision,
        progress=shows_progress(args),
    )
    placement = measured.site(args.rule)
    hints = ""
    if args.out is not None:
        from activemark_fast.report import profile_figure

        write_figure(profile_figure(measured, placement), args.out)
        hints = f"drawn in {args.out}"
    record = {
        "model": args.model,
        "rule": args.rule,
        "block": placement.site.block,
        "emergence": placement.emergence,
        "agreement": placement.agreement,
        "reason": placement.reason,
        **measured.to_dict(),
    }
    return Outcome(0, record, f"{measured}\n\nmark: {placement.reason}", hints)
