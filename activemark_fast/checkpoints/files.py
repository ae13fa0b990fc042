"""Opening hostile checkpoints: what is in them first, then only the tensors that are asked for.

Files are read with positioned reads, not memory-mapped: a mapped file that somebody truncates kills the
process (SIGBUS), a read only comes up short. What a file is, its content tells, never its name.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from activemark_fast.checkpoints.errors import CheckpointError, NotAModelError, UnreadFormError
from activemark_fast.checkpoints.pickles import (
    Array,
    QuantisedTensor,
    Storage,
    StoredTensor,
    named_values,
    read_pickle,
    stub_names,
)

LONGEST_HEADER = 16_000_000
"""Bytes; the header of a model with 1,000 tensors has 100,000."""
LONGEST_PICKLE = 64_000_000
"""Bytes; the pickle of such a model, the numbers of which lie beside it, has 200,000."""
_ALIGNMENT = 64
_MOST_DIMENSIONS = 8
_ADAPTER = "adapter_config.json"
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "pytorch_model_fsdp.bin",
    "flax_model.msgpack",
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NPY = re.compile(
    rb"\x93NUMPY[\1-\3]\0.{2,4}?\{'descr': '([^']{1,20})', 'fortran_order': (True|False), "
    rb"'shape': \(([\d, ]*)\),? *\} *\n",
    re.DOTALL,
)
_WATERMARK = "activemark_watermark"
_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_LEGACY_PICKLES = 4
"""Magic number, version, facts about the system, and what was saved; the keys of the storages follow."""
# What else is found under the names of checkpoints: how it starts → what it is, and what to do.
_BROKEN_DOWNLOADS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file it points to: fetch it with git lfs pull"),
    (rb"\s*<(?:!doctype|html|\?xml)", "an HTML page, as a failed download leaves it"),
    (rb"\s*[\[{]", "JSON text"),
)
_OTHER_FORMS = (
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a compressed file: unpack it first"),
    (rb"(?s).{257}ustar", "a tar archive: unpack it first"),
    (rb"\x89HDF", "an HDF5 file, as Keras writes it: convert it to safetensors first"),
    (rb"GGUF", "a GGUF file of llama.cpp: convert it to safetensors first"),
    (rb"\x93NUMPY", "a single NumPy array: wanted named ones, as numpy.savez writes them"),
)
_ONNX = re.compile(rb"\x08[\x01-\x1f](?:\x12[\x01-\x7f]|:)")
"""The version of its form, then who made it or the graph."""


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
                raise CheckpointError(f"{self.path}: is truncated")
            done += count

    def read(self, offset: int, length: int) -> bytes:
        """These bytes; see `read_into`."""
        if not 0 <= offset <= offset + length <= self.size:
            raise CheckpointError(f"{self.path}: is truncated")
        content = bytearray(length)
        self.read_into(offset, memoryview(content))
        return bytes(content)


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor of a checkpoint: where it is in an open file, or the tensor itself.

    strides: in elements; None where the tensor is C-ordered.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: int = 0  # index of the open file
    offset: int = 0
    strides: tuple[int, ...] | None = None
    tensor: Tensor | None = None

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


def _held(tensor: Tensor) -> Entry:
    return Entry(tensor.dtype, tuple(tensor.shape), tensor=tensor)


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


class Checkpoint:
    """An open checkpoint; a context manager.

    Attributes:
        entries: its tensors by name. What is nested in dicts has the path as its name; of adapters, those of
            the model and of the adapter together.
        unread: name → what stands there in place of a tensor and cannot be read as one.
        metadata: of a safetensors file.
        lora_config: the content of adapter_config.json, if there is one.
        size, modified: bytes and newest modification time in nanoseconds of its files.

    Raises:
        OSError: a file cannot be read.
        CheckpointError: a file is not what it claims to be, or would need more than `most_bytes` of memory;
            `UnreadFormError` for a form that is not read, `NotAModelError` for what is no model.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.path = path
        self.most_bytes = most_bytes
        self.entries: dict[str, Entry] = {}
        self.unread: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self.lora_config: dict[str, Any] | None = None
        self.size = self.modified = 0
        self._files: list[Opened] = []
        self._stack = ExitStack()
        try:
            for file in self._paths():
                self._add(file)
            if _WATERMARK in self.metadata:
                raise NotAModelError(f"{path}: is a watermark, not a model")
            if not self.entries and not self.unread:
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

    @property
    def files(self) -> list[Path]:
        """The open files, as `Entry.file` counts them."""
        return [opened.path for opened in self._files]

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
            start, stop = starts[name], starts[name] + entry.nbytes
            self._files[entry.file].read_into(entry.offset, view[start:stop])
            tensors[name] = entry.over(space[start:stop])
        self._check_unchanged()
        return tensors

    def read_bytes(self, name: str) -> bytes:
        """The bytes of one tensor, C-ordered, little-endian; see `read`."""
        entry = self.entries[name]
        if entry.tensor is None and entry.strides is None:
            return self._files[entry.file].read(entry.offset, entry.nbytes)
        tensor = self.read([name], HostBuffer())[name]
        return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    def _paths(self) -> list[Path]:
        """The files of the weights."""
        if not self.path.is_dir():
            return [self.path]
        names = set(os.listdir(self.path))
        if _ADAPTER in names:
            self.lora_config = _json_object(self._open(self.path / _ADAPTER))
        found = [name for name in _WEIGHTS if name in names][:1]
        shards = sorted(name for name in names if _SHARD.fullmatch(name))
        if not found and shards:
            found = self._all_shards(shards)
        adapter = [name for name in _ADAPTER_WEIGHTS if name in names][:1]
        if adapter and not found:
            base = (self.lora_config or {}).get("base_model_name_or_path")
            raise UnreadFormError(
                f"{self.path}: is an adapter alone: put the weights of its base model, "
                f"{str(base)[:100]!r}, into the same folder"
            )
        if not found:
            self._refuse_folder(names)
        paths: list[Path] = []
        for name in found + adapter:
            paths += self._shards(name) if name.endswith(".json") else [self.path / name]
        return paths

    def _all_shards(self, names: list[str]) -> list[str]:
        """Shards that no index names; all of them have to be there."""
        parts = [match for match in map(_SHARD.fullmatch, names) if match]
        of_one = [part for part in parts if (part[1], part[3]) == (parts[0][1], parts[0][3])]
        if len(of_one) != int(parts[0][3]):
            raise CheckpointError(
                f"{self.path}: {len(of_one)} shards, wanted {int(parts[0][3])}: {of_one[0][0]}, ..."
            )
        return [part[0] for part in of_one]

    def _shards(self, index: str) -> list[Path]:
        shards = _json_object(self._open(self.path / index)).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise CheckpointError(f"{self.path / index}: wanted a weight_map of file names")
        for shard in shards.values():
            if shard != os.path.basename(shard) or shard in ("", ".", ".."):
                raise CheckpointError(f"{self.path / index}: names a file outside of its folder")
        return [self.path / shard for shard in sorted(set(shards.values()))]

    def _refuse_folder(self, names: set[str]) -> None:
        if ".metadata" in names and any(name.endswith(".distcp") for name in names):
            raise UnreadFormError(
                f"{self.path}: is a distributed checkpoint of torch: convert it with "
                "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
            )
        if any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in names):
            raise UnreadFormError(
                f"{self.path}: is a DeepSpeed ZeRO checkpoint: gather it with its zero_to_fp32.py"
            )
        raise CheckpointError(f"{self.path}: wanted a file of weights, one of {', '.join(_WEIGHTS)}")

    def _open(self, path: Path) -> Opened:
        # Without O_NONBLOCK opening a named pipe would wait for a writer for ever.
        file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        self._stack.enter_context(file)
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        self.size += facts.st_size
        self.modified = max(self.modified, facts.st_mtime_ns)
        self._files.append(Opened(path, file, facts))
        return self._files[-1]

    def _add(self, path: Path) -> None:
        opened = self._open(path)
        start = os.pread(opened.file.fileno(), 512, 0)
        if not start:
            raise CheckpointError(f"{path}: is an empty file")
        if start[8:9] == b"{":
            self._add_safetensors(opened, int.from_bytes(start[:8], "little"))
        elif start[:4] == b"PK\x03\x04" or start[:4] == b"PK\x05\x06":
            self._add_zip(opened)
        elif start[:1] == b"\x80" and b"\0" <= start[1:2] <= b"\5":
            self._add_pickles(opened)
        else:
            for error, kinds in ((CheckpointError, _BROKEN_DOWNLOADS), (UnreadFormError, _OTHER_FORMS)):
                for pattern, what in kinds:
                    if re.match(pattern, start, re.IGNORECASE):
                        raise error(f"{path}: is {what}")
            if re.match(rb"[\x81-\x8f\xde\xdf]", start):
                self._add_msgpack(opened)
                return
            if re.match(_ONNX, start):
                self._add_onnx(opened)
                return
            text = " but text" if all(32 <= c < 127 or c in b"\t\r\n" for c in start) else ""
            raise CheckpointError(f"{path}: neither a safetensors file nor a torch file{text}")

    def _add_safetensors(self, opened: Opened, length: int) -> None:
        path, index = opened.path, len(self._files) - 1
        if length > min(LONGEST_HEADER, opened.size - 8):
            raise CheckpointError(f"{path}: is truncated, or its header of {length} bytes is none")
        header = _parse_object(opened.read(8, length), path)
        metadata = header.pop("__metadata__", {})
        if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
            self.metadata |= metadata
        for name, value in header.items():
            try:
                dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
                whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
                entry = Entry(_DTYPES[dtype], tuple(shape), index, 8 + length + begin) if whole else None
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: its header describes a tensor that cannot be") from error
            if entry is None or end - begin != entry.nbytes or len(shape) > _MOST_DIMENSIONS:
                raise CheckpointError(f"{path}: its header describes a tensor that cannot be")
            if 8 + length + end > opened.size:
                raise CheckpointError(f"{path}: is truncated")
            self.entries[name] = entry

    def _add_zip(self, opened: Opened) -> None:
        path = opened.path
        try:
            with zipfile.ZipFile(opened.file) as archive:
                records = {record.filename: record for record in archive.infolist()}
                # What is compressed is not read: a small file may unpack to a large one.
                packed = [r.filename for r in archive.infolist() if r.compress_type != zipfile.ZIP_STORED]
                if sum(r.file_size for r in archive.infolist() if r.filename not in packed) > opened.size:
                    raise CheckpointError(f"{path}: holds more than its size")
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: a damaged or truncated zip archive: {error}") from error
        pickles = sorted(name for name in records if name.endswith("data.pkl"))
        if any(name.endswith((".npy", ".pkl")) or "/data/" in name for name in packed):
            raise UnreadFormError(f"{path}: holds compressed records: unpack and save it again")
        if records and all(name.endswith(".npy") for name in records):
            for name, record in records.items():
                self._add_npy(opened, name.removesuffix(".npy"), record)
        elif not pickles:
            raise CheckpointError(f"{path}: is a zip archive without a pickle")
        else:
            self._add_torch_zip(opened, pickles[0], records)

    def _add_torch_zip(self, opened: Opened, main: str, records: dict[str, zipfile.ZipInfo]) -> None:
        folder = main.removesuffix("data.pkl")
        order = records.get(f"{folder}byteorder")
        if order is not None and _content(opened, order, 16) != b"little":
            raise UnreadFormError(f"{opened.path}: was written on a big-endian machine: save it again")
        root = _unpickled(BytesIO(_content(opened, records[main], LONGEST_PICKLE)), opened.path)

        def place(storage: Storage) -> tuple[int, int]:
            record = records.get(f"{folder}data/{storage.key}")
            if record is None:
                raise CheckpointError(f"{opened.path}: lacks the record {folder}data/{storage.key[:50]}")
            return _data_offset(opened, record), record.file_size

        self._add_values(root, place, opened)

    def _add_pickles(self, opened: Opened) -> None:
        """A file as torch.save wrote it before version 1.6, or a pickle."""
        legacy = _LEGACY_MAGIC in opened.read(0, min(opened.size, 64))
        if not legacy and opened.size > self.most_bytes:
            raise CheckpointError(
                f"{opened.path}: a pickle is read whole, {opened.size} bytes, but max_bytes is "
                f"{self.most_bytes}"
            )
        stream = BytesIO(opened.read(0, min(opened.size, LONGEST_PICKLE) if legacy else opened.size))
        if not legacy:
            self._add_values(_unpickled(stream, opened.path), None, opened)
            return
        known: dict[str, Storage] = {}
        _, _, system, root = (_unpickled(stream, opened.path, known) for _ in range(_LEGACY_PICKLES))
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise UnreadFormError(f"{opened.path}: was written on a big-endian machine: save it again")
        keys = _unpickled(stream, opened.path)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CheckpointError(f"{opened.path}: a damaged torch file: no list of its storages")
        places: dict[str, tuple[int, int]] = {}
        offset = stream.tell()
        for key in keys:
            count = int.from_bytes(opened.read(offset, 8), "little")
            if key not in known:
                raise CheckpointError(f"{opened.path}: a damaged torch file: a storage of no known type")
            dtype = known[key].dtype
            size = count * (1 if dtype is None else dtype.itemsize)
            if offset + 8 + size > opened.size:
                raise CheckpointError(f"{opened.path}: is truncated")
            places[key] = offset + 8, size
            offset += 8 + size

        def place(storage: Storage) -> tuple[int, int]:
            if storage.key not in places:
                raise CheckpointError(f"{opened.path}: lacks the storage {storage.key[:50]}")
            return places[storage.key]

        self._add_values(root, place, opened)

    def _add_values(
        self, root: object, place: Callable[[Storage], tuple[int, int]] | None, opened: Opened
    ) -> None:
        """Adds the tensors of a pickle. `place` is where a storage lies: offset and bytes."""
        index = len(self._files) - 1

        def entry(value: StoredTensor) -> Entry | None:
            if place is None:
                return None
            offset, size = place(value.storage)
            order = zip(value.shape, value.strides, _c_strides(value.shape), strict=True)
            contiguous = all(stride == plain for size, stride, plain in order if size != 1)
            made = Entry(
                value.dtype,
                value.shape,
                index,
                offset + value.offset * value.dtype.itemsize,
                None if contiguous else value.strides,
            )
            if math.prod(value.shape) * value.dtype.itemsize > size:
                return None  # one number many times over
            if made.offset + made.nbytes > offset + size:
                raise CheckpointError(f"{opened.path}: a tensor reaches beyond its storage")
            return made

        def numbers(value: object) -> Entry | None:
            if isinstance(value, StoredTensor):
                return entry(value)
            return _held(torch.tensor(float(value))) if isinstance(value, int | float) else None

        for name, value in named_values(root):
            made: dict[str, Entry | None] = {}
            if isinstance(value, StoredTensor):
                made = {name: entry(value)}
            elif isinstance(value, Array):
                made = {name: _array_entry(value, opened.path)}
            elif isinstance(value, QuantisedTensor):
                made = {
                    name: entry(value.whole),
                    f"{name}.q_scale": numbers(value.scale),
                    f"{name}.q_zero_point": numbers(value.zero_point),
                }
            if not name:
                continue  # a tensor alone
            whole = {key: one for key, one in made.items() if one is not None}
            if len(whole) == len(made) > 0:
                self.entries |= whole
            else:
                self.unread[name] = str(getattr(value, "made_by", "tensor of more elements than it stores"))
        if not self.entries and not self.unread:
            asked = ", ".join(repr(name) for name in stub_names(root)[:3])
            told = f"; it asks for {asked}, which is not run" if asked else ""
            raise CheckpointError(f"{opened.path}: holds no tensors{told}")

    def _add_npy(self, opened: Opened, name: str, record: zipfile.ZipInfo) -> None:
        offset = _data_offset(opened, record)
        start = opened.read(offset, min(record.file_size, 4096))
        found = _NPY.match(start)
        try:
            if found is None:
                raise ValueError("no header")
            dtype = _torch_dtype(found[1].decode())
            shape = tuple(int(size) for size in found[3].replace(b",", b" ").split())
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{opened.path}: {name[:100]!r} is no array of numbers: {error}") from error
        strides = tuple(reversed(_c_strides(shape[::-1]))) if found[2] == b"True" else None
        entry = Entry(dtype, shape, len(self._files) - 1, offset + found.end(), strides)
        if entry.nbytes > record.file_size - found.end() or len(shape) > _MOST_DIMENSIONS:
            raise CheckpointError(f"{opened.path}: {name[:100]!r} is truncated")
        self.entries[name] = entry

    def _add_msgpack(self, opened: Opened) -> None:
        from activemark_fast.checkpoints.msgpack import flax_arrays

        index = len(self._files) - 1
        try:
            for name, dtype, shape, offset in flax_arrays(opened.read, opened.size):
                self.entries[name] = Entry(_torch_dtype(dtype), shape, index, offset)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{opened.path}: no msgpack of Flax: {error}") from error

    def _add_onnx(self, opened: Opened) -> None:
        from activemark_fast.checkpoints.onnx import initializers

        files: dict[str | None, int] = {None: len(self._files) - 1}
        try:
            found = initializers(opened.read, opened.size)
        except (ValueError, IndexError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{opened.path}: no ONNX model, or a damaged one: {error}") from error
        for name, tensor in found.items():
            if tensor.dtype is None:
                self.unread[name] = "tensor of another type"
                continue
            if tensor.location not in files:
                beside = str(tensor.location)
                if beside != os.path.basename(beside) or beside in ("", ".", ".."):
                    raise CheckpointError(f"{opened.path}: names a file outside of its folder")
                self._open(opened.path.parent / beside)
                files[tensor.location] = len(self._files) - 1
            index, shape, strides = files[tensor.location], tensor.shape, None
            if tensor.transposed:
                shape, strides = shape[::-1], _c_strides(shape)[::-1]
            entry = Entry(tensor.dtype, shape, index, tensor.offset, strides)
            wanted = math.prod(shape) * tensor.dtype.itemsize
            whole = 0 <= tensor.offset <= tensor.offset + wanted <= self._files[index].size
            if tensor.size not in (None, wanted) or not whole or len(shape) > _MOST_DIMENSIONS:
                raise CheckpointError(f"{opened.path}: {name[:100]!r} is truncated or of another shape")
            self.entries[name] = entry

    def _check_unchanged(self) -> None:
        for opened in self._files:
            after = os.stat(opened.path)
            if any(
                getattr(opened.facts, fact) != getattr(after, fact)
                for fact in ("st_ino", "st_size", "st_mtime_ns")
            ):
                raise CheckpointError(f"{opened.path}: was changed while it was read")


def _unpickled(stream: BytesIO, path: Path, storages: dict[str, Storage] | None = None) -> object:
    try:
        return read_pickle(stream, storages)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: neither a safetensors file nor a torch file of tensors: {error}"
        ) from error


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _data_offset(opened: Opened, record: zipfile.ZipInfo) -> int:
    """Where a record's content starts; behind its own header, whose length only that header tells."""
    header = opened.read(record.header_offset, 30)
    if header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{opened.path}: a damaged zip archive")
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return record.header_offset + 30 + names


