"""Models larger than memory: weights that stay in their safetensors files, mapped, and are written there.

The system reads a block's weights when the block runs and lets go of them when it needs the room: they are
page cache, not memory of the process. Mapped pages that are written to become private memory; the files stay
as they are. A mapped file must not be made shorter meanwhile: that would end the process.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.hooks import RemovableHandle

from activemark_fast.checkpoints.architectures import build, existing, resolve
from activemark_fast.checkpoints.entries import Entry, Opened
from activemark_fast.checkpoints.errors import CheckpointError
from activemark_fast.checkpoints.files import Checkpoint
from activemark_fast.checkpoints.models import exact_plan
from activemark_fast.files import mapped_bytes

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BESIDE = (".json", ".txt", ".md")
"""Files of a model's folder that are copied with its weights."""


@dataclass(frozen=True, eq=False)
class MappedModel:
    """A model over its files.

    Attributes:
        model: in eval mode, on the CPU, in the dtypes of the files; no parameter asks for a gradient.
        architecture: what `build_model` builds it from.
        path: the checkpoint, a file or a folder.
        places: name of a tensor of the model → where its bytes are.
        files: as they were when they were mapped.
    """

    model: nn.Module
    architecture: str
    path: Path
    places: dict[str, Entry]
    files: list[Opened]

    def write(self, out: Path, partial: Path) -> list[str]:
        """Writes a checkpoint like the one that was mapped, with the model's weights as they are now.

        The files are copied by the system, readable by their owner only, and what differs is written over it.

        Args:
            out: a file or a folder, as the checkpoint is; a file or an empty folder is replaced.
            partial: where it is written first, on the same file system; what is there is removed.

        Returns:
            The names of the tensors that differ.

        Raises:
            CheckpointError: the files were changed since they were mapped.
            OSError: the files cannot be read or written.
        """
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
        targets = {self.path: partial}
        if self.path.is_dir():
            partial.mkdir(mode=0o700)
            beside = {path for path in self.path.iterdir() if path.suffix in _BESIDE and path.is_file()}
            beside |= {opened.path for opened in self.files}
            targets = {path: partial / path.name for path in sorted(beside)}
        for source, target in targets.items():
            shutil.copyfile(source, target)
            target.chmod(0o600)
        state = self.model.state_dict()
        written = []
        stored = {path: mapped_bytes(path) for path in {_path(entry) for entry in self.places.values()}}
        for name, entry in self.places.items():
            path = _path(entry)
            now = state[name].contiguous().flatten().view(torch.uint8)
            if torch.equal(now, stored[path][entry.offset : entry.offset + entry.nbytes]):
                continue
            with open(targets[path], "r+b") as file:
                file.seek(entry.offset)
                file.write(now.numpy().data)
            written.append(name)
        for target in targets.values():
            with open(target, "rb") as file:
                os.fsync(file.fileno())
        for opened in self.files:
            if opened.was_changed():
                raise CheckpointError(f"{opened.path}: was changed while it was read")
        os.replace(partial, out)
        return written


