"""The command line `activemark`: key new, embed, verify, demo.

The heavy modules are imported by the commands that need them, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import getpass
import io
import json
import math
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from activemark_fast import __version__

if TYPE_CHECKING:
    from torch import device, nn

    from activemark_fast.demo import DemoRow
    from activemark_fast.embed import Embedding
    from activemark_fast.key import Key
    from activemark_fast.watermark import Watermark

EXIT_CODES = {"match": 0, "no match": 1, "inconclusive": 3}
ERROR = 2
INTERRUPTED = 130

_MODEL_HELP = (
    "open_clip:NAME/TAG, timm:NAME, hf:NAME or torchvision:NAME, each with @PATH for weights in a file; "
    "a safetensors file that names its architecture; or demo, the model that comes with the package"
)


@dataclass(frozen=True)
class _Outcome:
    """What a command ends with."""

    code: int
    record: dict[str, object]  # with --json, JSON types
    text: str  # without
    hints: str = ""  # neither with --json nor with --quiet


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code; usage errors and --help raise SystemExit.

    Codes: 0 done, match, or a demo as expected; 1 no match, or a demo not as expected; 2 error;
    3 inconclusive; 130 interrupted.
    """
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            # Whatever a library prints, standard output holds the result only.
            with redirect_stdout(sys.stderr):
                outcome: _Outcome = args.run(args)
        except KeyboardInterrupt:
            print("activemark: interrupted", file=sys.stderr)
            return INTERRUPTED
        except (OSError, TypeError, ValueError) as error:
            print(f"activemark: error: {_one_line(error)}", file=sys.stderr)
            return ERROR
    if args.json:
        text = json.dumps(outcome.record, allow_nan=False)
    else:
        text = outcome.text if args.quiet or not outcome.hints else f"{outcome.text}\n{outcome.hints}"
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="activemark",
        description="Mark a visual foundation model before release; tell later what descends from it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"activemark {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str,
        run: Callable[[argparse.Namespace], _Outcome],
        summary: str,
        group: argparse._SubParsersAction[argparse.ArgumentParser] = commands,
        epilog: str | None = None,
    ) -> argparse.ArgumentParser:
        made = group.add_parser(name, help=summary, description=summary, epilog=epilog, allow_abbrev=False)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        made.add_argument("--quiet", action="store_true", help="only the result: no progress bar, no advice")
        return made

    key = commands.add_parser("key", help="make keys", description="make keys", allow_abbrev=False)
    keys = key.add_subparsers(title="commands", metavar="COMMAND", required=True)
    new = command("new", _key_new, "write a new random key, readable by its owner only", keys)
    new.add_argument("path", metavar="PATH", type=Path, help="the key file; nothing is ever overwritten")

    embed = command("embed", _embed, "mark a model")
    embed.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
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
    _add_key(embed)
    _add_images(embed, "up to 256 of them mark the model; without, they are made from the key")
    embed.add_argument("--codec", choices=("keyed", "learned"), default="keyed", help="learned: the paper's")
    embed.add_argument(
        "--method",
        choices=("edit", "finetune"),
        help="by default edit (closed form, gradient steps where needed) for keyed, finetune for learned",
    )
    embed.add_argument("--bits", type=int, default=32, metavar="N", help="message length, 8 to 256 (32)")
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
        default=0.996,
        metavar="F",
        help="lowest mean cosine to the features (0.996)",
    )
    embed.add_argument("--max-steps", type=int, default=1000, metavar="N", help="most gradient steps (1000)")
    embed.add_argument("--force", action="store_true", help="replace output files that exist")
    _add_compute(embed)

    verify = command(
        "verify",
        _verify,
        "tell whether a suspect carries the mark",
        epilog="Exit codes: 0 match, 1 no match, 2 error, 3 inconclusive.",
    )
    verify.add_argument(
        "suspect",
        metavar="SUSPECT",
        help=f"a checkpoint file, safetensors or torch, which is never unpickled; or {_MODEL_HELP}",
    )
    verify.add_argument("--watermark", type=Path, required=True, metavar="FILE", help="what embed wrote")
    _add_key(verify)
    _add_images(verify, "those the model was marked with")
    verify.add_argument(
        "--architecture",
        metavar="STRING",
        help="what a checkpoint is loaded into, a model string without @PATH; by default what the file "
        "itself names, else what the marked model is",
    )
    verify.add_argument(
        "--alpha", type=float, default=1e-6, metavar="A", help="match at or below this p-value (1e-6)"
    )
    verify.add_argument(
        "--tau", type=int, metavar="N", help="most wrong bits of a detected image (5 of 32; set by chance)"
    )
    verify.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the bit errors")
    _add_compute(verify)

    demo = command("demo", _demo, "mark a small model and verify suspects; takes about two minutes")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("activemark-demo"),
        metavar="DIR",
        help="folder for what it makes (activemark-demo)",
    )
    _add_compute(demo)
    return parser


