"""The parser of the command line: suggestions for what was mistyped, and completion in a shell."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""How shtab's scripts complete the names of files."""
_OFTEN_FILES = frozenset({"suspect", "paths", "model", "a", "b"})
"""Arguments that are no `Path`, for they may be a model string, a glob or a folder."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that suggests what a mistyped word may have meant, as argparse does from 3.15 on."""

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        mistyped = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if mistyped:
            close = get_close_matches(mistyped[1], re.findall(r"[\w-]+", mistyped[2]), 1)
            if close:
                message = message.replace(" (choose from", f", did you mean {close[0]!r}? (choose from", 1)
        super().error(message)


class PrintCompletion(argparse.Action):
    """Prints a script by which a shell completes the command line, and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, _namespace: Any, shell: Any, _option: Any = None
    ) -> None:
        """See argparse."""
        try:
            shtab = importlib.import_module("shtab")
        except ModuleNotFoundError:
            parser.error("--print-completion: shtab is missing: pip install 'activemark-fast[completion]'")
        _complete_files(parser)
        parser._print_message(shtab.complete(parser, shell), sys.stdout)
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Tells shtab which arguments of a parser and of its commands are files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        elif action.type is Path or action.dest in _OFTEN_FILES:
            action.complete = _FILES  # type: ignore[attr-defined]
