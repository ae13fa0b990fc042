"""Reading hostile checkpoints: what is in them first, then only the tensors that are asked for.

Files are read with positioned reads, not memory-mapped: a mapped file that somebody truncates kills the
process (SIGBUS), a read only comes up short.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from activemark_fast.checkpoints.models import CheckpointError
from activemark_fast.checkpoints.torch_file import check_torch_file

LONGEST_HEADER = 16_000_000
"""Bytes; the header of a model with 1,000 tensors has 100,000."""
_ALIGNMENT = 64
_ADAPTER = "adapter_config.json"
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_Opened: TypeAlias = tuple[Path, FileIO, os.stat_result]


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor of a checkpoint: where it is in an open file, or, of a torch file, the tensor itself."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: int  # index of the open file
    offset: int = 0
    tensor: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class HostBuffer:
    """Host memory that one suspect after another is read into; pinned where it is copied to a GPU from."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> Tensor:
        """(size,) uint8, uninitialised; what was reserved before is given up."""
        if len(self._bytes) < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # never both
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return self._bytes[:size]


class Checkpoint:
    """An open checkpoint; a context manager.

    Attributes:
        entries: its tensors by name. Of adapters, those of the model and of the adapter together.
        lora_config: the content of adapter_config.json, if there is one.
        size, modified: bytes and newest modification time in nanoseconds of its files.

    Raises:
        OSError: a file cannot be read.
        CheckpointError: a file is not what it claims to be, or would need more than `most_bytes` of memory.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.path = path
        self.most_bytes = most_bytes
        self.entries: dict[str, Entry] = {}
        self.lora_config: dict[str, Any] | None = None
        self.size = self.modified = 0
        self._files: list[_Opened] = []
        self._stack = ExitStack()
        try:
            for file in self._paths():
                self._add(file)
            if not self.entries:
                raise CheckpointError(f"{path}: holds no tensors")
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, names: Iterable[str], buffer: HostBuffer) -> dict[str, Tensor]:
        """These tensors, on the CPU, valid until `buffer` is used again.

        Raises:
            OSError: a file vanished or cannot be read.
            CheckpointError: a file is shorter than its header says, was changed meanwhile, or too much is
                asked for.
        """
        chosen = {name: self.entries[name] for name in names}
        starts, size = {}, 0
        for name, entry in chosen.items():
            if entry.tensor is None:
                starts[name] = size
                size += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > self.most_bytes:
            raise CheckpointError(
                f"{self.path}: {size} bytes have to be read, but max_bytes is {self.most_bytes}"
            )
        space = buffer.reserve(size)
        view = memoryview(space.numpy().data)
        tensors = {}
        # In the order of the file, which discs like.
        for name, entry in sorted(chosen.items(), key=lambda item: (item[1].file, item[1].offset)):
            if entry.tensor is not None:
                tensors[name] = entry.tensor
                continue
            start, length = starts[name], entry.nbytes
            _read_exactly(self._files[entry.file], entry.offset, view[start : start + length])
            tensors[name] = space[start : start + length].view(entry.dtype).reshape(entry.shape)
        self._check_unchanged()
        return tensors

    def read_bytes(self, name: str) -> bytes:
        """The bytes of one tensor, C-ordered, little-endian; see `read`."""
        entry = self.entries[name]
        if entry.tensor is not None:
            return entry.tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        content = bytearray(entry.nbytes)
        _read_exactly(self._files[entry.file], entry.offset, memoryview(content))
        return bytes(content)

    def _paths(self) -> list[Path]:
        """The files of the weights."""
        if not self.path.is_dir():
            return [self.path]
        adapter = self.path / _ADAPTER
        if adapter.exists():
            self.lora_config = _json_object(self._open(adapter))
        found = [name for name in _WEIGHTS if (self.path / name).exists()][:1]
        found += [name for name in _ADAPTER_WEIGHTS if (self.path / name).exists()][:1]
        if not found:
            raise CheckpointError(f"{self.path}: wanted a file of weights, one of {', '.join(_WEIGHTS)}")
        paths: list[Path] = []
        for name in found:
            if name.endswith(".json"):
                shards = _json_object(self._open(self.path / name)).get("weight_map")
                if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
                    raise CheckpointError(f"{self.path / name}: wanted a weight_map of file names")
                for shard in sorted(set(shards.values())):
                    if shard != os.path.basename(shard) or shard in ("", ".", ".."):
                        raise CheckpointError(f"{self.path / name}: names a file outside of its folder")
                    paths.append(self.path / shard)
            else:
                paths.append(self.path / name)
        return paths

    def _open(self, path: Path) -> _Opened:
        # Without O_NONBLOCK opening a named pipe would wait for a writer for ever.
        file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        self._stack.enter_context(file)
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        self.size += facts.st_size
        self.modified = max(self.modified, facts.st_mtime_ns)
        self._files.append((path, file, facts))
        return self._files[-1]

    def _add(self, path: Path) -> None:
        opened = self._open(path)
        index = len(self._files) - 1
        start = os.pread(opened[1].fileno(), 9, 0)
        if len(start) == 9 and start[8:] == b"{":
            entries = _safetensors_entries(opened, index, int.from_bytes(start[:8], "little"))
        else:
            entries = _torch_entries(opened, index, self.most_bytes)
        self.entries |= entries

    def _check_unchanged(self) -> None:
        for path, _, before in self._files:
            after = os.stat(path)
            if any(
                getattr(before, fact) != getattr(after, fact) for fact in ("st_ino", "st_size", "st_mtime_ns")
            ):
                raise CheckpointError(f"{path}: was changed while it was read")


def _read_exactly(opened: _Opened, offset: int, into: memoryview) -> None:
    path, file, _ = opened
    done = 0
    while done < len(into):
        count = os.preadv(file.fileno(), [into[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{path}: is truncated")
        done += count


def _safetensors_entries(opened: _Opened, index: int, length: int) -> dict[str, Entry]:
    path, _, facts = opened
    if length > min(LONGEST_HEADER, facts.st_size - 8):
        raise CheckpointError(f"{path}: is truncated, or its header of {length} bytes is none")
    header = bytearray(length)
    _read_exactly(opened, 8, memoryview(header))
    entries = {}
    for name, value in _parse_object(header, path).items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            entry = Entry(_DTYPES[dtype], tuple(shape), index, 8 + length + begin) if whole else None
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its header describes a tensor that cannot be") from error
        if entry is None or end - begin != entry.nbytes or len(shape) > 8:
            raise CheckpointError(f"{path}: its header describes a tensor that cannot be")
        if 8 + length + end > facts.st_size:
            raise CheckpointError(f"{path}: is truncated")
        entries[name] = entry
    return entries


def _torch_entries(opened: _Opened, index: int, most_bytes: int) -> dict[str, Entry]:
    path, file, facts = opened
    if facts.st_size > most_bytes:
        raise CheckpointError(
            f"{path}: a torch file is read whole, {facts.st_size} bytes, but max_bytes is {most_bytes}"
        )
    try:
        check_torch_file(file)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path}: neither a safetensors file nor a torch file of nothing but tensors: "
            f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"
        ) from error
    best: dict[str, Tensor] = {}
    for state in _dicts(content, 3):
        tensors = {
            name: value.detach()
            for name, value in state.items()
            if isinstance(name, str)
            and isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.device.type == "cpu"
        }
        best = max(best, tensors, key=len)
    return {name: Entry(value.dtype, tuple(value.shape), index, 0, value) for name, value in best.items()}


def _dicts(content: object, depth: int) -> Iterable[Mapping[Any, Any]]:
    """The dict and the dicts in it, down to some depth: trainers wrap their models in all sorts of names."""
    if isinstance(content, dict):
        yield content
        if depth:
            for value in content.values():
                yield from _dicts(value, depth - 1)


def _json_object(opened: _Opened) -> dict[str, Any]:
    path, _, facts = opened
    if facts.st_size > LONGEST_HEADER:
        raise CheckpointError(f"{path}: JSON of {facts.st_size} bytes, wanted at most {LONGEST_HEADER}")
    content = bytearray(facts.st_size)
    _read_exactly(opened, 0, memoryview(content))
    return _parse_object(content, path)


def _parse_object(content: bytearray, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: wanted JSON, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got {type(value).__name__}")
    return value
