"""Where and how precisely to compute."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str | torch.device | None, default: torch.device) -> torch.device:
    """The device asked for, or `default`.

    Raises:
        TypeError: `device` is neither a device nor its name.
        ValueError: the device does not exist on this machine, or holds no data ("meta").
    """
    if device is None:
        return default
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: wanted a string or a torch.device, got {type(device).__name__}")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: wanted a device of this machine, got {str(device)!r}") from error
    return resolved


def resolve_autocast(
    precision: str, device: torch.device
) -> Callable[[torch.dtype], AbstractContextManager[object]]:
    """What blocks run in: "fp32", "bf16", "fp16", or "auto" (bf16 on CUDA and on CPUs that multiply it).

    Returns:
        Makes the context for blocks with weights of a dtype. Weights in half precision run as they are on a
        CPU, whose autocast does not mix the two kinds.

    Raises:
        ValueError: another `precision`.
    """
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision: wanted 'auto', 'fp32', 'bf16' or 'fp16', got {precision!r}")
    if precision == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and _cpu_multiplies_bf16())
        precision = "bf16" if fast else "fp32"
    dtype = PRECISIONS[precision]
    if dtype is None:
        return nullcontext

    def mixed(weights: torch.dtype) -> AbstractContextManager[object]:
        if device.type == "cpu" and weights in (torch.float16, torch.bfloat16):
            return nullcontext()
        return torch.autocast(device.type, dtype=dtype)

    return mixed


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16 matrices, which take a quarter of fp32's time."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, Any])()  # not in all versions
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