def _add_key(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--key", type=Path, metavar="FILE", help="the owner's key file; without, a passphrase is asked for"
    )


def _add_images(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--images", type=Path, metavar="DIR", help=f"folder of hold-out images: {what}")


def _add_compute(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", metavar="NAME", help="for example cpu, cuda:1 (cuda if there is one)")
    command.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the forward passes; auto: bf16 on CUDA, fp32 elsewhere",
    )


def _key_new(args: argparse.Namespace) -> _Outcome:
    from activemark_fast.key import Key

    Key.write_new(args.path)
    return _Outcome(0, {"key": str(args.path)}, f"new key: {args.path}", "Keep it secret, and keep a copy.")


def _embed(args: argparse.Namespace) -> _Outcome:
    _check_outputs(args)
    key = _read_key(args.key, confirm=True)
    from activemark_fast.checkpoint import architecture_of, load_model
    from activemark_fast.embed import embed

    place = _device(args.device)
    architecture = architecture_of(args.model)
    embedding = embed(
        load_model(args.model),
        key,
        args.images,
        codec=args.codec,
        method=args.method,
        bits=args.bits,
        axis=args.axis,
        block=args.block,
        fidelity=args.fidelity,
        max_steps=args.max_steps,
        architecture=architecture,
        device=place,
        precision=args.precision,
        progress=_shows_progress(args),
    )
    _save_both(embedding, architecture, args.out, args.watermark)
    quality = {
        name: value if math.isfinite(value) else None for name, value in asdict(embedding.quality).items()
    }
    record = {
        "model": str(args.out),
        "watermark": str(args.watermark),
        "block": embedding.watermark.site.block,
        "site_reason": embedding.site_reason,
        "reached": embedding.quality.reaches(args.fidelity),
        **quality,
        "steps": embedding.steps,
        "seconds": embedding.seconds,
    }
    measured = embedding.quality
    text = "\n".join(
        [
            f"marked model: {args.out}",
            f"watermark:    {args.watermark}",
            f"  site: {embedding.site_reason}",
            f"  fidelity {measured.fidelity:.4f} (mean cosine to the original's features)",
            f"  bit error {measured.bit_error:.2f} of {args.bits}, margin {measured.margin:.2f}",
            f"  detection rate {measured.detection_rate:.3f}, "
            f"on the original {measured.original_detection_rate:.3f}",
            f"  {embedding.seconds:.1f} s, {embedding.steps} gradient steps",
        ]
    )
    return _Outcome(0, record, text)


def _verify(args: argparse.Namespace) -> _Outcome:
    if args.plot is not None:
        if args.plot.suffix != ".png":
            raise ValueError(f"--plot: wanted a file name that ends in .png, got {args.plot}")
        _check_folder("--plot", args.plot)
    from activemark_fast.verify import verify
    from activemark_fast.watermark import Watermark

    watermark = Watermark.load(args.watermark)
    key = _read_key(args.key, confirm=False)
    suspect = _load_suspect(args.suspect, watermark, args.architecture, _device(args.device))
    verdict = verify(
        suspect, watermark, key, args.images, alpha=args.alpha, tau=args.tau, precision=args.precision
    )
    hints = ""
    if args.plot is not None:
        from activemark_fast.report import verdict_figure

        drawn = io.BytesIO()
        verdict_figure(verdict).savefig(drawn, format="png", dpi=150)
        args.plot.write_bytes(drawn.getvalue())
        hints = f"  drawn in {args.plot}"
    record = {"suspect": args.suspect, **verdict.to_dict()}
    return _Outcome(EXIT_CODES[verdict.decision], record, str(verdict), hints)


def _demo(args: argparse.Namespace) -> _Outcome:
    from activemark_fast.demo import run_demo

    rows = run_demo(
        args.out, device=_device(args.device), precision=args.precision, progress=_shows_progress(args)
    )
    out = shlex.quote(str(args.out))
    commands = [
        f"activemark verify {out}/{name}.safetensors --watermark {out}/watermark.safetensors "
        f"--key {out}/owner.key{more}"
        for name, more in (
            ("finetuned", ""),
            ("pruned", f" --plot {out}/pruned.png"),
            ("original", " --json"),
        )
    ]
    hints = "\n".join(
        [
            "",
            f"In {args.out}: owner.key, watermark.safetensors, the models marked, finetuned, pruned and",
            "original.safetensors, and demo.png, a picture of all this. Try next:",
            *(f"  {command}" for command in commands),
        ]
    )
    code = 0 if all(row.as_expected for row in rows) else 1
    record = {"folder": str(args.out), "as_expected": code == 0, "rows": [row.to_dict() for row in rows]}
    return _Outcome(code, record, _table(rows), hints)


def _read_key(path: Path | None, *, confirm: bool) -> Key:
    """The key in the file, or else the key of a passphrase that is typed, twice with `confirm`."""
    from activemark_fast.key import Key

    if path is not None:
        if not path.is_file():
            # What was given is not shown: it may be a passphrase in the wrong place.
            raise ValueError("--key: there is no such file; a passphrase is asked for without --key")
        return Key.of(path)
    if sys.stdin is None or not sys.stdin.isatty():
        raise ValueError("key: wanted --key FILE, for there is no terminal to ask for a passphrase at")
    try:
        passphrase = getpass.getpass("Passphrase: ")
        if confirm and getpass.getpass("The same again: ") != passphrase:
            raise ValueError("passphrase: the two are not the same")
    except EOFError as error:
        raise ValueError("passphrase: none was typed") from error
    return Key.of(passphrase)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuses, before any work, output paths that cannot or must not be written."""
    if args.out.resolve() == args.watermark.resolve():
        raise ValueError(f"--out, --watermark: wanted two files, got {args.out} for both")
    weights = args.model.partition("@")[2] or args.model
    inputs = {"MODEL": Path(weights)} | ({"--key": args.key} if args.key is not None else {})
    for name, path in (("--out", args.out), ("--watermark", args.watermark)):
        _check_folder(name, path)
        if not path.exists():
            continue
        if path.is_dir():
            raise ValueError(f"{name}: {path} is a folder, wanted a file")
        for input_name, input_path in inputs.items():
            if input_path.exists() and path.samefile(input_path):
                raise ValueError(f"{name}: {path} is the file of {input_name}, wanted another")
        if not args.force:
            raise ValueError(f"{name}: {path} exists; --force replaces it")


def _check_folder(name: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{name}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: the folder {path.parent} cannot be written to")


def _save_both(embedding: Embedding, architecture: str, out: Path, watermark: Path) -> None:
    """Writes the marked model and its watermark: both whole, or neither."""
    from activemark_fast.checkpoint import save_model

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


def _load_suspect(spec: str, watermark: Watermark, architecture: str | None, place: device) -> nn.Module:
    """The suspect; a checkpoint that does not describe itself is loaded into the marked architecture."""
    from activemark_fast.checkpoint import build_model, load_model, load_weights

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
    from activemark_fast.checkpoint import CheckpointError, architecture_of

    try:
        architecture_of(spec)
    except CheckpointError:
        return False
    return True


def _device(name: str | None) -> device:
    import torch

    from activemark_fast.runtime import resolve_device

    return resolve_device(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _shows_progress(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()


def _table(rows: Sequence[DemoRow]) -> str:
    """The rows of the demonstration as aligned text."""
    cells = [("suspect", "verdict", "R", "bit errors", "p-value", "cosine")]
    for row in rows:
        verdict = row.verdict
        cells.append(
            (
                row.suspect,
                verdict.decision if row.as_expected else f"{verdict.decision} (wanted {row.expected})",
                f"{verdict.detection_rate:.3f}",
                f"{verdict.bit_errors.mean():.2f}",
                "none" if verdict.p_value is None else f"{verdict.p_value:.2g}",
                f"{row.cosine:.4f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    print(f"activemark: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    if isinstance(message, OSError) and message.filename is not None and message.strerror is not None:
        message = f"{message.filename}: {message.strerror}"
    return " ".join(str(message).split())
