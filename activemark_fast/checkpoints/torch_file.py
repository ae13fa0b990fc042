"""What is checked of a torch file before `torch.load(weights_only=True)` may see it."""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from io import FileIO
from typing import IO

_MOST_PICKLE = 16_000_000
_MOST_OPCODES = 5_000_000
_LEGACY_PICKLES = 5
# What a dict of tensors is made with. `weights_only` allows more, such as bytearray: memory for nothing.
_ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|qtensor)"
    r"|torch\.storage (TypedStorage|UntypedStorage)"
    r"|torch (\w+Storage|Size|device|(q?u?int|float|bfloat|complex|bool|half|double|long)\w*|per_\w+)"
    r"|(__builtin__|builtins) (set|complex)"
)


def check_torch_file(file: FileIO) -> None:
    """Raises ValueError for what no file that torch.save wrote of tensors holds.

    That is: a pickle that asks for anything but the making of tensors, compressed or overlapping records (a
    small file that unpacks to a large one), or an endless pickle. `file` is open for reading; its position is
    changed.

    Raises:
        ValueError: the file is refused; the message says why.
        zipfile.BadZipFile: the archive is damaged.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not zipfile.is_zipfile(file):
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(file)
        return
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("holds compressed records, which torch.save does not write")
        if sum(record.file_size for record in records) > size:
            raise ValueError("holds more than its size")
        pickles = [record for record in records if record.filename.endswith(".pkl")]
        if not pickles:
            raise ValueError("is a zip archive without a pickle")
        for record in pickles:
            if record.file_size > _MOST_PICKLE:
                raise ValueError(f"holds a pickle of {record.file_size} bytes, wanted at most {_MOST_PICKLE}")
            with archive.open(record) as content:
                _check_pickle(content)


def _check_pickle(file: IO[bytes] | FileIO) -> None:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"holds a pickle that asks for more than tensors ({opcode.name})")
        if opcode.name == "GLOBAL" and not _ALLOWED.fullmatch(str(argument)):
            raise ValueError(f"holds a pickle that asks for {str(argument)[:100]!r}")
        if count > _MOST_OPCODES:
            raise ValueError("holds an endless pickle")
