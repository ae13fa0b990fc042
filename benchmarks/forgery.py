"""What forgers reach on models that were never marked, and what `verify` says of it: docs/forgery.md.

    python benchmarks/forgery.py --models demo ../shared/vfm/*.safetensors --minutes 10 --out docs/forgery.md

The page is written anew after every model, so a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from activemark_fast.checkpoints import load_model
from activemark_fast.forge import WAYS, Attempt, Forgery, forge
from activemark_fast.freedoms import EVIDENCE_AT

ROOT = Path(__file__).parents[1]
HEAD = "| way | what was tried | tries | s | verify said | R | p | paid p | chosen by the owner |"


def about(arguments: argparse.Namespace) -> str:
    """Where and when."""
    place = torch.device(arguments.device)
    machine = (
        torch.cuda.get_device_name(place)
        if place.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    ways = "all ways" if len(arguments.ways) == len(WAYS) else f"ways: {', '.join(arguments.ways)}"
    return (
        f"{machine}, {date}, commit {commit or '-'}, torch {torch.__version__}; "
        f"{arguments.minutes:g} minutes a model, {ways}, seed {arguments.seed}. By `benchmarks/forgery.py`."
    )


def row(attempt: Attempt) -> str:
    """One claim."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    said = f"**{attempt.decision}**: {attempt.said}" if attempt.decision == "refused" else attempt.decision
    if "honest file's" in attempt.said:
        said += ", ignored: the honest file's p"
    if attempt.decision == "inconclusive" and attempt.p_value is None:
        said += f": {attempt.said}"
    cells = [
        attempt.way,
        attempt.tried,
        str(attempt.tries),
        f"{attempt.seconds:.1f}",
        said,
        number(attempt.detection_rate, ".3f"),
        number(attempt.p_value, ".2g"),
        number(attempt.paid_p_value, ".2g"),
        ", ".join(attempt.chosen),
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def section(name: str, forgery: Forgery) -> str:
    """One model."""
    smallest = "none" if forgery.smallest is None else f"{forgery.smallest:.3g}"
    lines = [
        f"## {name}",
        "",
        f"Smallest paid p-value that rests on nothing chosen: **{smallest}**.",
        "",
        HEAD,
        "|" + "---|" * (HEAD.count("|") - 1),
        *map(row, forgery.attempts),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="model strings")
    parser.add_argument("--minutes", type=float, default=10)
    names = {way.play.__name__: way for way in WAYS}
    parser.add_argument("--ways", nargs="+", choices=names, default=list(names), help="those to play")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sections: list[str] = []
    smallest: list[float] = []
    for model in arguments.models:
        forgery = forge(
            load_model(model),
            minutes=arguments.minutes,
            seed=arguments.seed,
            device=arguments.device,
            ways=[names[name] for name in arguments.ways],
            progress=True,
        )
        if forgery.smallest is not None:
            smallest.append(forgery.smallest)
        sections.append(section(Path(model.rpartition("@")[2]).stem, forgery))
        best = f"{min(smallest):.3g}" if smallest else "none"
        head = (
            "# What forgers reach\n\nUntouched models, claimed in every way that `activemark forge` knows; "
            "each claim is a watermark that the forger sealed, put before the public `verify`. A paid "
            f"p-value counts as evidence against an owner who may lie from {EVIDENCE_AT:.0e} on, and only "
            f"where nothing was chosen. Smallest reached on any model: **{best}**.\n\n{about(arguments)}\n\n"
        )
        arguments.out.write_text(head + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
