"""Which files of a folder hold the weights of its model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
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
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


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
    adapter = [name for name in _ADAPTER_WEIGHTS if name in names][:1]
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
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        raise UnreadFormError(
            "is a distributed checkpoint of torch: convert it with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    if any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in names):
        raise UnreadFormError("is a DeepSpeed ZeRO checkpoint: gather it with its zero_to_fp32.py")
    raise CheckpointError(f"wanted a file of weights, one of {', '.join(_WEIGHTS)}")
