"""Model strings, safe loading, saving.

A model is named by a string:

    open_clip:ViT-L-14/openai             timm:vit_large_patch14_clip_224.openai
    hf:facebook/dinov2-base               torchvision:vit_b_16
    timm:VisionTransformer?{"depth": 12}  any of these @path/to/checkpoint
    path/to/model.safetensors             demo

The part before `@` is the *architecture*; with `@` the weights are read from the file, else fetched by the
library. A safetensors file alone is enough where its metadata names the architecture. Checkpoints are
hostile: nothing in them is executed, and no model is allocated before the file's shapes are known to fit it.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from activemark_fast.checkpoints.errors import CheckpointError, reason, shown
from activemark_fast.checkpoints.files import Checkpoint

MAX_BYTES = 10_000_000_000
"""Of a model's weights."""
_DEMO = Path(__file__).parents[1] / "assets" / "vit_c10_w128_d12_massive.safetensors"
_FORMS = (
    "open_clip:NAME/TAG, timm:NAME, hf:NAME or torchvision:NAME, each with @path/to/checkpoint for local "
    "weights; a path to a safetensors file that names its architecture; demo"
)
_VIT = "VisionTransformer"
_VIT_CLASS = "timm.models.vision_transformer.VisionTransformer"
_PLAIN_NAMES = {"open_clip": r"[\w.-]+(/[\w.-]+)?", "timm": r"[\w.-]+", "hf": r".+", "torchvision": r"\w+"}
_MAX_JSON = 4096


def build_model(architecture: str) -> nn.Module:
    """A model with random weights; downloads nothing.

    Args:
        architecture: a model string without `@`. The configuration of an `hf:` model must be in the local
            cache, or the name be a folder that holds it.

    Raises:
        TypeError: `architecture` is not a string.
        CheckpointError: the string is malformed, or its library does not know it.
    """
    return build(plain_architecture(architecture), torch.device("cpu"))


def architecture_of(spec: str | os.PathLike[str]) -> str:
    """What `build_model` builds a model string's model from: the string without the path of its weights.

    Raises:
        TypeError: `spec` is neither a string nor a path.
        CheckpointError: the string is malformed, or the file does not name its architecture.
    """
    return resolve(spec)[0]


def resolve(spec: str | os.PathLike[str]) -> tuple[str, Path | None]:
    """The architecture, and the file of the weights if they are not to be fetched."""
    if isinstance(spec, str) and spec.partition(":")[0] in _PLAIN_NAMES and ":" in spec:
        architecture, at, weights = spec.partition("@")
        _check_architecture(architecture)
        if at and not weights:
            raise CheckpointError(f"{shown(spec)}: wanted a path after @")
        return architecture, Path(weights) if at else None
    path = _DEMO if spec == "demo" else as_path(spec)
    if not path.exists():
        raise CheckpointError(f"{shown(spec)}: neither a file nor a model string. Model strings: {_FORMS}")
    return _own_architecture(path), path


def _own_architecture(path: Path) -> str:
    if (path / "config.json").is_file():
        return f"hf:{path}"
    with Checkpoint(path, MAX_BYTES) as checkpoint:
        metadata = checkpoint.metadata
    try:
        if "architecture" in metadata:
            architecture = metadata["architecture"]
        elif (metadata.get("library", "timm"), metadata.get("class", _VIT_CLASS)) == (
            "timm",
            _VIT_CLASS,
        ) and ({"class", "kwargs"} & metadata.keys()):
            normalisation = {
                name: _parse_json(metadata[name]) for name in ("mean", "std") if name in metadata
            }
            kwargs = _parse_object(metadata.get("kwargs", "{}")) | normalisation
            architecture = f"timm:{_VIT}?{json.dumps(kwargs, sort_keys=True)}"
        else:
            raise CheckpointError(f"does not name its architecture; say it, for example timm:NAME@{path}")
        _check_architecture(architecture)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return architecture


def plain_architecture(architecture: str) -> str:
    """`architecture`, checked; what `demo` stands for."""
    if architecture == "demo":
        return architecture_of("demo")
    _check_architecture(architecture)
    return architecture


