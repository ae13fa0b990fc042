"""How every operator is registered with PyTorch: its schema, what it makes (the fake), and what runs where.

The registration of an op imports this and is itself imported by the first call: PyTorch imports
Triton as it registers what is traced. Each op has a statement of its own for that, for torch.compile sees
through no call of `import_module`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.library import Library, custom_op, register_fake, triton_op

from activemark_fast.ops.common import Perceptron, runs_in_triton

NAMESPACE = "activemark_fast"
"""Of the operators: torch.ops.activemark_fast."""
_COMPILED = Library(NAMESPACE, "FRAGMENT")
"""Keeps what `register_compiled` registers: it is gone with this object."""


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    kernel: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> None:
    """An operator on a residual stream: PyTorch everywhere, Triton on CUDA; torch.compile sees through both.

    Args:
        schema: "name(Tensor stream, …) -> …"; "Tensor(a!)" is changed in place.
        fake: makes tensors shaped as the outputs, from the same arguments.
        reference: what runs where no kernel takes the stream.
        kernel: what runs where `runs_in_triton` says so; None: the reference, which torch.compile calls as
            it is.
        backward: the gradients to all arguments, from a context and the gradients to the outputs.
        keep: what keeps things for it, from a context, the arguments and the outputs.
    """
    name, _, rest = schema.partition("(")

    def run(stream: Tensor, *others: Any) -> Any:
        if kernel is not None and runs_in_triton(stream):
            return kernel(stream, *others)
        return reference(stream, *others)

    changed = re.findall(r"Tensor\(a!\) (\w+)", schema)
    make: Any = custom_op if kernel is None else triton_op
    operator = make(f"{NAMESPACE}::{name}", run, mutates_args=changed, schema=f"({rest}")
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=keep)


def register_compiled(
    schema: str, *, fake: Callable[..., Any], reference: Callable[..., Any] | None = None, **devices: Any
) -> None:
    """An operator of the compiled module, which has no gradients; torch.compile calls it as it is.

    Args:
        schema: as of `register`.
        fake: as of `register`.
        reference: what runs on all other devices; None: nothing does.
        devices: what runs on a kind of device, `cpu` or `cuda`.
    """
    name = schema.partition("(")[0]
    _COMPILED.define(schema)
    register_fake(f"{NAMESPACE}::{name}", fake, lib=_COMPILED)
    for device, function in devices.items():
        _COMPILED.impl(name, function, device.upper())
    if reference is not None:
        _COMPILED.impl(name, reference, "CompositeExplicitAutograd")


def in_triton(op: str, name: str) -> Callable[..., Any]:
    """A launcher of `ops.<op>.kernel`, which is imported when it is first called: Triton may be missing."""

    def launch(*arguments: Any) -> Any:
        return getattr(import_module(f"activemark_fast.ops.{op}.kernel"), name)(*arguments)

    return launch


def with_perceptron(function: Callable[..., Any], first: int) -> Callable[..., Any]:
    """`function` with the four tensors of its `Perceptron`, argument `first`, one by one, as in a schema."""

    def flat(*arguments: Any) -> Any:
        layers = Perceptron(*arguments[first : first + 4])
        return function(*arguments[:first], layers, *arguments[first + 4 :])

    return flat
