"""Sketches: a few kB that tell which of thousands of models are worth opening. A first pass, no evidence.

Of each block, what does not depend on the order of units and heads: for every channel of the residual stream,
how much the MLP's units read from it and write to it, and the biases. These vectors are projected by random
matrices that everybody has. A model that was fine-tuned, pruned or renumbered has nearly the same sketch; one
whose residual stream was permuted or rotated has not, and is found by `compare` only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from activemark_fast.checkpoints import CheckpointError
from activemark_fast.descent.weights import Block, Source, Weights
from activemark_fast.files import write_whole

NUMBERS = 128
"""int8 numbers for each block: 3 kB for a model of 24."""
_VERSION = 1
_SEED = 23
_LARGEST = 3.0
"""Deviations that the largest number stands for."""
_FORMAT = "activemark sketches"


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is kept of a model.

    Attributes:
        width: channels of its residual stream.
        values: (L, 128) int8, a row for each block.
    """

    width: int
    values: npt.NDArray[np.int8]

    @classmethod
    def of(cls, model: Source) -> Sketch:
        """Makes the sketch of a model; reads all of it once.

        Raises:
            TypeError, CheckpointError: as `compare`.
        """
        with Weights(model) as weights, torch.no_grad():
            generator = torch.Generator().manual_seed(_SEED)
            projection = torch.randn(NUMBERS, 4, weights.width, generator=generator, dtype=torch.float64)
            rows = [
                (projection * _profile(weights.block(index))).sum(dim=(1, 2)) / (4 * weights.width) ** 0.5
                for index in range(weights.depth)
            ]
            scaled = torch.stack(rows) * (127 / _LARGEST)
            return cls(weights.width, scaled.round().clamp(-127, 127).to(torch.int8).numpy())

    def likeness(self, other: Sketch) -> float:
        """-1 to 1: mean correlation of the blocks, in the best of all shifts. About 0 for independent models.

        0 for models of different widths.
        """
        return ranked(self, [other])[0]

    def digest(self) -> bytes:
        """SHA-256 of the sketch (32 bytes): what is committed to."""
        head = f"activemark_fast/v1/sketch/{_VERSION}/{self.width}/{len(self.values)}/"
        return hashlib.sha256(head.encode() + self.values.tobytes()).digest()


def ranked(sketch: Sketch, candidates: Sequence[Sketch]) -> list[float]:
    """`Sketch.likeness` to each of the candidates."""
    ours = _normal(sketch.values)
    found = []
    for candidate in candidates:
        if candidate.width != sketch.width or not len(candidate.values):
            found.append(0.0)
            continue
        alike = ours @ _normal(candidate.values).T
        shorter = min(alike.shape)
        # Shifts by which the shorter of the two lies within the longer: blocks put in front, or cut off.
        shifts = range(-(alike.shape[0] - shorter), alike.shape[1] - shorter + 1)
        found.append(max(float(alike.diagonal(shift).sum()) / shorter for shift in shifts))
    return found


@dataclass(frozen=True)
class Entry:
    """A line of an index.

    Attributes:
        path: absolute.
        size, modified: bytes, and newest modification time in nanoseconds, when it was read.
        sketch: of the model; None where it could not be read.
        error: why not.
    """

    path: str
    size: int
    modified: int
    sketch: Sketch | None
    error: str | None = None


class Index:
    """Sketches of many models, in one safetensors file.

    Attributes:
        entries: by path.
    """

    def __init__(self, entries: Mapping[str, Entry] | None = None) -> None:
        self.entries = dict(entries or {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Index:
        """Reads what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no index, or damaged.
        """
        try:
            with safetensors.safe_open(path, framework="np") as file:
                header = json.loads((file.metadata() or {})["index"])
                if header["format"] != _FORMAT or header["version"] != _VERSION:
                    raise ValueError("not an index of this version")
                entries = {}
                for number, line in enumerate(header["entries"]):
                    sketch = None
                    if line["error"] is None:
                        values = file.get_tensor(str(number))
                        if values.dtype != np.int8 or values.ndim != 2 or values.shape[1] != NUMBERS:
                            raise ValueError("a sketch of another form")
                        sketch = Sketch(int(line["width"]), values)
                    entry = Entry(
                        str(line["path"]), int(line["size"]), int(line["modified"]), sketch, line["error"]
                    )
                    entries[entry.path] = entry
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: wanted an index of sketches: {error}") from error
        return cls(entries)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index, whole or not at all."""
        lines: list[dict[str, Any]] = []
        values = {}
        for number, entry in enumerate(self.entries.values()):
            if entry.sketch is not None:
                values[str(number)] = entry.sketch.values
            lines.append(
                {
                    "path": entry.path,
                    "size": entry.size,
                    "modified": entry.modified,
                    "width": None if entry.sketch is None else entry.sketch.width,
                    "error": entry.error,
                }
            )
        header = json.dumps({"format": _FORMAT, "version": _VERSION, "entries": lines})
        write_whole(path, safetensors.numpy.save(values, metadata={"index": header}), mode=0o644)

    def update(self, paths: Iterable[Path]) -> Iterator[Entry]:
        """The entries of checkpoints, files or folders; each is read if it is new or was changed since."""
        for path in paths:
            name = os.path.abspath(path)
            size, modified = _facts(Path(name))
            known = self.entries.get(name)
            if known is None or (known.size, known.modified) != (size, modified):
                try:
                    known = Entry(name, size, modified, Sketch.of(name))
                except (OSError, CheckpointError) as error:
                    known = Entry(name, size, modified, None, " ".join(str(error).split())[:300])
                self.entries[name] = known
            yield known


def _facts(path: Path) -> tuple[int, int]:
    """Bytes and newest modification time of a file, or of the files of a folder."""
    try:
        files = [path] if path.is_file() else [child for child in path.iterdir() if child.is_file()]
        facts = [os.stat(file) for file in files]
    except OSError:
        return 0, 0
    return sum(fact.st_size for fact in facts), max((fact.st_mtime_ns for fact in facts), default=0)


def _profile(block: Block) -> Tensor:
    """(4, D) float64, each row of mean 0 and deviation 1 (or 0): logarithms of norms, and biases."""
    norms = torch.stack(
        [block.reads.double().square().sum(dim=(0, 1)), block.writes.double().square().sum(dim=0)]
    )
    rows = torch.cat([(norms + 1e-30).log(), block.vectors[:2].double()])
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.std(dim=1, correction=0, keepdim=True).clamp_min(1e-12)


def _normal(values: npt.NDArray[np.int8]) -> npt.NDArray[np.float32]:
    rows = values.astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6))