def _check_architecture(architecture: str) -> None:
    if not isinstance(architecture, str):
        raise TypeError(f"architecture: wanted a string, got {type(architecture).__name__}")
    family, _, name = architecture.partition(":")
    if family not in _PLAIN_NAMES or not name or "@" in name:
        raise CheckpointError(
            f"architecture {shown(architecture)}: wanted one of {_FORMS}; without the @path"
        )
    if family == "timm" and name.startswith(f"{_VIT}?"):
        _vit_kwargs(name)
    elif not re.fullmatch(_PLAIN_NAMES[family], name):
        raise CheckpointError(
            f"architecture {shown(architecture)}: {shown(name)} is not a name that {family} has"
        )


def build(architecture: str, device: torch.device) -> nn.Module:
    """`build_model` of an architecture that was checked, on a device, which may be "meta"."""
    family, _, name = architecture.partition(":")
    try:
        with device, _offline():
            if family == "open_clip":
                return _build_open_clip(name, device)
            if family == "torchvision":
                return _library("torchvision.models").get_model(name, weights=None)
            if family == "hf":
                transformers = _library("transformers")
                config = transformers.AutoConfig.from_pretrained(
                    name, local_files_only=True, trust_remote_code=False
                )
                return transformers.AutoModel.from_config(config, trust_remote_code=False)
            if name.startswith(f"{_VIT}?"):
                return _build_vit(_vit_kwargs(name), device)
            return _library("timm").create_model(name, pretrained=False)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{shown(architecture)} cannot be built: {reason(error)}") from error


@contextmanager
def _offline() -> Iterator[None]:
    """Meanwhile no library fetches anything from the Hugging Face hub, such as a configuration."""
    constants = _library("huggingface_hub.constants")
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _build_open_clip(name: str, device: torch.device) -> nn.Module:
    name, _, tag = name.partition("/")
    return _library("open_clip").create_model(
        name, load_weights=False, pretrained_text=False, device=device, **_open_clip_options(name, tag)
    )


def _open_clip_options(name: str, tag: str) -> dict[str, Any]:
    """The activation and the normalisation that the weights of this tag were trained with."""
    if not tag:
        return {}
    trained = _library("open_clip").get_pretrained_cfg(name, tag)
    if not trained:
        raise CheckpointError(f"open_clip:{name}/{tag}: open_clip has no weights {tag!r} for {name!r}")
    return {
        "force_quick_gelu": trained.get("quick_gelu", False),
        "force_preprocess_cfg": {key: trained[key] for key in ("mean", "std") if key in trained},
    }


def _build_vit(kwargs: dict[str, Any], device: torch.device) -> nn.Module:
    cls = _library("timm.models.vision_transformer").VisionTransformer
    normalisation = {name: kwargs.pop(name) for name in ("mean", "std") if name in kwargs}
    with torch.device("meta"):
        model = cls(**kwargs)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > MAX_BYTES:
        raise CheckpointError(f"timm:{_VIT}: {size} bytes of parameters, wanted at most {MAX_BYTES}")
    if device.type != "meta":
        model = cls(**kwargs)
    model.pretrained_cfg = {"input_size": (3, *model.patch_embed.img_size), **normalisation}
    return model


def fetch(architecture: str) -> nn.Module:
    """The model with the weights that its library fetches. Raises CheckpointError where that fails."""
    family, _, name = architecture.partition(":")
    if name.startswith(f"{_VIT}?"):
        raise CheckpointError(f"{shown(architecture)}: names no weights; say where they are: @path")
    hub = _unknown_hub()
    try:
        with _offline() if hub else nullcontext():
            if family == "open_clip":
                name, _, tag = name.partition("/")
                if not tag:
                    raise CheckpointError(
                        f"{architecture}: names no weights; say open_clip:{name}/TAG or @path"
                    )
                options = _open_clip_options(name, tag)
                return _library("open_clip").create_model(name, pretrained=tag, **options)
            if family == "torchvision":
                return _library("torchvision.models").get_model(name, weights="DEFAULT")
            if family == "hf":
                return _library("transformers").AutoModel.from_pretrained(name, trust_remote_code=False)
            return _library("timm").create_model(name, pretrained=True)
    except CheckpointError:
        raise
    except Exception as error:
        why = reason(error)
        if hub and family != "torchvision" and isinstance(error, OSError):
            why = f"not in the local cache, and {hub} cannot be reached; say where its weights are: @path"
        raise CheckpointError(f"{architecture}: cannot be fetched: {why}") from error