def map_model(spec: str | os.PathLike[str], offload: Callable[[Tensor], Tensor] | None = None) -> MappedModel:
    """The model that a model string names, over its safetensors files.

    Args:
        spec: as in `load_model`; it has to name a file or a folder of weights.
        offload: where tensors go that have to be computed from what is stored, such as a joint matrix of
            queries, keys and values from three; it returns them. Without, every tensor must be stored as it
            is.

    Raises:
        TypeError, CheckpointError: as `load_model` does, or the files are no safetensors files, or a tensor
            is not stored as the model has it.
    """
    architecture, weights = resolve(spec)
    if weights is None:
        raise CheckpointError(f"{spec}: wanted weights in files; say where they are: @path")
    with _on_meta():
        model = build(architecture, torch.device("cpu")).eval()
    path = existing(weights)
    with Checkpoint(path, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) as checkpoint:
        plan = exact_plan(model, checkpoint)
        content: dict[Path, Tensor] = {}
        for entry in checkpoint.entries.values():
            if entry.file is not None and entry.file.path not in content:
                if entry.file.read(8, 1) != b"{":
                    raise CheckpointError(f"{entry.file.path}: wanted a safetensors file")
                content[entry.file.path] = mapped_bytes(entry.file.path)
        values: dict[str, Tensor] = {}
        places: dict[str, Entry] = {}
        for step in plan.steps:
            names = list(step.names())
            entry = checkpoint.entries[names[0]]
            if len(names) == 1 and _as_it_is(entry, step.how):
                places[step.target] = entry
                stored = content[_path(entry)][entry.offset : entry.offset + entry.nbytes]
                values[step.target] = entry.over(stored).view(step.shape)
            elif offload is None:
                how = ", ".join(step.how) or "at an odd place in its file"
                raise CheckpointError(
                    f"{path}: wanted every tensor stored as the model has it, got {names[0]!r}: {how}"
                )
            else:
                made = step.value(checkpoint.read(names))
                values[step.target] = offload(
                    made.to(entry.dtype if entry.dtype.is_floating_point else made.dtype)
                )
    if offload is None:
        _check_apart(places)
    _fill(model, values, {k: v for k, v in plan.neutral.items() if k not in plan.fit.missing})
    return MappedModel(model, architecture, path, places, checkpoint.files)


def _check_apart(places: dict[str, Entry]) -> None:
    """Raises CheckpointError where two tensors share bytes: whoever marks one would change the other."""
    spans = sorted((_path(entry), entry.offset, entry.nbytes, name) for name, entry in places.items())
    for (path, offset, size, name), (other, start, _, after) in pairwise(spans):
        if path == other and start < offset + size:
            raise CheckpointError(f"{path}: wanted tensors apart, got {name!r} and {after!r} in one place")


def _path(entry: Entry) -> Path:
    """The file that a tensor lies in."""
    assert entry.file is not None
    return entry.file.path


def _as_it_is(entry: Entry, how: tuple[str, ...]) -> bool:
    """Whether a tensor is stored as the model has it; what the plan does to it (`how`) is only its dtype."""
    known = entry.dtype in _DTYPES or not entry.dtype.is_floating_point
    named = set(how) <= {str(entry.dtype).removeprefix("torch.")}
    return known and named and entry.tensor is None and entry.offset % entry.dtype.itemsize == 0


def _fill(model: nn.Module, values: dict[str, Tensor], neutral: dict[str, float]) -> None:
    """Puts tensors in the place of those on "meta"; what there are none for, such as a head, is 0."""
    made: dict[int, nn.Parameter] = {}
    dtype = next((value.dtype for value in values.values() if value.is_floating_point()), torch.float32)
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        if name in values:
            value = values[name]
        elif tensor.is_meta:
            value = torch.full(tensor.shape, neutral.get(name, 0.0), dtype=dtype)
        else:
            continue
        if own in module._parameters:
            if id(tensor) not in made:
                made[id(tensor)] = nn.Parameter(value, requires_grad=False)
            module._parameters[own] = made[id(tensor)]
        else:
            module._buffers[own] = value


_BUILDING = threading.local()
"""Whether this thread makes a model whose parameters hold no values."""


@contextmanager
def _on_meta() -> Iterator[None]:
    """Parameters of modules that this thread makes meanwhile hold no values.

    Buffers do, for a file may lack them: `torch.device("meta")` would not give them any.
    """
    if not hasattr(_BUILDING, "on"):
        _hooked()
    _BUILDING.on = True
    try:
        yield
    finally:
        _BUILDING.on = False


@lru_cache(maxsize=1)
def _hooked() -> RemovableHandle:
    """Asks torch, once and for good, to show each parameter that a module gets."""
    return register_module_parameter_registration_hook(_without_values)  # type: ignore[arg-type]


def _without_values(module: nn.Module, name: str, param: nn.Parameter) -> nn.Parameter | None:
    if not getattr(_BUILDING, "on", False) or param.is_meta:
        return None
    return nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
