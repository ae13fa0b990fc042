"""Which files of a folder hold the weights of its model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from activemark_fast.checkpoints.errors import CheckpointError, UnreadFormError

ADAPTER = "adapter_config.json"
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
SUFFIXES = frozenset(
    {".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".msgpack", ".onnx", ".h5", ".gguf"}
)
BESIDE_MODELS = re.compile(
    r"(?:training_args|optimizer|optimizer_\d+|scheduler|scaler|rng_state(?:_\d+)?|random_states_\d+|"
    r"optim_states|.*_optim_states)\.(?:pt|pth|bin|safetensors|msgpack)"
)
"""What trainers write beside a model."""
_MODEL_FOLDER = re.compile(
    r"(?:config|open_clip_config|adapter_config|model\.safetensors\.index|pytorch_model\.bin\.index)\.json|"
    r"\.metadata|_CHECKPOINT_METADATA|manifest\.ocdbt|saved_model\.pb|.+\.data-\d{5}-of-\d{5}"
)
"""A folder with one of these is one model, as transformers, open_clip, PEFT, torch, Orbax, TensorFlow do."""
# What folders in forms that are not read have in them → what they are, and what to do.
_OTHER_FORMS = (
    (
        r".+\.distcp",
        "a distributed checkpoint of torch: convert it with "
        "torch.distributed.checkpoint.format_utils.dcp_to_torch_save",
    ),
    (
        r".+_(?:model|optim)_states\.pt",
        "a DeepSpeed ZeRO checkpoint: gather it with its zero_to_fp32.py",
    ),
    (
        r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt",
        "an Orbax checkpoint: restore it and save its arrays with numpy.savez",
    ),
    (
        r"saved_model\.pb|.+\.data-\d{5}-of-\d{5}",
        "a TensorFlow checkpoint: convert it to safetensors",
    ),
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def weight_files(folder: Path, json_of: Callable[[Path], dict[str, Any]], base: object) -> list[Path]:
    """The files of a folder's weights, those of an adapter last.

    Args:
        folder: the folder.
        json_of: reads a JSON object.
        base: what its adapter's configuration says that it adapts.

    Raises:
        OSError: the folder cannot be read.
        UnreadFormError: its weights are in a form that is not read.
        CheckpointError: it has none, or not all.
    """
    names = set(os.listdir(folder))
    found = [name for name in _WEIGHTS if name in names][:1] or _shards(names)
    if not found and len(others := list(other_models(folder, set()).values())) == 1:
        found = [path.name for path in others[0]]
    adapter = [name for name in ADAPTER_WEIGHTS if name in names][:1]
    if adapter and not found:
        raise UnreadFormError(
            f"is an adapter alone: put the weights of its base model, {str(base)[:100]!r}, "
            "into the same folder"
        )
    if not found:
        _refuse(names)
    if found[0].endswith(".json"):
        found = _indexed(json_of(folder / found[0]), found[0])
    return [folder / name for name in found + adapter]


def is_model(names: Iterable[str]) -> bool:
    """Whether a folder with these names in it is one model."""
    return any(_MODEL_FOLDER.fullmatch(name) for name in names)


def other_models(folder: Path, used: set[str]) -> dict[str, list[Path]]:
    """Name → files of what else in a folder may be a model: a file, or shards of one.

    used: names of the files that are known.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        known = path.name in used or path.name in ADAPTER_WEIGHTS or BESIDE_MODELS.fullmatch(path.name)
        if path.suffix in SUFFIXES and not known and path.is_file():
            shard = _SHARD.fullmatch(path.name)
            found.setdefault(shard[1] + path.suffix if shard else path.name, []).append(path)
    return found


def beside(name: str, where: str) -> str:
    """`name`, which `where` says that a file beside it has. Raises CheckpointError for one elsewhere."""
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise CheckpointError(f"{where}: names a file outside of its folder")
    return name


def _shards(names: set[str]) -> list[str]:
    """Shards that no index names; all of them have to be there."""
    parts = [match for match in map(_SHARD.fullmatch, sorted(names)) if match]
    of_one = [part[0] for part in parts if (part[1], part[3]) == (parts[0][1], parts[0][3])]
    if parts and len(of_one) != int(parts[0][3]):
        raise CheckpointError(f"{len(of_one)} shards, wanted {int(parts[0][3])}: {of_one[0]}, ...")
    return of_one


def _indexed(index: dict[str, Any], where: str) -> list[str]:
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{where}: wanted a weight_map of file names")
    return sorted({beside(shard, where) for shard in shards.values()})


def _refuse(names: set[str]) -> None:
    for pattern, what in _OTHER_FORMS:
        if any(re.fullmatch(pattern, name) for name in names):
            raise UnreadFormError(f"is {what}")
    raise CheckpointError(f"wanted a file of weights, one of {', '.join(_WEIGHTS)}")
