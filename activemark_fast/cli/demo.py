"""activemark demo: the demonstration."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from activemark_fast.cli.common import (
    Outcome,
    Subparsers,
    add_command,
    add_compute,
    chosen_device,
    shows_progress,
)

if TYPE_CHECKING:
    from activemark_fast.demo import DemoRow


def add_to(commands: Subparsers) -> None:
    """Adds `demo` to the command line."""
    demo = add_command(
        commands,
        "demo",
        _demo,
        "mark a small model and verify suspects; takes about two minutes",
        epilog="Exit codes: 0 every verdict as expected, 1 some not, 2 error.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("activemark-demo"),
        metavar="DIR",
        help="folder for what it makes (activemark-demo)",
    )
    add_compute(demo)


def _demo(args: argparse.Namespace) -> Outcome:
    from activemark_fast.demo import run_demo

    rows = run_demo(
        args.out, device=chosen_device(args.device), precision=args.precision, progress=shows_progress(args)
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
    return Outcome(code, record, _table(rows), hints)


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
