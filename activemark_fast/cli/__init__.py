"""The command line `activemark`: one file for each command.

The heavy modules are imported by the commands that need them, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from contextlib import redirect_stdout

from activemark_fast import __version__
from activemark_fast.cli import (
    commit,
    compare,
    demo,
    embed,
    evaluate,
    forge,
    info,
    issue,
    key,
    open,
    profile,
    report,
    trace,
    verify,
    verify_many,
)
from activemark_fast.cli.common import Outcome, one_line
from activemark_fast.cli.parser import SHELLS, Parser, PrintCompletion

ERROR = 2
INTERRUPTED = 130
EXIT_CODES = (
    "Exit codes: 0 done, or the answer is yes (a match, a descent, as expected); 1 the answer is no, and "
    "never a failure; 2 error; 3 inconclusive; 4 a match, of verify-many --fail-on-match; 130 interrupted. "
    "--help of a command that answers says what its answers are."
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code; usage errors and --help raise SystemExit.

    Codes: see `EXIT_CODES`.
    """
    args = _parser().parse_args(argv)
    _forbid_core_files()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            # Whatever a library prints, standard output holds the result only.
            with redirect_stdout(sys.stderr):
                outcome: Outcome = args.run(args)
        except KeyboardInterrupt:
            print("activemark: interrupted", file=sys.stderr)
            return INTERRUPTED
        except (OSError, TypeError, ValueError) as error:
            return _failed(one_line(error))
        except (MemoryError, RuntimeError) as error:  # torch's own lack of memory is a RuntimeError
            return _failed(one_line(error) or type(error).__name__)
        except Exception as error:
            # A defect. Python's own exit code for it is 1, which would say "no match".
            traceback.print_exc()
            return _failed(f"{type(error).__name__}: {one_line(error)}")
    if args.json:
        text = json.dumps(outcome.record, allow_nan=False)
    else:
        text = outcome.text if args.quiet or not outcome.hints else f"{outcome.text}\n{outcome.hints}"
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader has seen enough.
        _discard_output()
    except OSError as error:  # a full disk
        _discard_output()
        return _failed(one_line(error))
    return outcome.code


def _failed(why: str) -> int:
    print(f"activemark: error: {why}", file=sys.stderr)
    return ERROR


def _discard_output() -> None:
    """What could not be written is let go: Python would try and complain again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _forbid_core_files() -> None:
    """A process that dies leaves no image of its memory on disk, where a key might be in it."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="activemark",
        description="Mark a visual foundation model before release; tell later what descends from it.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"activemark {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print a script for a shell to complete commands, options and files with (needs shtab)",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (
        key,
        profile,
        embed,
        issue,
        commit,
        verify,
        verify_many,
        trace,
        compare,
        open,
        forge,
        evaluate,
        report,
        demo,
        info,
    ):
        command.add_to(commands)
    return parser


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    print(f"activemark: warning: {one_line(message)}", file=sys.stderr)