def _content(opened: Opened, record: zipfile.ZipInfo, longest: int) -> bytes:
    if record.file_size > longest:
        raise CheckpointError(
            f"{opened.path}: holds a pickle of {record.file_size} bytes, wanted at most {longest}"
        )
    return opened.read(_data_offset(opened, record), record.file_size)


def _torch_dtype(name: str) -> torch.dtype:
    """Numpy's name of a dtype, "<f4" or "float32", as torch has it."""
    if name == "bfloat16":
        return torch.bfloat16
    kind = np.dtype(name)
    if kind.byteorder == ">" or kind.hasobject or kind.kind not in "biuf":
        raise ValueError(f"numbers of the type {name[:50]!r}")
    return torch.from_numpy(np.zeros(0, kind)).dtype


def _array_entry(array: Array, path: Path) -> Entry:
    try:
        values = np.frombuffer(array.content, np.dtype(array.dtype))
        _torch_dtype(array.dtype)
        shaped = values.reshape(array.shape, order="F" if array.fortran else "C")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: a NumPy array that cannot be: {error}") from error
    return _held(torch.from_numpy(np.array(shaped, order="C")))  # its own: `content` cannot be written to


def _json_object(opened: Opened) -> dict[str, Any]:
    path, size = opened.path, opened.size
    if size > LONGEST_HEADER:
        raise CheckpointError(f"{path}: JSON of {size} bytes, wanted at most {LONGEST_HEADER}")
    return _parse_object(opened.read(0, size), path)


def _parse_object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: wanted JSON, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got {type(value).__name__}")
    return value
