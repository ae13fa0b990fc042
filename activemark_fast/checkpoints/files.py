"""Opening hostile checkpoints: what is in them first, then only the tensors that are asked for.

What a file is, its content tells, never its name.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from activemark_fast.checkpoints.archives import read_archive
from activemark_fast.checkpoints.entries import Contents, Entry, HostBuffer, Opened
from activemark_fast.checkpoints.errors import CheckpointError, NotAModelError, UnreadFormError
from activemark_fast.checkpoints.folders import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    beside,
    other_models,
    weight_files,
)
from activemark_fast.checkpoints.msgpack import read_flax
from activemark_fast.checkpoints.onnx import read_onnx
from activemark_fast.checkpoints.safetensors import read_safetensors
from activemark_fast.checkpoints.torch_files import read_torch_pickle

_ALIGNMENT = 64
_WATERMARK = "activemark_watermark"
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
_FLAX = rb"[\x81-\x8f\xde\xdf]"
_ONNX = rb"\x08[\x01-\x1f](?:\x12[\x01-\x7f]|:)"
"""The version of its form, then who made it or the graph."""


class Checkpoint:
    """An open checkpoint; a context manager.

    Attributes:
        entries: its tensors by name. What is nested in dicts has the path as its name; of adapters, those of
            the model and of the adapter together.
        unread: name → what stands there in place of a tensor and cannot be read as one.
        metadata: of a safetensors file.
        lora_config: the content of adapter_config.json, if there is one.
        files: the open files.

    Raises:
        OSError: a file cannot be read.
        CheckpointError: a file is not what it claims to be, or would need more than `max_bytes` of memory;
            `UnreadFormError` for a form that is not read, `NotAModelError` for what is no model.
    """

    def __init__(self, path: Path, max_bytes: int, files: Sequence[Path] = ()) -> None:
        """path: a file or a folder. files: those of the weights; without, they are found."""
        self.path = path
        self.max_bytes = max_bytes
        self.entries: dict[str, Entry] = {}
        self.unread: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self.lora_config: dict[str, Any] | None = None
        self.files: list[Opened] = []
        self._stack = ExitStack()
        try:
            self._weight_files = list(files or self._weights())
            for file in self._weight_files:
                with _naming(file):
                    found = self._contents(self._open(file))
                    twice = sorted(found.entries.keys() & self.entries.keys())
                    if twice:
                        raise CheckpointError(
                            f"holds {twice[0][:100]!r} as another file of the model does: which counts?"
                        )
                self.entries |= found.entries
                self.unread |= found.unread
                self.metadata |= found.metadata
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
    def size(self) -> int:
        """Bytes of its files."""
        return sum(opened.size for opened in self.files)

    @property
    def modified(self) -> int:
        """Newest modification time of its files, nanoseconds."""
        return max((opened.facts.st_mtime_ns for opened in self.files), default=0)

    def read(self, names: Iterable[str], buffer: HostBuffer | None = None) -> dict[str, Tensor]:
        """These tensors, on the CPU, valid until `buffer` is used again; without, in memory of their own.

        Raises:
            OSError: a file vanished or cannot be read.
            CheckpointError: a file is shorter than its header says, was changed meanwhile, or too much is
                asked for.
        """
        chosen = [(name, self.entries[name]) for name in names]
        tensors = {name: entry.tensor for name, entry in chosen if entry.tensor is not None}
        # In the order of the file, which discs like.
        order = {opened: place for place, opened in enumerate(self.files)}
        stored = sorted(
            ((order[entry.file], entry.offset, name) for name, entry in chosen if entry.file is not None)
        )
        starts, size = {}, 0
        for *_, name in stored:
            starts[name] = size
            size += -(-self.entries[name].nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > self.max_bytes:
            raise CheckpointError(
                f"{self.path}: {size} bytes have to be read, but max_bytes is {self.max_bytes}"
            )
        space = (buffer or HostBuffer()).reserve(size)
        view = memoryview(space.numpy().data)
        for place, offset, name in stored:
            start, stop = starts[name], starts[name] + self.entries[name].nbytes
            with _naming(self.files[place].path):
                self.files[place].read_into(offset, view[start:stop])
            tensors[name] = self.entries[name].over(space[start:stop])
        for opened in self.files:
            if opened.was_changed():
                raise CheckpointError(f"{opened.path}: was changed while it was read")
        return tensors

    def others(self) -> list[Checkpoint]:
        """Further models in the folder, open as long as this one; what cannot be opened is in `unread`.

        The base of an adapter is one: whoever loads the folder may pass over the adapter.
        """
        found = []
        used = {opened.path.name for opened in self.files}
        others = other_models(self.path, used) if self.path.is_dir() else {}
        base = [file for file in self._weight_files if file.name not in ADAPTER_WEIGHTS]
        if len(base) < len(self._weight_files):
            others[base[0].name] = base
        for name, files in others.items():
            try:
                other = Checkpoint(self.path / name, self.max_bytes, files)
                found.append(self._stack.enter_context(other))
            except (CheckpointError, OSError) as error:
                self.unread[name] = str(error)
        return found

    def read_bytes(self, name: str) -> bytes:
        """The bytes of one tensor, C-ordered, little-endian; see `read`."""
        return self.read([name])[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()

    def _weights(self) -> list[Path]:
        """The files of the weights."""
        if not self.path.is_dir():
            return [self.path]
        if os.path.lexists(self.path / ADAPTER):
            self.lora_config = self._json(self.path / ADAPTER)
        with _naming(self.path):
            return weight_files(
                self.path, self._json, (self.lora_config or {}).get("base_model_name_or_path")
            )

    def _json(self, path: Path) -> dict[str, Any]:
        with _naming(path):
            return self._open(path).json()

    def _open(self, path: Path) -> Opened:
        # Without O_NONBLOCK opening a named pipe would wait for a writer for ever.
        file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        self._stack.enter_context(file)
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError("is not a regular file")
        self.files.append(Opened(path, file, facts))
        return self.files[-1]

    def _contents(self, opened: Opened) -> Contents:
        start = opened.read(0, min(512, opened.size))
        if not start:
            raise CheckpointError("is an empty file")
        if start[8:9] == b"{":
            return read_safetensors(opened)
        if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            return read_archive(opened)
        if re.match(rb"\x80[\0-\5]", start):
            return read_torch_pickle(opened, self.max_bytes)
        for error, kinds in ((CheckpointError, _BROKEN_DOWNLOADS), (UnreadFormError, _OTHER_FORMS)):
            for pattern, what in kinds:
                if re.match(pattern, start, re.IGNORECASE):
                    raise error(f"is {what}")
        if re.match(_FLAX, start):
            return read_flax(opened)
        if re.match(_ONNX, start):
            folder = opened.path.parent
            return read_onnx(opened, lambda name: self._open(folder / beside(name, opened.path.name)))
        text = " but text" if all(32 <= c < 127 or c in b"\t\r\n" for c in start) else ""
        raise CheckpointError(f"neither a safetensors file nor a torch file{text}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the path before what is said of a file."""
    try:
        yield
    except (ValueError, IndexError, OverflowError) as error:
        said = str(error)
        if isinstance(error, CheckpointError):
            raise type(error)(said if said.startswith(str(path)) else f"{path}: {said}") from error
        raise CheckpointError(f"{path}: is damaged: {said}") from error
