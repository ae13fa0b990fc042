"""Finding suspects: files, folders that are one model, folders of models, globs, loaded modules."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from activemark_fast.checkpoints.folders import BESIDE_MODELS, SUFFIXES, is_model


@dataclass(frozen=True, eq=False)
class Suspect:
    """One suspect, not yet read.

    Attributes:
        name: the absolute path, or "module N" of a loaded one.
        path: the file or folder; None for a loaded module or where only `error` is left to tell.
        module: the loaded module.
        error: why there is nothing to read.
        skipped: why it is no suspect at all.
    """

    name: str
    path: Path | None = None
    module: nn.Module | None = None
    error: str | None = None
    skipped: str | None = None


def find_suspects(suspects: object, passed_by: Counter[str] | None = None) -> Iterator[Suspect]:
    """The suspects that `suspects` stands for, each path once, in a fixed order.

    Args:
        suspects: a path, a glob, a loaded module or an iterable of these. A folder that holds a configuration
            of transformers, open_clip or PEFT, or the parts of a checkpoint, is one suspect; in any other,
            every file with a suffix of `SUFFIXES` is one. Folders within folders are searched, links
            followed. What trainers write beside a model, under its usual name, is told to be none. What
            cannot be opened, and a link back to a folder it is in, is a suspect with an error.
        passed_by: counts the files with other suffixes in folders that are no model, by suffix.

    Raises:
        TypeError: `suspects` holds something else.
        ValueError: a glob matches nothing.
    """
    if isinstance(suspects, (str, os.PathLike, nn.Module, Suspect)):
        suspects = [suspects]
    if not isinstance(suspects, Iterable) or isinstance(suspects, (bytes, bytearray, memoryview)):
        raise TypeError(
            f"suspects: wanted paths, globs, modules or an iterable of them, got {type(suspects).__name__}"
        )
    seen: set[str] = set()
    passed_by = Counter() if passed_by is None else passed_by
    for index, item in enumerate(suspects):
        for suspect in _find(item, index, passed_by):
            if suspect.name not in seen:
                seen.add(suspect.name)
                yield suspect


def _find(item: object, index: int, passed_by: Counter[str]) -> Iterator[Suspect]:
    if isinstance(item, Suspect):
        yield item
    elif isinstance(item, nn.Module):
        yield Suspect(f"module {index}", module=item)
    elif isinstance(item, str) and glob.has_magic(item) and not os.path.lexists(item):
        matches = sorted(glob.glob(item, recursive=True))
        if not matches:
            raise ValueError(f"suspects: nothing matches {item!r}")
        # Each file once: a link back to a folder above makes ** find the same files again and again.
        for match in {os.path.realpath(match): match for match in reversed(matches)}.values():
            yield from _under(Path(os.path.abspath(match)), (), passed_by)
    elif isinstance(item, (str, os.PathLike)):
        yield from _under(Path(os.path.abspath(item)), (), passed_by)
    else:
        raise TypeError(
            f"suspects: wanted paths, globs, modules or an iterable of them, got {type(item).__name__}"
        )


def _under(path: Path, above: tuple[tuple[int, int], ...], passed_by: Counter[str]) -> Iterator[Suspect]:
    """A file, or what is in a folder; `above` are device and inode of the folders it is in."""
    try:
        facts = os.stat(path)
        if not path.is_dir():
            yield Suspect(str(path), path)
            return
        identity = (facts.st_dev, facts.st_ino)
        if identity in above:
            yield Suspect(str(path), error="a link back to a folder it is in")
            return
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        yield Suspect(str(path), error=f"{type(error).__name__}: {error.strerror}")
        return
    whole = is_model(entry.name for entry in entries)
    if whole:
        yield Suspect(str(path), path)
    for entry in entries:
        child = Path(entry.path)
        # A link that leads nowhere is somebody's checkpoint that is gone.
        is_suspect = child.suffix in SUFFIXES or (entry.is_symlink() and not os.path.exists(child))
        if is_suspect and not whole and BESIDE_MODELS.fullmatch(entry.name):
            yield Suspect(str(child), skipped="not a model: what trainers write beside one")
        elif os.path.isdir(child) or (is_suspect and not whole):
            yield from _under(child, (*above, identity), passed_by)
        elif not whole:
            passed_by[child.suffix] += 1
