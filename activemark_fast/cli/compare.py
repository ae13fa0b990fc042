"""activemark compare: tell whether two models descend from one another, by their weights alone."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activemark_fast.cli.common import (
    MODEL_HELP,
    Outcome,
    Subparsers,
    add_command,
    check_folder,
    check_output,
    one_line,
    printable,
    shows_progress,
    write_figure,
)

if TYPE_CHECKING:
    from activemark_fast.descent import Descent

EXIT_CODES = {"descent": 0, "no descent found": 1, "inconclusive": 3}
OPENED = 5
"""So many of the candidates that rank best are compared in full."""
SHOWN = 20


def add_to(commands: Subparsers) -> None:
    """Adds `compare` to the command line."""
    compare = add_command(
        commands,
        "compare",
        _compare,
        "tell whether two models have a common origin, by their weights alone: no mark, no key, no images",
        epilog="Exit codes: 0 descent, 1 no descent found, 2 error, 3 inconclusive; with --against, "
        "of the best.",
    )
    compare.add_argument("a", metavar="A", help=f"a checkpoint file or folder, or {MODEL_HELP}")
    compare.add_argument("b", metavar="B", nargs="?", help="another")
    compare.add_argument(
        "--out", type=Path, metavar="FILE.png", help="draw which blocks and matrices descend"
    )
    compare.add_argument(
        "--against",
        action="append",
        metavar="PATH",
        help="instead of B: a folder, searched to the bottom, a file or a glob of candidates; they are "
        f"ranked by sketches, and the best {OPENED} compared in full; may be given repeatedly",
    )
    compare.add_argument(
        "--index",
        type=Path,
        metavar="FILE",
        help="keep the candidates' sketches here: those that did not change are not opened again",
    )


def _compare(args: argparse.Namespace) -> Outcome:
    if (args.b is None) == (args.against is None):
        raise ValueError("B, --against: wanted one of the two")
    if args.against is not None and args.out is not None:
        raise ValueError("--out: wanted with two models only, not with --against")
    if args.index is not None and args.against is None:
        raise ValueError("--index: wanted with --against only")
    if args.against is not None:
        return _rank(args)
    if args.out is not None:
        check_output("--out", args.out, ".png")
    from activemark_fast.descent import compare

    found = compare(args.a, args.b)
    hints = ""
    if args.out is not None:
        from activemark_fast.report import descent_figure

        write_figure(descent_figure(found), args.out)
        hints = f"  drawn in {args.out}"
    return Outcome(EXIT_CODES[found.decision], found.to_dict(), str(found), hints)


def _rank(args: argparse.Namespace) -> Outcome:
    if args.index is not None:
        check_folder("--index", args.index)
    from activemark_fast.bulk import find_suspects
    from activemark_fast.descent import compare
    from activemark_fast.descent.sketch import Index, Sketch, ranked
    from activemark_fast.progress import Progress

    suspects = list(find_suspects(args.against))
    if not suspects:
        raise ValueError(f"--against: wanted checkpoints, found none in {', '.join(args.against)}")
    index = Index.load(args.index) if args.index is not None and args.index.exists() else Index()
    sketch = Sketch.of(args.a)
    started = time.perf_counter()
    paths = [suspect.path for suspect in suspects if suspect.path is not None]
    unread = {suspect.name: suspect.error or "" for suspect in suspects if suspect.path is None}
    entries = []
    try:
        with Progress(shows_progress(args)) as bar:
            bar.stage("sketches", len(paths))
            for entry in index.update(paths):
                entries.append(entry)
                bar.advance()
    finally:
        if args.index is not None:
            index.save(args.index)
    unread |= {entry.path: entry.error or "" for entry in entries if entry.sketch is None}
    readable = [(entry.path, entry.sketch) for entry in entries if entry.sketch is not None]
    likeness = ranked(sketch, [candidate for _, candidate in readable])
    order = sorted(range(len(readable)), key=lambda place: -likeness[place])
    seconds = time.perf_counter() - started
    rows: list[dict[str, Any]] = []
    for rank, place in enumerate(order):
        row: dict[str, Any] = {"path": readable[place][0], "likeness": likeness[place]}
        if rank < OPENED and readable[place][1].width == sketch.width:
            try:
                row |= _short(compare(args.a, readable[place][0]))
            except (OSError, ValueError) as error:
                unread[readable[place][0]] = one_line(error)
        rows.append(row)
    decisions = [row["decision"] for row in rows if "decision" in row]
    code = min((EXIT_CODES[decision] for decision in decisions), default=1, key=[0, 3, 1].index)
    record = {"a": args.a, "candidates": rows, "unread": unread, "seconds_to_rank": seconds}
    return Outcome(code, record, _table(rows, unread))


def _short(found: Descent) -> dict[str, Any]:
    return {
        "decision": found.decision,
        "score": found.score,
        "p_value": found.p_value,
        "blocks": len(found.shared),
    }


def _table(rows: list[dict[str, Any]], unread: dict[str, str]) -> str:
    lines = [f"{'sketch':>6}  {'score':>5}  {'p':>8}  verdict"]
    for row in rows[:SHOWN]:
        full = "decision" in row
        score, p_value = (f"{row['score']:.2f}", f"{row['p_value']:.1g}") if full else ("-", "-")
        verdict = row["decision"] if full else "not opened"
        lines.append(
            f"{row['likeness']:>6.2f}  {score:>5}  {p_value:>8}  {verdict}: {printable(row['path'])}"
        )
    if len(rows) > SHOWN:
        lines.append(f"and {len(rows) - SHOWN} more, less alike")
    lines += [f"not read: {printable(name)}: {why}" for name, why in list(unread.items())[:SHOWN]]
    lines.append(
        "A sketch does not see through a permuted or rotated residual stream; comparing two models does."
    )
    return "\n".join(lines)
