"""activemark trace: tell whose copy a suspect was made from."""

from __future__ import annotations

import argparse
from pathlib import Path

from activemark_fast.cli.common import (
    Outcome,
    Subparsers,
    add_command,
    add_compute,
    add_decision,
    add_images,
    add_key,
    add_register,
    add_watermark,
    check_output,
    decision_settings,
    read_key,
    write_figure,
)
from activemark_fast.cli.suspect import add_suspect, judge


def add_to(commands: Subparsers) -> None:
    """Adds `trace` to the command line."""
    trace = add_command(
        commands,
        "trace",
        _trace,
        "tell whose copy a suspect was made from",
        epilog="Exit codes: 0 somebody is accused, 1 nobody is, 2 error, 3 the suspect could not be read.",
    )
    add_suspect(trace)
    add_watermark(trace)
    add_key(trace)
    add_register(trace, required=True)
    add_images(trace, "those the model was marked with")
    add_decision(trace)
    trace.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the scores of all recipients")
    add_compute(trace)


def _trace(args: argparse.Namespace) -> Outcome:
    if args.plot is not None:
        check_output("--plot", args.plot, ".png")
    from activemark_fast.tracing import Register
    from activemark_fast.watermark import Watermark

    watermark = Watermark.load(args.watermark)
    key = read_key(args.key, confirm=False)
    register = Register.load(args.register, key)
    judged = judge(args, watermark, key, None, args.exhaustive, register=register, **decision_settings(args))
    trace = judged.verdict.trace
    hints = ""
    if trace is not None and args.plot is not None:
        from activemark_fast.report import trace_figure

        write_figure(trace_figure(trace), args.plot)
        hints = f"  drawn in {args.plot}"
    code = 3 if trace is None else 0 if trace.accused else 1
    return Outcome(code, {"suspect": args.suspect, **judged.record}, judged.text, hints)
