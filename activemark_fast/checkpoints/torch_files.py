"""What torch pickles, and where its numbers lie: in a file before version 1.6, or in a zip archive."""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch

from activemark_fast.checkpoints.entries import Contents, Entry, Opened, c_strides, numpy_dtype
from activemark_fast.checkpoints.errors import CheckpointError, UnreadFormError
from activemark_fast.checkpoints.pickled import (
    Array,
    QuantisedTensor,
    Storage,
    StoredTensor,
    named_values,
    stub_names,
)
from activemark_fast.checkpoints.pickles import LEGACY_PICKLES, MAX_PICKLE, read_pickle

_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")

Place = Callable[[Storage], tuple[int, int]]
"""Where in the file a storage lies: offset and bytes."""


def read_torch_pickle(file: Opened, max_bytes: int) -> Contents:
    """A file as torch.save wrote it before version 1.6, or a pickle, of at most `max_bytes`."""
    if _LEGACY_MAGIC in file.read(0, min(file.size, 64)):
        return _legacy(file)
    if file.size > max_bytes:
        raise CheckpointError(f"a pickle is read whole, {file.size} bytes, but max_bytes is {max_bytes}")
    return tensors_of(read_pickle(BytesIO(file.read(0, file.size))), file, None)


def _legacy(file: Opened) -> Contents:
    stream = BytesIO(file.read(0, min(file.size, MAX_PICKLE)))
    known: dict[str, Storage] = {}
    _, _, system, root = (read_pickle(stream, known) for _ in range(LEGACY_PICKLES))
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise UnreadFormError("was written on a big-endian machine: save it again")
    keys = read_pickle(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError("a damaged torch file: no list of its storages")
    places: dict[str, tuple[int, int]] = {}
    offset = stream.tell()
    for key in keys:
        if key not in known:
            raise CheckpointError("a damaged torch file: a storage of no known type")
        dtype = known[key].dtype
        count = int.from_bytes(file.read(offset, 8), "little")
        size = count * (1 if dtype is None else dtype.itemsize)
        if offset + 8 + size > file.size:
            raise CheckpointError("is truncated")
        places[key] = offset + 8, size
        offset += 8 + size

    def place(storage: Storage) -> tuple[int, int]:
        if storage.key not in places:
            raise CheckpointError(f"lacks the storage {storage.key[:50]}")
        return places[storage.key]

    return tensors_of(root, file, place)


def tensors_of(root: object, file: Opened, place: Place | None) -> Contents:
    """The tensors in what a pickle holds.

    place: None where there are no storages but those in the pickle itself.

    Raises:
        CheckpointError: there are none, or one reaches beyond its storage.
    """
    found = Contents()
    for name, value in named_values(root):
        parts = {"": value}
        if isinstance(value, QuantisedTensor):
            parts = {"": value.whole, ".q_scale": value.scale, ".q_zero_point": value.zero_point}
        made = {f"{name}{ending}": _entry(part, file, place) for ending, part in parts.items()}
        whole = {key: entry for key, entry in made.items() if entry is not None}
        if not name:
            continue  # a tensor alone
        if found.unread.keys() & {name} or found.entries.keys() & made.keys():
            found.unread[name] = "name that two tensors have"
            for key in made:
                found.entries.pop(key, None)
        elif len(whole) == len(made):
            found.entries.update(whole)
        else:
            found.unread[name] = str(getattr(value, "made_by", "tensor of more elements than it stores"))
    if not found.entries and not found.unread:
        asked = ", ".join(repr(name) for name in stub_names(root)[:3])
        raise CheckpointError(
            "holds no tensors" + (f"; it asks for {asked}, which is not run" if asked else "")
        )
    return found


def _entry(value: object, file: Opened, place: Place | None) -> Entry | None:
    """A tensor or a number of a pickle; None for anything else."""
    if isinstance(value, int | float):
        return Entry.held(torch.tensor(float(value)))
    if isinstance(value, Array):
        numpy_dtype(value.dtype)
        values = np.frombuffer(value.content, np.dtype(value.dtype))
        shaped = values.reshape(value.shape, order="F" if value.fortran else "C")
        return Entry.held(torch.from_numpy(np.array(shaped, order="C")))  # the content cannot be written to
    if not isinstance(value, StoredTensor):
        return None
    content = value.storage.content
    if content is not None:
        start, size = 0, len(content)
    elif place is not None:
        start, size = place(value.storage)
    else:
        return None
    if math.prod(value.shape) * value.dtype.itemsize > size:
        return None  # one number many times over
    order = zip(value.shape, value.strides, c_strides(value.shape), strict=True)
    plain = all(stride == wanted for length, stride, wanted in order if length != 1)
    offset = start + value.offset * value.dtype.itemsize
    entry = Entry(value.dtype, value.shape, file, offset, None if plain else value.strides)
    if offset + entry.nbytes > start + size:
        raise CheckpointError("a tensor reaches beyond its storage")
    if content is not None:
        numbers = np.frombuffer(content[offset : offset + entry.nbytes], np.uint8).copy()
        return Entry.held(entry.over(torch.from_numpy(numbers)))
    return entry
