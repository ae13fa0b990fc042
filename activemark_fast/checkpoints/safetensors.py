"""Safetensors files: a JSON header, and the numbers."""

from __future__ import annotations

import torch

from activemark_fast.checkpoints.entries import MAX_JSON, Contents, Entry, Opened, json_object
from activemark_fast.checkpoints.errors import CheckpointError

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
_UNREAD_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def read_safetensors(file: Opened) -> Contents:
    """What the header describes. Raises CheckpointError where that cannot be."""
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(MAX_JSON, file.size - 8):
        raise CheckpointError(f"is truncated, or its header of {length} bytes is none")
    header = json_object(file.read(8, length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        metadata = {}
    found = Contents(metadata=metadata)
    for name, value in header.items():
        try:
            if value["dtype"] in _UNREAD_DTYPES:
                found.unread[name] = f"tensor of {value['dtype']}"
                continue
            begin, end = value["data_offsets"]
            dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
            entry = Entry.within(file.size, dtype, shape, file, 8 + length + begin)
            if begin < 0 or end - begin != entry.nbytes:
                raise CheckpointError("its header describes a tensor that is not possible")
        except (KeyError, TypeError) as error:
            raise CheckpointError("its header describes a tensor that is not possible") from error
        found.entries[name] = entry
    return found
