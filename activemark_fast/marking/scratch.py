"""What an embedding keeps on disk: tensors that wait in files, and what a later run goes on from."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from activemark_fast.files import mapped_bytes, write_whole
from activemark_fast.key import Key

_INPUTS = "inputs.json"
_FORMAT = 2

Make = Callable[[], dict[str, Tensor]]


class Scratch:
    """A folder of tensors, which are mapped: they are page cache, not memory of the process.

    It holds no key, but activations that a message was written into: whoever reads it learns where the mark
    lies, so nobody else may. It says of which inputs it is the work, by a MAC under the key, and is used for
    no others.
    """

    def __init__(self, folder: Path, key: Key, inputs: dict[str, object]) -> None:
        """Opens the folder, or makes it.

        inputs: all that the embedding depends on besides the key, as JSON types.

        Raises ValueError if `folder` is a file or a link, lies in no folder, belongs to another user, or is
        something else or another embedding's.
        """
        _make(folder)
        told = json.dumps({"format": _FORMAT, **inputs}, sort_keys=True).encode()
        mine = json.dumps({"inputs": key.mac("work", told).hex()}).encode()
        note = folder / _INPUTS
        if not note.exists():
            if any(folder.iterdir()):
                raise ValueError(f"work: wanted an empty folder or that of an embedding, got {str(folder)!r}")
            write_whole(note, mine)
        elif note.read_bytes() != mine:
            raise ValueError(
                "work: wanted the folder of an embedding with this model, key, images and settings, got "
                f"another's: {folder}"
            )
        folder.chmod(0o700)
        self._folder = folder

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other embeddings from the folder; what a run that was cut off left half made goes.

        Raises ValueError where another one is at work in it.
        """
        with (self._folder / _INPUTS).open("rb") as note:
            _lock(note.fileno(), self._folder)
            for left in (*self._folder.glob(".kept-*"), *self._folder.glob(".made-*")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield

    def keep(self, tensor: Tensor) -> Tensor:
        """`kept` in the folder."""
        return kept(tensor, self._folder)

    def made(self, name: str, make: Make) -> dict[str, Tensor]:
        """What `make` returns, from the file of that name where an earlier run got so far; on the CPU.

        What is written to the tensors does not reach the file.

        Raises:
            OSError: the file cannot be written.
            ValueError: the file that is there is damaged.
        """
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            made = {key: value.detach().cpu().contiguous() for key, value in make().items()}
            # Written beside its place and moved there: a file that is there is whole.
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".made-") as beside:
                written = Path(beside, path.name)
                try:
                    save_file(made, written)
                except SafetensorError as error:
                    raise OSError(f"{path}: cannot be written: {error}") from error
                os.replace(written, path)
            del made
        try:
            with safe_open(path, framework="pt") as file:  # mapped, not read
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"work: {path} is damaged ({error}): remove it") from error


def _make(folder: Path) -> None:
    """Makes a folder for nobody else; see `Scratch` for what it refuses that is there."""
    if not folder.parent.is_dir() or folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"work: wanted a folder, or a name for one, got {str(folder)!r}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise ValueError(f"work: wanted a folder of your own, got another user's: {folder}")


def _lock(opened: int, folder: Path) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"work: another process is at work in {folder}") from error


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes from a folder, which is made; one that is empty in the end goes.

    Raises ValueError where another process keeps it, or as `Scratch` does.
    """
    _make(folder)
    opened = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(opened, folder)
        try:
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()
    finally:
        os.close(opened)


def kept(tensor: Tensor, folder: Path) -> Tensor:
    """A copy of `tensor` in a nameless file of `folder`, which goes when nothing refers to it any more.

    Raises OSError where there is no room for it.
    """
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor.cpu()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".kept-") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told now, not by a signal
        waiting = mapped_bytes(Path(file.name), shared=True).view(tensor.dtype).view(tensor.shape)
    return waiting.copy_(tensor)


def made(scratch: Scratch | None, name: str, make: Make) -> dict[str, Tensor]:
    """`Scratch.made`, or what `make` returns where there is no folder."""
    return make() if scratch is None else scratch.made(name, make)
