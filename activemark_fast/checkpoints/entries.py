"""Open files, and where in them tensors lie.

Files are read with positioned reads, not memory-mapped: a mapped file that somebody truncates kills the
process (SIGBUS), a read only comes up short.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activemark_fast.checkpoints.errors import CheckpointError

MAX_JSON = 16_000_000
"""Bytes; the header of a model with 1,000 tensors has 100,000."""
_MAX_DIMENSIONS = 8
_SAME = ("st_ino", "st_size", "st_mtime_ns")


@dataclass(frozen=True, eq=False)
class Opened:
    """An open file: where it is, the file, and what was known of it when it was opened."""

    path: Path
    file: FileIO
    facts: os.stat_result

    @property
    def size(self) -> int:
        """Bytes."""
        return self.facts.st_size

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fills `into` from `offset` on. Raises CheckpointError where the file ends before."""
        done = 0
        while done < len(into):
            count = os.preadv(self.file.fileno(), [into[done:]], offset + done)
            if count == 0:
                raise CheckpointError("is truncated")
            done += count

    def read(self, offset: int, length: int) -> bytes:
        """These bytes; see `read_into`."""
        if not 0 <= offset <= offset + length <= self.size:
            raise CheckpointError("is truncated")
        content = bytearray(length)
        self.read_into(offset, memoryview(content))
        return bytes(content)

    def json(self) -> dict[str, Any]:
        """The JSON object that the file is. Raises CheckpointError for anything else."""
        if self.size > MAX_JSON:
            raise CheckpointError(f"JSON of {self.size} bytes, wanted at most {MAX_JSON}")
        return json_object(self.read(0, self.size))

    def was_changed(self) -> bool:
        """Whether another file has its name now, or it was written to."""
        after = os.stat(self.path)
        return any(getattr(self.facts, fact) != getattr(after, fact) for fact in _SAME)


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor of a checkpoint: where it is in an open file, or the tensor itself.

    strides: in elements; None where the tensor is C-ordered.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Opened | None = None
    offset: int = 0
    strides: tuple[int, ...] | None = None
    tensor: Tensor | None = None

    @classmethod
    def within(
        cls,
        stop: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        file: Opened,
        offset: int,
        strides: tuple[int, ...] | None = None,
    ) -> Entry:
        """A tensor in a file, before the byte `stop`. Raises CheckpointError where it cannot lie there."""
        entry = cls(dtype, shape, file, offset, strides)
        whole = len(shape) <= _MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in (*shape, offset))
        if not whole or offset + entry.nbytes > stop:
            raise CheckpointError("is truncated, or describes a tensor that lies beyond its end")
        return entry

    @classmethod
    def held(cls, tensor: Tensor) -> Entry:
        """A tensor in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor=tensor)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, from the first to the last."""
        if self.strides is None or 0 in self.shape:
            return math.prod(self.shape) * self.dtype.itemsize
        steps = zip(self.shape, self.strides, strict=True)
        return (1 + sum((size - 1) * stride for size, stride in steps)) * self.dtype.itemsize

    def over(self, content: Tensor) -> Tensor:
        """The tensor over its bytes, (nbytes,) uint8."""
        values = content.view(self.dtype)
        if self.strides is None or 0 in self.shape:
            return values.reshape(self.shape)
        return values.as_strided(self.shape, self.strides)


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds; see `Checkpoint`."""

    entries: dict[str, Entry] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


class HostBuffer:
    """Host memory that one suspect after another is read into; pinned where it is copied to a GPU from."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> Tensor:
        """(size,) uint8, uninitialised; what was reserved before is given up."""
        if len(self._bytes) < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # never both
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return self._bytes[:size]


def json_object(content: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"wanted JSON, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"wanted a JSON object, got {type(value).__name__}")
    return value


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a C-ordered tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def numpy_dtype(name: str) -> torch.dtype:
    """Numpy's name of a dtype, "<f4" or "float32", as torch has it. Raises CheckpointError for others."""
    if name == "bfloat16":
        return torch.bfloat16
    try:
        kind = np.dtype(name)
        if kind.byteorder != ">" and kind.kind in "biuf":
            return torch.from_numpy(np.zeros(0, kind)).dtype
    except (TypeError, ValueError):
        pass
    raise CheckpointError(f"numbers of the type {name[:50]!r}")
