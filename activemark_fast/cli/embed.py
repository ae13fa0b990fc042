"""activemark embed: mark a model."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
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
    copy_paths,
    one_line,
    read_key,
    read_names,
    shows_progress,
    weights_path,
)
from activemark_fast.cli.issue import write_copies
from activemark_fast.defaults import ALPHA, FIDELITY

if TYPE_CHECKING:
    from activemark_fast.embedding import Embedding
    from activemark_fast.key import Key


def add_to(commands: Subparsers) -> None:
    """Adds `embed` to the command line. Long, for it is a table of options."""
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
    add_images(embed, "16 to 128 of them, to read the mark on; without, the key cuts them from photographs")
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
        default=FIDELITY,
        metavar="F",
        help=f"lowest mean cosine to the features, on natural images held out ({FIDELITY})",
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
    embed.add_argument(
        "--recipients",
        type=Path,
        metavar="FILE",
        help="names, one a line, of those who get copies of their own, which trace tells apart; with "
        "--copies and --register. The model at --out is then no one's copy: keep it for issue",
    )
    embed.add_argument(
        "--copies", type=Path, metavar="FOLDER", help="where copies go, each named after its recipient"
    )
    embed.add_argument(
        "--register",
        type=Path,
        metavar="FILE",
        help="what issue and trace need besides the key, which encrypts it",
    )
    embed.add_argument("--force", action="store_true", help="replace output files that exist")
    embed.add_argument(
        "--stream",
        action="store_true",
        help="for models larger than memory, or than the GPU's: MODEL is a safetensors file or a folder of "
        "shards, --out a new one of the same form, and the same command goes on where it was cut off",
    )
    add_tower(embed)
    add_compute(embed)


def _embed(args: argparse.Namespace) -> Outcome:
    if args.stream:
        return _embed_stored(args)
    _check_outputs(args)
    names = None if args.recipients is None else read_names(args.recipients)
    if names is not None:
        from activemark_fast.tracing import check_names

        names = list(check_names(names))
        outputs = (args.out, args.watermark, args.register)
        inputs = (weights_path(args.model), args.recipients, args.key)
        paths = copy_paths(args.copies, names, (*outputs, *inputs), force=args.force)
    key = read_key(args.key, confirm=True)
    from activemark_fast.checkpoints import architecture_of, load_model
    from activemark_fast.embedding import embed

    device = chosen_device(args.device)
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
        device=device,
        precision=args.precision,
        recipients=names,
        progress=shows_progress(args),
    )
    _save_all(embedding, architecture, key, args)
    copies = {}
    seconds = 0.0
    if embedding.register is not None:
        copies = {name: str(path) for name, path in paths.items()}
        seconds = write_copies(embedding.register, key, embedding.model, architecture, paths)
    return _told(embedding, args, copies, seconds)


def _embed_stored(args: argparse.Namespace) -> Outcome:
    """`_embed` over the files of the model."""
    unlike = {
        "--codec": args.codec != "keyed",
        "--checkpoint": args.checkpoint is not None,
        "--recipients": args.recipients is not None,
        "--force": args.force,
    }
    if any(unlike.values()):
        raise ValueError(f"--stream: wanted without {next(name for name, given in unlike.items() if given)}")
    check_folder("--out", args.out)
    check_folder("--watermark", args.watermark)
    key = read_key(args.key, confirm=True)
    from activemark_fast.giants import embed_stored

    embedding = embed_stored(
        args.model,
        args.out,
        args.watermark,
        key,
        args.images,
        clean=args.clean,
        bits=args.bits,
        block=args.block,
        fidelity=args.fidelity,
        tower=args.tower,
        device=chosen_device(args.device),
        precision=args.precision,
        progress=shows_progress(args),
    )
    return _told(embedding, args, {}, 0.0)


def _told(embedding: Embedding, args: argparse.Namespace, copies: dict[str, str], seconds: float) -> Outcome:
    """What is said of a mark. copies: their files, by name, which were written in so many `seconds`."""
    return Outcome(0, _record(embedding, args, copies, seconds), _text(embedding, args, len(copies), seconds))


def _record(
    embedding: Embedding, args: argparse.Namespace, copies: dict[str, str], seconds: float
) -> dict[str, object]:
    """The mark as JSON types."""
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
    return {
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
        "copies": copies,
        "copy_seconds": seconds,
        "register": None if args.register is None else str(args.register),
    }


def _text(embedding: Embedding, args: argparse.Namespace, copies: int, seconds: float) -> str:
    """The same in words."""
    measured = embedding.quality
    cosines = ", ".join(
        f"{name.replace('_', ' ')} {mean:.4f} (5 %: {tail:.4f})"
        for name, (mean, tail) in asdict(measured.features).items()
        if math.isfinite(mean)
    )
    natural = "" if math.isnan(measured.natural_margin) else f", natural band {measured.natural_margin:.2f}"
    issued = []
    if embedding.register is not None:
        from activemark_fast.tracing import promise

        positions = embedding.register.positions
        issued = [
            f"register:     {args.register}",
            f"{copies} copies in {args.copies}, {seconds:.1f} s; the figures below are of such a copy",
            f"  codewords of {positions} positions: {promise(positions, copies, ALPHA)}",
        ]
    return "\n".join(
        [
            f"marked model: {args.out}",
            f"watermark:    {args.watermark}",
            *issued,
            f"  site: {embedding.site_reason}",
            f"  features against the original's, cosine: {cosines}",
            f"    on {embedding.clean_source}, held out from marking",
            f"  bit error {measured.bit_error:.2f} of {args.bits}, margin {measured.margin:.2f}{natural}",
            f"  detection rate {measured.detection_rate:.3f}, "
            f"on the original {measured.original_detection_rate:.3f}",
            f"  {embedding.seconds:.1f} s, {embedding.steps} gradient steps",
        ]
    )


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuses, before any work, output paths that cannot or must not be written."""
    of_copies = (args.recipients, args.copies, args.register)
    if None in of_copies and any(of_copies):
        raise ValueError("--recipients, --copies, --register: wanted all three or none of them")
    outputs = {"--out": args.out, "--watermark": args.watermark}
    if args.register is not None:
        outputs["--register"] = args.register
    seen: dict[Path, str] = {}
    for name, path in outputs.items():
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise ValueError(f"{other}, {name}: wanted two files, got {path} for both")
    inputs = {"MODEL": weights_path(args.model), "--key": args.key, "--recipients": args.recipients}
    for name, path in outputs.items():
        check_folder(name, path)
        if not path.exists():
            continue
        if path.is_dir():
            raise ValueError(f"{name}: {path} is a folder, wanted a file")
        for input_name, input_path in inputs.items():
            if input_path is not None and input_path.exists() and path.samefile(input_path):
                raise ValueError(f"{name}: {path} is the file of {input_name}, wanted another")
        if not args.force:
            raise ValueError(f"{name}: {path} exists; --force replaces it")


def _save_all(embedding: Embedding, architecture: str, key: Key, args: argparse.Namespace) -> None:
    """Writes the marked model, its watermark and the register: all of them whole, or none."""
    from activemark_fast.checkpoints import save_model

    writers: dict[Path, Callable[[Path], None]] = {
        args.out: lambda path: save_model(embedding.model, path, architecture),
        args.watermark: embedding.watermark.save,
    }
    register = embedding.register
    if register is not None:
        writers[args.register] = lambda path: register.save(path, key)
    with ExitStack() as stack:
        moves = []
        for target, write in writers.items():
            beside = tempfile.TemporaryDirectory(dir=target.parent, prefix=".activemark-")
            written = Path(stack.enter_context(beside), "written")
            try:
                write(written)
            except OSError as error:  # it names a file that nobody asked for
                why = error.strerror or one_line(error).removeprefix(f"{written}: ")
                raise OSError(f"{target}: {why}") from error
            moves.append((written, target))
        try:
            for written, target in moves:
                os.replace(written, target)
        except BaseException:
            for written, target in moves:
                if not written.exists():
                    target.unlink(missing_ok=True)
            raise
