"""Zip archives: what torch and NumPy save. Records are read where they lie, uncompressed."""

from __future__ import annotations

import re
import zipfile
from io import BytesIO

from activemark_fast.checkpoints.entries import Contents, Entry, Opened, c_strides, numpy_dtype
from activemark_fast.checkpoints.errors import CheckpointError, UnreadFormError
from activemark_fast.checkpoints.pickled import Storage
from activemark_fast.checkpoints.pickles import MAX_PICKLE, read_pickle
from activemark_fast.checkpoints.torch_files import tensors_of

_NPY = re.compile(
    rb"\x93NUMPY[\1-\3]\0.{2,4}?\{'descr': '([^']{1,20})', 'fortran_order': (True|False), "
    rb"'shape': \(([\d, ]*)\),? *\} *\n",
    re.DOTALL,
)
_END, _LOCATOR, _END_64 = 22, 20, 56
"""Bytes of what ends a zip archive: its last record; in large ones, theirs, and what tells its place."""


def read_archive(file: Opened) -> Contents:
    """The tensors of a torch file, or the arrays of `numpy.savez`.

    Raises:
        UnreadFormError: records are compressed: a small file may unpack to a large one.
        CheckpointError: it is damaged, another archive, or may be read in several ways.
    """
    _check_end(file)
    try:
        with zipfile.ZipFile(file.file) as archive:
            every = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise CheckpointError(f"a damaged or truncated zip archive: {error}") from error
    stored = [record for record in every if record.compress_type == zipfile.ZIP_STORED]
    if sum(record.file_size for record in stored) > file.size:
        raise CheckpointError("holds more than its size")
    packed = {record.filename for record in every} - {record.filename for record in stored}
    if not every:
        raise CheckpointError("is a zip archive without a pickle")
    if len({record.filename.lower() for record in every}) < len(every):
        raise CheckpointError("holds two records of one name: readers differ on which of them counts")
    if any(name.endswith((".npy", ".pkl")) or "/data/" in name for name in packed):
        raise UnreadFormError("holds compressed records: unpack and save it again")
    records = {record.filename: record for record in every}
    if records and all(name.endswith(".npy") for name in records):
        return Contents({n.removesuffix(".npy"): _array(file, n, record) for n, record in records.items()})
    main = min((name for name in records if name.endswith("data.pkl")), default=None)
    if main is None:
        if any(name.endswith("model_weights_config.json") for name in records):
            raise UnreadFormError("is an archive of torch.export: save the state dict of its module")
        raise UnreadFormError("is a zip archive of other files: unpack it first")
    return _torch_archive(file, records, main)


def _check_end(file: Opened) -> None:
    """Raises CheckpointError for a directory that torch and Python may look for at different places.

    Python trusts its length, torch its offset: of two archives, one after the other, each may read another.
    """
    at = file.size - _END
    end = file.read(at, _END)
    length, start = (int.from_bytes(end[place : place + 4], "little") for place in (12, 16))
    locator = file.read(at - _LOCATOR, _LOCATOR) if at >= _LOCATOR + _END_64 else b""
    large = locator[:4] == b"PK\x06\x07"
    if large:  # as torch always writes them
        at -= _LOCATOR + _END_64
        length, start = (int.from_bytes(file.read(at + place, 8), "little") for place in (40, 48))
        large = locator[8:16] != at.to_bytes(8, "little") or file.read(at, 4) != b"PK\x06\x06"
    if end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0" or large or start + length != at:
        raise CheckpointError("a damaged or truncated zip archive, or one with something before or behind it")


def _torch_archive(file: Opened, records: dict[str, zipfile.ZipInfo], main: str) -> Contents:
    folder = main.removesuffix("data.pkl")
    order = records.get(f"{folder}byteorder")
    if order is not None and file.read(_start(file, order), min(order.file_size, 16)) != b"little":
        raise UnreadFormError("was written on a big-endian machine: save it again")
    size = records[main].file_size
    if size > MAX_PICKLE:
        raise CheckpointError(f"holds a pickle of {size} bytes, wanted at most {MAX_PICKLE}")
    root = read_pickle(BytesIO(file.read(_start(file, records[main]), size)))

    def place(storage: Storage) -> tuple[int, int]:
        record = records.get(f"{folder}data/{storage.key}")
        if record is None:
            raise CheckpointError(f"lacks the record {folder}data/{storage.key[:50]}")
        return _start(file, record), record.file_size

    return tensors_of(root, file, place)


def _array(file: Opened, name: str, record: zipfile.ZipInfo) -> Entry:
    start = _start(file, record)
    found = _NPY.match(file.read(start, min(record.file_size, 4096)))
    if found is None:
        raise CheckpointError(f"{name[:100]!r} is no array of numbers")
    shape = tuple(int(size) for size in found[3].replace(b",", b" ").split())
    strides = c_strides(shape[::-1])[::-1] if found[2] == b"True" else None
    dtype = numpy_dtype(found[1].decode())
    return Entry.within(start + record.file_size, dtype, shape, file, start + found.end(), strides)


def _start(file: Opened, record: zipfile.ZipInfo) -> int:
    """Where a record's content starts; behind its own header, whose length only that header tells."""
    header = file.read(record.header_offset, 30)
    if header[:4] != b"PK\x03\x04":
        raise CheckpointError("a damaged zip archive")
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return record.header_offset + 30 + names
