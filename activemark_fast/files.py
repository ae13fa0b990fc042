"""Writing files whole, and looking into them without reading them whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Has what the system says of a write, such as a full disk, name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_whole(path: str | os.PathLike[str], data: bytes, mode: int = 0o600) -> None:
    """Writes a file whole or not at all: beside its place first, then moved there.

    What was there is replaced. Raises OSError where it cannot be written.
    """
    target = Path(path)
    with (
        naming(path),
        tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file,
    ):
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def mapped_bytes(path: Path, *, shared: bool = False) -> Tensor:
    """(size,) uint8, the bytes of a file; what is written to them reaches the file if `shared`."""
    import torch  # takes longer to import than all the rest, and keys are made without it

    return torch.from_file(str(path), shared=shared, size=path.stat().st_size, dtype=torch.uint8)
