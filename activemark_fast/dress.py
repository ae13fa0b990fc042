"""Modules in special dress: wrappers to look through, and weights that cannot be marked as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that `torch.compile`, `DataParallel` or `DistributedDataParallel` was given."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def hindrance(model: nn.Module) -> str | None:
    """What keeps a model that `unwrapped` returned from being run block by block, or None."""
    if isinstance(model, torch.fx.GraphModule):
        return "it is a traced graph: mark the module that it was made from"
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"{_called(name)} is TorchScript: mark the module that it was made from"
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            return f"{_called(name)} is compiled: mark the model first, then compile it"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            return f"{name} holds no values (it is on the meta device): load the weights first"
        if hasattr(tensor, "full_tensor") or getattr(tensor, "_is_flat_param", False):
            return f"{name} is spread over processes: gather the whole model first (docs/giants.md)"
    return None


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a module, of a pruned one too.

    Weights that hooks compute anew before each run are copied by value: deepcopy refuses what has a history.

    memo: what the copy has in place of something, by its id, as of `copy.deepcopy`.
    """
    memo = dict(memo or {})
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def fixed_weight(linear: nn.Module) -> str | None:
    """Why the weight of a linear layer or convolution cannot be written to, or None where it can."""
    weight = linear._parameters.get("weight")
    if weight is None:
        return (
            "is computed from other tensors (it is pruned, normalised or otherwise parametrised): make that "
            "permanent first"
        )
    if not weight.is_floating_point() or type(weight.data) is not Tensor:
        kind = str(weight.dtype).removeprefix("torch.")
        kind = kind if type(weight.data) is Tensor else type(weight.data).__name__
        return f"is quantised or sharded ({kind}): mark the model first"
    return None


@contextmanager
def plain_torch() -> Iterator[None]:
    """For a while tensors are float32 on the CPU by default, and inference mode and autocast are off."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), ExitStack() as stack:
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    # Its copies of weights would outlive what is written to them.
                    stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)


def _called(name: str) -> str:
    return repr(name) if name else "it"
