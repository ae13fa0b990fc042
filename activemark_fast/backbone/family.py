"""Whose a tower is, and what its images are normalised with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from activemark_fast.towers import first_fact, whole

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# What images are normalised with where the model itself does not say.
_FAMILY_NORMALISATION = {"timm": _HALF, "open_clip": _CLIP, "transformers": _HALF, "torchvision": _IMAGENET}
_MODEL_TYPE_NORMALISATION = {"clip": _CLIP, "dino": _IMAGENET, "deit": _IMAGENET}
_REGISTERS = (
    "num_reg_tokens",
    "num_register_tokens",
    "config.num_register_tokens",
    "reg_token",
    "register_tokens",
)
_MEANS = ("image_mean", "pretrained_cfg.mean")
_STDS = ("image_std", "pretrained_cfg.std")


def owners_of(encoder: nn.Module, block: nn.Module) -> list[nn.Module]:
    """The modules from the encoder down to what holds a block."""
    name = next(name for name, module in encoder.named_modules() if module is block)
    owners = [encoder]
    for part in name.split(".")[:-1]:
        owners.append(owners[-1].get_submodule(part))
    return owners


def family_of(owners: Sequence[nn.Module]) -> str:
    """The library that a tower's class comes from, or one it is derived from; else "structure"."""
    for owner in reversed(owners):
        for base in type(owner).__mro__:
            package = base.__module__.partition(".")[0]
            if package in _FAMILY_NORMALISATION:
                return package
    return "structure"


def normalisation_of(
    owners: Sequence[nn.Module], family: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, as the model says, else as its family is used to."""
    mean, std = first_fact(owners, _MEANS, _triple), first_fact(owners, _STDS, _triple)
    if mean is not None and std is not None:
        return mean, std
    if family == "transformers":
        model_type = first_fact(list(reversed(owners)), ("config.model_type",), str)
        for prefix, constants in _MODEL_TYPE_NORMALISATION.items():
            if model_type is not None and model_type.startswith(prefix):
                return constants
    return _FAMILY_NORMALISATION.get(family, _HALF)


def register_tokens(owners: Sequence[nn.Module]) -> int:
    """How many register tokens the tower says it has."""
    return first_fact(list(reversed(owners)), _REGISTERS, _token_count) or 0


def _token_count(value: Any) -> int | None:
    """Of a number of tokens, or of the tokens themselves, (..., tokens, width)."""
    return value.shape[-2] if isinstance(value, Tensor) and value.ndim >= 2 else whole(value)


def _triple(value: Any) -> tuple[float, float, float] | None:
    if not isinstance(value, tuple | list) or len(value) != 3:
        return None
    return float(value[0]), float(value[1]), float(value[2])
