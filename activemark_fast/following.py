"""Weights that follow: they stay in host memory or in mapped files, and go to a device when it needs them.

While weights follow, whatever meets a tensor of the device in a computation is copied there first. Copies of
parameters stay until later ones need the room, so a device holds a few blocks of a model that is larger than
its memory.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

KEPT_BYTES = 1 << 30
"""Copies of weights that stay on the device: those of a block, or of several, of most models."""

_TARGET: ContextVar[torch.device | None] = ContextVar("activemark_fast.following", default=None)


@contextmanager
def following(device: torch.device) -> Iterator[None]:
    """Models whose weights are on the CPU are computed on `device` meanwhile; on the CPU nothing changes."""
    if device.type == "cpu":
        yield
        return
    token = _TARGET.set(device)
    try:
        with _Follow(device):
            yield
    finally:
        _TARGET.reset(token)


def computed_on(device: torch.device) -> torch.device:
    """Where what lies on `device` is computed with."""
    target = _TARGET.get()
    return device if target is None or device.type != "cpu" else target


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` on `device`: moved there, or as it is where its weights follow to that device."""
    return module if _TARGET.get() == device else module.to(device)


def kept_bytes() -> int:
    """Most bytes of copies that are kept; 0 where weights do not follow."""
    return 0 if _TARGET.get() is None else KEPT_BYTES


class _Follow(TorchFunctionMode):
    """Copies what is in host memory to the device where it meets a tensor that is there.

    A mode of functions, not of operators: below autocast it would be too late.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._kept: OrderedDict[int, tuple[Callable[[], Any], int, Tensor]] = OrderedDict()
        self._bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(tensor.device.type == self._device.type for tensor in tensors)
        if there and any(map(_follows, tensors)) and not (_writes(func) and _follows(args[0])):
            args, kwargs = tree_map(self._moved, (args, kwargs))
        return func(*args, **kwargs)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not _follows(value):
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(self._device)
        known = self._kept.get(id(value))
        if known is not None and known[0]() is value and known[1] == value._version:
            self._kept.move_to_end(id(value))
            return known[2]
        self._forget(id(value))
        copy = value.detach().to(self._device)
        self._kept[id(value)] = weakref.ref(value), value._version, copy
        self._bytes += copy.nbytes
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._forget(next(iter(self._kept)))
        return copy

    def _forget(self, which: int) -> None:
        known = self._kept.pop(which, None)
        if known is not None:
            self._bytes -= known[2].nbytes


def _follows(value: Any) -> bool:
    """Whether it is a tensor in host memory, and no number, which goes with any device."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.ndim > 0


def _writes(func: Any) -> bool:
    """Whether a function writes to its first argument, which has to stay where it is."""
    name = getattr(func, "__name__", "")
    return name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
