"""What the commands share: the outcome, common options, keys, checks of output paths."""

from __future__ import annotations

import argparse
import getpass
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from activemark_fast.defaults import ALPHA

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import device

    from activemark_fast.key import Key
    from activemark_fast.tracing import Register

MODEL_HELP = (
    "open_clip:NAME/TAG, timm:NAME, hf:NAME or torchvision:NAME, each with @PATH for weights in a file; "
    "a safetensors file that names its architecture; or demo, the model that comes with the package"
)


@dataclass(frozen=True)
class Outcome:
    """What a command ends with."""

    code: int
    record: dict[str, object]  # with --json, JSON types
    text: str  # without
    hints: str = ""  # neither with --json nor with --quiet


# argparse has no public name for what `add_subparsers` returns.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    group: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], Outcome],
    summary: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """A new command in `group`, with the options that all commands have."""
    made = group.add_parser(name, help=summary, description=summary, epilog=epilog, allow_abbrev=False)
    made.set_defaults(run=run)
    made.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    made.add_argument("--quiet", action="store_true", help="only the result: no progress bar, no advice")
    return made


def add_key(command: argparse.ArgumentParser) -> None:
    """The option --key."""
    command.add_argument(
        "--key", type=Path, metavar="FILE", help="the owner's key file; without, a passphrase is asked for"
    )


def add_tower(command: argparse.ArgumentParser) -> None:
    """The option --tower."""
    command.add_argument(
        "--tower",
        metavar="NAME",
        help="module of the model that takes images, where there are several (the one with most blocks)",
    )


def add_watermark(command: argparse.ArgumentParser) -> None:
    """The option --watermark."""
    command.add_argument("--watermark", type=Path, required=True, metavar="FILE", help="what embed wrote")


def add_register(command: argparse.ArgumentParser, *, required: bool) -> None:
    """The option --register of what traces suspects."""
    command.add_argument(
        "--register",
        type=Path,
        required=required,
        metavar="FILE",
        help="what embed wrote for --recipients: tell whose copy a suspect was made from",
    )


def read_register(path: Path | None, key: Key) -> Register | None:
    """The register in the file; None without one."""
    from activemark_fast.tracing import Register

    return None if path is None else Register.load(path, key)


def read_names(path: Path) -> list[str]:
    """The names in the file of --recipients, one a line, as they are to be checked; empty lines are none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--recipients: wanted names as UTF-8 text, one a line, in {path}") from error
    return [name for line in text.splitlines() if (name := line.strip())]


def weights_path(spec: str) -> Path:
    """The file of a model string's weights, which need not be there."""
    return Path(spec.partition("@")[2] or spec)


def copy_paths(
    folder: Path, names: Sequence[str], others: Sequence[Path | None], *, force: bool
) -> dict[str, Path]:
    """Where the copies of recipients go, by their names.

    Refuses, before any work, a folder that is not there or cannot be written to, files that are there already
    unless `force`, and those of `others`, which the command reads or writes.
    """
    paths = {name: folder / f"{name}.safetensors" for name in names}
    check_folder("--copies", folder / "any")
    taken = {path.resolve() for path in others if path is not None}
    for path in paths.values():
        if path.resolve() in taken:
            raise ValueError(f"--copies: {path} is a file of another argument, wanted another name or folder")
    there = [path for path in paths.values() if path.exists()]
    if there and not force:
        raise ValueError(f"--copies: {there[0]} exists; --force replaces it")
    return paths


def add_images(command: argparse.ArgumentParser, what: str) -> None:
    """The option --images; `what` ends its help."""
    command.add_argument("--images", type=Path, metavar="DIR", help=f"folder of trigger images: {what}")


def add_compute(command: argparse.ArgumentParser) -> None:
    """The options --device and --precision."""
    command.add_argument("--device", metavar="NAME", help="for example cpu, cuda:1 (cuda if there is one)")
    command.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the forward passes; auto: bf16 on CUDA and on CPUs that multiply it, else fp32",
    )


def add_decision(command: argparse.ArgumentParser) -> None:
    """The options --alpha, --tau, --align and --exhaustive."""
    command.add_argument(
        "--exhaustive",
        action="store_true",
        help="read all images of every suspect, also where fewer settle it",
    )
    command.add_argument(
        "--alpha", type=float, default=ALPHA, metavar="A", help=f"match at or below this p-value ({ALPHA:g})"
    )
    command.add_argument(
        "--tau", type=int, metavar="N", help="most wrong bits of a detected image (5 of 32; set by chance)"
    )
    command.add_argument(
        "--align",
        choices=("auto", "always", "never"),
        default="auto",
        help="undo a permutation or rotation of the residual stream; auto: where that explains the suspect",
    )


def decision_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_decision` say, as `verify` takes it."""
    align = {"auto": None, "always": True, "never": False}[args.align]
    return {"alpha": args.alpha, "tau": args.tau, "align": align}


def read_key(path: Path | None, *, confirm: bool) -> Key:
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


def check_output(name: str, path: Path, suffix: str) -> None:
    """Refuses a `path` that does not end in `suffix`, or whose folder cannot be written to."""
    if path.suffix != suffix:
        raise ValueError(f"{name}: wanted a file name that ends in {suffix}, got {path}")
    check_folder(name, path)


def check_folder(name: str, path: Path) -> None:
    """Refuses, before any work, a `path` (the value of option `name`) whose folder cannot be written to."""
    if not path.parent.is_dir():
        raise ValueError(f"{name}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: the folder {path.parent} cannot be written to")


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a picture as PNG, whole or not at all."""
    from activemark_fast.files import write_whole

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_whole(path, drawn.getvalue(), mode=0o644)


def chosen_device(name: str | None) -> device:
    """The device called `name`; without one, CUDA where there is a device, else the CPU."""
    import torch

    from activemark_fast.runtime import resolve_device

    return resolve_device(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def shows_progress(args: argparse.Namespace) -> bool:
    """Whether progress bars have a terminal to be shown on."""
    return not args.quiet and sys.stderr.isatty()


def one_line(message: object) -> str:
    """An error or a warning as one line of text."""
    if isinstance(message, OSError) and message.filename is not None and message.strerror is not None:
        message = f"{message.filename}: {message.strerror}"
    return " ".join(str(message).split())


def printable(name: str) -> str:
    """A file's name as a terminal may see it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
