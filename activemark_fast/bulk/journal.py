"""The journal of a sweep: JSON Lines that survive being killed at any moment.

The first line is a header with the watermark's digest and the settings; every other line is one suspect's
result. Each line is written with one call and synchronised to the disk before its result is reported, so
after a crash at most the last line is cut off, and that one is taken off when the sweep is resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from activemark_fast.files import naming

FORMAT_VERSION = 1
_HEADER = "activemark_journal"


class JournalError(ValueError):
    """A journal that cannot be written or continued; the message says why."""


class Journal:
    """An open journal, locked against other writers; a context manager.

    Attributes:
        done: names of the suspects it holds results of.
    """

    def __init__(self, path: Path, settings: dict[str, object], *, resume: bool) -> None:
        """Opens `path` for appending, writes the header where there is none yet.

        Args:
            path: the file.
            settings: JSON types; what a sweep that goes on with this journal must have in common with it.
            resume: go on where there is a journal already.

        Raises:
            JournalError: there is a journal and `resume` is False; it is of another watermark or other
                settings, damaged, or somebody is writing it; or the file is no journal.
            OSError: it cannot be opened.
        """
        self.path = path
        self.done: set[str] = set()
        self._file = path.open("ab", buffering=0)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise JournalError(f"{path}: another process is writing this journal") from error
            self._begin({_HEADER: FORMAT_VERSION, **settings}, resume)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()  # and with it the lock

    def append(self, record: dict[str, object]) -> None:
        """Adds one suspect's result; it is on the disk when this returns."""
        self._write(record)
        self.done.add(str(record["suspect"]))

    def _begin(self, header: dict[str, object], resume: bool) -> None:
        content = self.path.read_bytes()
        whole = _whole(content)
        if not whole and _line(header).startswith(content) and (resume or not content):
            self._file.truncate(0)
            self._write(header)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the file's name, too
            finally:
                os.close(folder)
            return
        if not resume:
            raise JournalError(f"{self.path}: exists; resume it, or choose another name")
        lines = list(_lines(whole, self.path))
        if lines[0] != json.loads(json.dumps(header)):
            differing = sorted(k for k in {*lines[0], *header} if lines[0].get(k) != header.get(k))
            raise JournalError(
                f"{self.path}: is the journal of another sweep; it differs in {', '.join(differing)}"
            )
        self.done = {line["suspect"] for line in lines[1:]}
        self._file.truncate(len(whole))

    def _write(self, line: dict[str, object]) -> None:
        data = _line(line)
        with naming(self.path):
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())


def _line(content: dict[str, object]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def read_journal(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The results in a journal, in the order they came; a last line that was cut off is left out.

    Raises:
        JournalError: it is no journal, or damaged.
        OSError: it cannot be read.
    """
    return list(_lines(_whole(Path(path).read_bytes()), Path(path)))[1:]


def journal_line(path: str | os.PathLike[str], suspect: str, watermark: str) -> dict[str, Any]:
    """The last result on one suspect.

    Args:
        path: the journal.
        suspect: its name, as the journal has it.
        watermark: the digest of the watermark (`Watermark.digest`), hexadecimal, that the journal must be of.

    Raises:
        JournalError: it is no journal, damaged, of another watermark, or has no such suspect.
        OSError: it cannot be read.
    """
    header, *lines = _lines(_whole(Path(path).read_bytes()), Path(path))
    if header.get("watermark") != watermark:
        raise JournalError(f"{path}: is the journal of another watermark")
    found = [line for line in lines if line["suspect"] == suspect]
    if not found:
        raise JournalError(f"{path}: has no result on {suspect}")
    return found[-1]


def _whole(content: bytes) -> bytes:
    """The content of a journal without a last line that was cut off."""
    return content[: content.rfind(b"\n") + 1]


def _lines(content: bytes, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.splitlines() or [b""], start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise JournalError(f"{path}: line {number} is not JSON") from error
        if not isinstance(value, dict) or (_HEADER if number == 1 else "suspect") not in value:
            what = "the header of a journal" if number == 1 else "a result"
            raise JournalError(f"{path}: line {number} is not {what}")
        if number == 1 and value[_HEADER] != FORMAT_VERSION:
            raise JournalError(f"{path}: journal of format {value[_HEADER]}, wanted {FORMAT_VERSION}")
        yield value
