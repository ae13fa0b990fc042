"""activemark verify: tell whether a suspect carries the mark."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from activemark_fast.cli.common import (
    MODEL_HELP,
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

if TYPE_CHECKING:
    from torch import device, nn

    from activemark_fast.watermark import Watermark


EXIT_CODES = {"match": 0, "no match": 1, "inconclusive": 3}


def add_to(commands: Subparsers) -> None:
    """Adds `verify` to the command line."""
    verify = add_command(
        commands,
        "verify",
        _verify,
        "tell whether a suspect carries the mark",
        epilog="Exit codes: 0 match, 1 no match, 2 error, 3 inconclusive.",
    )
    verify.add_argument(
        "suspect",
        metavar="SUSPECT",
        help=f"a checkpoint file, safetensors or torch, which is never unpickled; or {MODEL_HELP}",
    )
    add_watermark(verify)
    add_key(verify)
    add_images(verify, "those the model was marked with")
    verify.add_argument(
        "--architecture",
        metavar="STRING",
        help="what a checkpoint is loaded into, a model string without @PATH; by default what the file "
        "itself names, else what the marked model is",
    )
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
    from activemark_fast.verify import verify
    from activemark_fast.watermark import Watermark

    watermark = Watermark.load(args.watermark)
    key = read_key(args.key, confirm=False)
    commitment = None if args.commitment is None else read_commitment(args.commitment, args)
    suspect = load_suspect(args.suspect, watermark, args.architecture, chosen_device(args.device))
    verdict = verify(
        suspect,
        watermark,
        key,
        args.images,
        commitment=commitment,
        precision=args.precision,
        **decision_settings(args),
    )
    hints = ""
    if args.plot is not None:
        from activemark_fast.report import verdict_figure

        write_figure(verdict_figure(verdict), args.plot)
        hints = f"  drawn in {args.plot}"
    record = {"suspect": args.suspect, **verdict.to_dict()}
    return Outcome(EXIT_CODES[verdict.decision], record, str(verdict), hints)


def load_suspect(spec: str, watermark: Watermark, architecture: str | None, place: device) -> nn.Module:
    """The suspect; a checkpoint that does not describe itself is loaded into the marked architecture."""
    from activemark_fast.checkpoints import build_model, load_model, load_weights

    if architecture is None:
        if not Path(spec).is_file() or _describes_itself(spec):
            return load_model(spec, device=place)
        architecture = watermark.architecture
    if architecture is None:
        raise ValueError(
            f"{spec}: neither this file nor the watermark names an architecture; say it with --architecture"
        )
    model = build_model(architecture)
    load_weights(model, spec)
    return model.to(place).eval()


def _describes_itself(spec: str) -> bool:
    from activemark_fast.checkpoints import CheckpointError, architecture_of

    try:
        architecture_of(spec)
    except CheckpointError:
        return False
    return True
