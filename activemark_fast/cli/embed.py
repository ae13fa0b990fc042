"""activemark embed: mark a model."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from activemark_fast.cli.common import (
    MODEL_HELP,
    Outcome,
    Subparsers,
    add_command,
    add_compute,
    add_images,
    add_key,
    add_tower,
    check_folder,
    chosen_device,
    read_key,
    shows_progress,
)

if TYPE_CHECKING:
    from activemark_fast.embed import Embedding


def add_to(commands: Subparsers) -> None:
    """Adds `embed` to the command line."""
    embed = add_command(commands, "embed", _embed, "mark a model")
    embed.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    embed.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the marked model, safetensors"
    )
    embed.add_argument(
        "--watermark",
        type=Path,
        required=True,
        metavar="FILE",
        help="what verification needs besides the key",
    )
    add_key(embed)
    add_images(embed, "up to 64 of them, to read the mark on; without, the key cuts them from photographs")
    embed.add_argument(
        "--clean",
        type=Path,
        metavar="FOLDER",
        help="natural images of the kind the model is used on, a few hundred, to protect and to compare its "
        "features on; without, photographs that ship with the package",
    )
    embed.add_argument("--codec", choices=("keyed", "learned"), default="keyed", help="learned: the paper's")
    embed.add_argument("--bits", type=int, default=32, metavar="N", help="message length, in eights (32)")
    embed.add_argument(
        "--block", type=int, metavar="N", help="block to inject after, from 0 (the expressive one)"
    )
    embed.add_argument(
        "--axis",
        choices=("token", "channel"),
        default="token",
        help="what the learned codec overwrites (token)",
    )
    embed.add_argument(
        "--fidelity",
        type=float,
        default=0.997,
        metavar="F",
        help="lowest mean cosine to the features, on natural images held out (0.997)",
    )
    embed.add_argument(
        "--max-steps",
        type=int,
        default=1000,
        metavar="N",
        help="of the learned codec (1000)",
    )
    embed.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="save gradient training here every minute; if it is there, go on from it",
    )
    embed.add_argument("--force", action="store_true", help="replace output files that exist")
    add_tower(embed)
    add_compute(embed)


def _embed(args: argparse.Namespace) -> Outcome:
    _check_outputs(args)
    key = read_key(args.key, confirm=True)
    from activemark_fast.checkpoints import architecture_of, load_model
    from activemark_fast.embed import embed

    place = chosen_device(args.device)
    architecture = architecture_of(args.model)
    embedding = embed(
        load_model(args.model),
        key,
        args.images,
        clean=args.clean,
        codec=args.codec,
        bits=args.bits,
        axis=args.axis,
        block=args.block,
        fidelity=args.fidelity,
        max_steps=args.max_steps,
        tower=args.tower,
        checkpoint=args.checkpoint,
        architecture=architecture,
        device=place,
        precision=args.precision,
        progress=shows_progress(args),
    )
    _save_both(embedding, architecture, args.out, args.watermark)
    measured = embedding.quality
    quality = {
        name: value if math.isfinite(value) else None
        for name, value in asdict(measured).items()
        if name != "features"
    }
    features = {
        name: [value if math.isfinite(value) else None for value in pair]
        for name, pair in asdict(measured.features).items()
    }
    record = {
        "model": str(args.out),
        "watermark": str(args.watermark),
        "block": embedding.watermark.site.block,
        "site_reason": embedding.site_reason,
        "reached": embedding.quality.reaches(args.fidelity),
        **quality,
        "features": features,
        "clean": embedding.clean_source,
        "steps": embedding.steps,
        "seconds": embedding.seconds,
        "engine": str(embedding.engine),
    }
    cosines = ", ".join(
        f"{name.replace('_', ' ')} {mean:.4f} (5 %: {tail:.4f})"
        for name, (mean, tail) in asdict(measured.features).items()
        if math.isfinite(mean)
    )
    natural = "" if math.isnan(measured.natural_margin) else f", natural band {measured.natural_margin:.2f}"
    text = "\n".join(
        [
            f"marked model: {args.out}",
            f"watermark:    {args.watermark}",
            f"  site: {embedding.site_reason}",
            f"  features against the original's, cosine: {cosines}",
            f"    on {embedding.clean_source}, held out from marking",
            f"  bit error {measured.bit_error:.2f} of {args.bits}, margin {measured.margin:.2f}{natural}",
            f"  detection rate {measured.detection_rate:.3f}, "
            f"on the original {measured.original_detection_rate:.3f}",
            f"  {embedding.seconds:.1f} s, {embedding.steps} gradient steps",
        ]
    )
    return Outcome(0, record, text)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuses, before any work, output paths that cannot or must not be written."""
    if args.out.resolve() == args.watermark.resolve():
        raise ValueError(f"--out, --watermark: wanted two files, got {args.out} for both")
    weights = args.model.partition("@")[2] or args.model
    inputs = {"MODEL": Path(weights)} | ({"--key": args.key} if args.key is not None else {})
    for name, path in (("--out", args.out), ("--watermark", args.watermark)):
        check_folder(name, path)
        if not path.exists():
            continue
        if path.is_dir():
            raise ValueError(f"{name}: {path} is a folder, wanted a file")
        for input_name, input_path in inputs.items():
            if input_path.exists() and path.samefile(input_path):
                raise ValueError(f"{name}: {path} is the file of {input_name}, wanted another")
        if not args.force:
            raise ValueError(f"{name}: {path} exists; --force replaces it")


def _save_both(embedding: Embedding, architecture: str, out: Path, watermark: Path) -> None:
    """Writes the marked model and its watermark: both whole, or neither."""
    from activemark_fast.checkpoints import save_model

    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".activemark-") as beside_out,
        tempfile.TemporaryDirectory(dir=watermark.parent, prefix=".activemark-") as beside_watermark,
    ):
        moves = (
            (Path(beside_out, "model.safetensors"), out),
            (Path(beside_watermark, "watermark.safetensors"), watermark),
        )
        save_model(embedding.model, moves[0][0], architecture)
        embedding.watermark.save(moves[1][0])
        try:
            for written, target in moves:
                os.replace(written, target)
        except BaseException:
            for written, target in moves:
                if not written.exists():
                    target.unlink(missing_ok=True)
            raise
