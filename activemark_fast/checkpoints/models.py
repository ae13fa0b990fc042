"""Loading and saving models.

Checkpoints are hostile: nothing in them is executed, and no model is allocated before the file's shapes are
known to fit it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from activemark_fast.checkpoints.architectures import (
    MAX_BYTES,
    as_path,
    build,
    existing,
    fetch,
    plain_architecture,
    resolve,
)
from activemark_fast.checkpoints.errors import CheckpointError, shown
from activemark_fast.checkpoints.files import Checkpoint
from activemark_fast.checkpoints.names import clean_name
from activemark_fast.checkpoints.plan import Plan, plans
from activemark_fast.checkpoints.steps import Part, Step
from activemark_fast.checkpoints.stored import Source
from activemark_fast.checkpoints.wanted import Wanted
from activemark_fast.dress import unwrapped

_HEADS = frozenset({"head", "heads", "head_dist", "classifier", "pooler"})
_MAX_NAMES = 5


def load_model(spec: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> nn.Module:
    """The model that a model string names, in eval mode.

    Args:
        spec: a model string, or the path of a safetensors file which names its architecture.
        device: where the model is put.

    Raises:
        TypeError: `spec` is neither a string nor a path.
        CheckpointError: see `build_model` and `load_weights`; or fetching the weights failed.
    """
    architecture, weights = resolve(spec)
    if weights is None:
        return fetch(architecture).to(device).eval()
    with Checkpoint(existing(weights), MAX_BYTES) as checkpoint:
        plan = exact_plan(build(architecture, torch.device("meta")), checkpoint)
        model = build(architecture, torch.device("cpu"))
        _load(model, plan, checkpoint)
    return model.to(device).eval()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put a checkpoint's weights into a model, converted to its dtypes. An error leaves the model as it was.

    Tensors of a classifier head may be missing, unexpected or of another shape: the model then keeps its own.

    Args:
        model: the model.
        path: a file or a folder, of any naming and form that `Checkpoint` and `plans` know.

    Raises:
        TypeError: `model` is not a module, or `path` not a path.
        CheckpointError: there is no such file, it holds no tensors, or one outside the head is missing,
            unexpected, or of another shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    with Checkpoint(existing(path), MAX_BYTES) as checkpoint:
        _load(model, exact_plan(model, checkpoint), checkpoint)


def exact_plan(model: nn.Module, checkpoint: Checkpoint) -> Plan:
    """The plan that makes every tensor of the model; `model` may be on "meta".

    Integers that the checkpoint has under the model's own names are taken from it, too.
    """
    state = model.state_dict()
    wanted = Wanted.all_of(state)
    every = plans(wanted, checkpoint.entries, checkpoint.lora_config, checkpoint.unread)
    chosen = min(every, key=lambda plan: len(_problems(plan, checkpoint)))
    problems = _problems(chosen, checkpoint)
    if problems:
        raise CheckpointError(f"{checkpoint.path}: does not fit the architecture; {'; '.join(problems)}")
    integers = tuple(_integers(state, chosen.root, checkpoint))
    names = (*chosen.names, *(name for step in integers for name in step.names()))
    return replace(chosen, names=names, steps=(*chosen.steps, *integers))


def _integers(state: Mapping[str, Tensor], root: str, checkpoint: Checkpoint) -> Iterator[Step]:
    """Steps for the model's integers, such as the batches that a norm has seen, as far as they are stored."""
    stored = {clean_name(name)[0]: name for name in checkpoint.entries}
    for name, tensor in state.items():
        at = stored.get(root + clean_name(name)[0])
        if tensor.is_floating_point() or at is None:
            continue
        entry = checkpoint.entries[at]
        if (entry.dtype, tuple(entry.shape)) == (tensor.dtype, tuple(tensor.shape)):
            source = Source({"": at}, entry.shape, entry.dtype, lambda parts: parts[""])
            yield Step(name, entry.shape, (Part(at, source),))


def _problems(plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """What keeps a plan from being the model's own weights, in words; heads do not count."""
    missing = [name for name in plan.fit.missing if not _is_head(name)]
    unexpected = [
        name
        for name in plan.fit.ignored
        if (clean := clean_name(name)[0]).startswith(plan.root)
        and not _is_head(clean.removeprefix(plan.root))
        and clean.removeprefix(plan.root) not in plan.fit.why
        and (name in checkpoint.unread or checkpoint.entries[name].dtype.is_floating_point)
    ]
    misfits = [f"{name!r} is {plan.fit.why[name]}" for name in missing if name in plan.fit.why]
    absent = [repr(name) for name in missing if name not in plan.fit.why]
    told = (("missing", absent), ("unexpected", [shown(n) for n in unexpected]), ("not alike", misfits))
    return [
        f"{len(names)} {what}: {', '.join(sorted(names)[:_MAX_NAMES])}"
        + (", ..." if len(names) > _MAX_NAMES else "")
        for what, names in told
        if names
    ]


@torch.no_grad()
def _load(model: nn.Module, plan: Plan, checkpoint: Checkpoint) -> None:
    """Carries out a plan, all of it or nothing."""
    state = model.state_dict()
    tensors = {step.target: step.value(checkpoint.read(step.names())) for step in plan.steps}
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    for name, value in plan.neutral.items():
        if name not in plan.fit.missing:
            state[name].fill_(value)


def save_model(model: nn.Module, path: str | os.PathLike[str], architecture: str) -> None:
    """Write a safetensors file which `load_model` reads by its path alone; what was there is replaced.

    Args:
        model: the model; its tensors are written in their own dtypes, shared ones once for each name, under
            the names they have without `torch.compile` or `DataParallel`.
        path: the file.
        architecture: what `build_model` builds the same model from (see `architecture_of`).

    Raises:
        TypeError: an argument has the wrong type.
        CheckpointError: `architecture` is malformed, or there is no such folder.
        OSError: the file cannot be written, as on a full disk.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    architecture = plain_architecture(architecture)
    path = as_path(path)
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, wanted a file name")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in unwrapped(model).state_dict().items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    # Written beside its place and moved there, so that no reader ever sees half a file.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        written = Path(folder) / "model.safetensors"
        try:
            safetensors.torch.save_file(tensors, written, metadata={"architecture": architecture})
        except safetensors.SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        os.replace(written, path)


def _is_head(name: str) -> bool:
    return name.partition(".")[0] in _HEADS or "lm_head" in name.split(".")