def _unknown_hub() -> str | None:
    """The Hugging Face hub's host where this machine knows no address of it: to try would take a minute."""
    host = urlsplit(_library("huggingface_hub.constants").ENDPOINT).hostname
    if getproxies():  # who knows it, then
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return host
    return None


def _library(name: str) -> Any:
    return importlib.import_module(name)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path. Raises TypeError for anything else."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: wanted a string or a path, got {type(path).__name__}")
    return Path(path)


def existing(path: str | os.PathLike[str]) -> Path:
    """The path of something that is there. Raises TypeError, CheckpointError."""
    path = as_path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file")
    return path


def _parse_json(text: str) -> Any:
    if len(text) > _MAX_JSON:
        raise CheckpointError(f"JSON of {len(text)} characters, wanted at most {_MAX_JSON}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown(text)} is not JSON: {reason(error)}") from error


def _parse_object(text: str) -> dict[str, Any]:
    value = _parse_json(text)
    if not isinstance(value, dict):
        raise CheckpointError(f"{shown(text)} is JSON, but not an object")
    return value


_Check = Callable[[Any], bool]


def _whole(low: int, high: int) -> _Check:
    return lambda value: type(value) is int and low <= value <= high


def _real(low: float, high: float) -> _Check:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _list_of(count: int, check: _Check) -> _Check:
    return lambda value: isinstance(value, list) and len(value) == count and all(map(check, value))


def _any_of(*checks: _Check) -> _Check:
    return lambda value: any(check(value) for check in checks)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _is_none(value: Any) -> bool:
    return value is None


_POOLS = ("", "avg", "avgmax", "max", "token", "map")
# What of timm's VisionTransformer a string or a file may set: argument -> whether a value is acceptable.
_VIT_ARGUMENTS: dict[str, _Check] = {
    "img_size": _any_of(_whole(1, 4096), _list_of(2, _whole(1, 4096))),
    "patch_size": _any_of(_whole(1, 256), _list_of(2, _whole(1, 256))),
    "embed_dim": _whole(1, 16384),
    "depth": _whole(1, 256),
    "num_heads": _whole(1, 256),
    "num_classes": _whole(0, 1_000_000),
    "mlp_ratio": _real(0.01, 64),
    "init_values": _any_of(_is_none, _real(-1e3, 1e3)),
    "reg_tokens": _whole(0, 256),
    "global_pool": lambda value: isinstance(value, str) and value in _POOLS,
    "class_token": _is_truth,
    "no_embed_class": _is_truth,
    "pre_norm": _is_truth,
    "final_norm": _is_truth,
    "fc_norm": _any_of(_is_none, _is_truth),
    "qkv_bias": _is_truth,
    "proj_bias": _is_truth,
    "qk_norm": _is_truth,
    "dynamic_img_size": _is_truth,
    "mean": _list_of(3, _real(-1e3, 1e3)),
    "std": _list_of(3, _real(1e-6, 1e3)),
}


def _vit_kwargs(name: str) -> dict[str, Any]:
    """The arguments in `VisionTransformer?{...}`, each allowed and in bounds."""
    kwargs = _parse_object(name.removeprefix(f"{_VIT}?"))
    for argument, value in kwargs.items():
        acceptable = _VIT_ARGUMENTS.get(argument)
        if acceptable is None:
            allowed = ", ".join(_VIT_ARGUMENTS)
            raise CheckpointError(f"{_VIT}: {shown(argument)} cannot be set; what can: {allowed}")
        if not acceptable(value):
            raise CheckpointError(
                f"{_VIT}: {argument} = {shown(value)} is of the wrong type or out of bounds"
            )
    return {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
