"""A device that is none: its tensors lie in memory, but meet the CPU's no more than a GPU's would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
# What a GPU does with tensors of the CPU, too.
_MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_BY_INDEX = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class Pretended(Tensor):
    """A tensor on the device; `held` is its memory."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.held.tolist()

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    known = tensors[:1] if func in _BY_INDEX else [] if func in _MOVES else tensors
    if len({type(tensor) is Pretended for tensor in known if tensor.ndim}) > 1:
        raise RuntimeError(f"{func}: tensors of two devices")
    to = kwargs.get("device")
    here = to is None or torch.device(to).type == NAME
    if func is torch.ops.aten.copy_.default:
        here = isinstance(args[0], Pretended)
    if to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def held(value: Any) -> Any:
        return value.held if isinstance(value, Pretended) else value

    out = func(*tree_map(held, args), **tree_map(held, kwargs))
    given = {id(held(tensor)): tensor for tensor in tensors}

    def shown(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in given:  # it was written to
            return given[id(value)]
        return Pretended(value) if here else value

    return tree_map(shown, out)


def pretend_device() -> torch.device:
    """The device; made when it is first asked for, for the whole process."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
        if setup is None:
            pytest.skip("this PyTorch has no devices in Python", allow_module_level=True)

        class Backend(backend_registration._DummyBackendModule):
            def get_amp_supported_dtype(self) -> list[torch.dtype]:
                return [torch.bfloat16]

        setup(NAME, backend_module=Backend())
        library = torch.library.Library("_", "IMPL")
        library.fallback(_run, "PrivateUse1")
        _KEPT.append(library)
    return torch.device(NAME, 0)


_KEPT: list[torch.library.Library] = []
"""What a library registers goes with it."""
