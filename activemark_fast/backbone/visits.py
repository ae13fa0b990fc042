"""Which blocks a tower calls, and which of them follow each other on one residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activemark_fast.backbone.calls import Call, hidden_of, removing, tensors_in
from activemark_fast.towers import NotAViTError, feed, shape_of


@dataclass(eq=False)
class Visit:
    """One call of a block while the whole tower runs.

    Attributes:
        path: name of its list.
        index: its place in it.
        call: how it was called.
        shape: of the stream that it took.
        keeps: whether it returned one of the same shape.
        follows: whether it took what the block before it in the list had just returned.
        packed: what it returned in a tuple beside the stream, None for what holds tensors; None where it
            returned no tuple.
        begun: how many calls of layers had been noted before it.
        ended: and after it.
    """

    path: str
    index: int
    call: Call
    shape: torch.Size
    follows: bool
    begun: int
    keeps: bool = False
    packed: tuple[Any, ...] | None = None
    ended: int = 0


def visits_of(
    encoder: nn.Module,
    lists: Mapping[str, Sequence[nn.Module]],
    images: Tensor,
    layers: list[tuple[nn.Module, torch.Size]],
) -> list[Visit]:
    """Every call of a block of any list while the tower runs.

    Args:
        encoder: the tower.
        lists: of blocks, by their names.
        images: (2, 3, H, W), what it runs on.
        layers: takes every call of a norm, linear layer, 1 x 1 convolution or multi-head attention, with the
            shape it was given.

    Raises:
        NotAViTError: the tower does not take such images.
    """
    visits: list[Visit] = []
    returned: dict[str, tuple[int, Tensor]] = {}
    handles: list[RemovableHandle] = []

    def enter(path: str, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream, call = Call.of(args, kwargs)
            before, value = returned.pop(path, (-1, None))
            follows = (
                isinstance(stream, Tensor)
                and value is not None
                and before == index - 1
                and stream.shape == value.shape
                and torch.allclose(stream, value, rtol=0, atol=0, equal_nan=True)
            )
            shape = stream.shape if isinstance(stream, Tensor) else torch.Size()
            visits.append(Visit(path, index, call, shape, follows, len(layers)))

        return hook

    def leave(path: str, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            visit = next(v for v in reversed(visits) if v.path == path and v.index == index)
            value = hidden_of(output)
            visit.keeps = isinstance(value, Tensor) and value.shape == visit.shape and value.ndim >= 2
            if isinstance(output, tuple):
                visit.packed = tuple(None if any(True for _ in tensors_in(v)) else v for v in output[1:])
            visit.ended = len(layers)
            if visit.keeps:
                returned[path] = (index, value)

        return hook

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            layers.append((module, args[0].shape))

    for path, blocks in lists.items():
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(enter(path, index), with_kwargs=True))
            handles.append(block.register_forward_hook(leave(path, index)))
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.MultiheadAttention) or _is_pointwise(module) or _is_norm(module):
            handles.append(module.register_forward_pre_hook(note))
    with removing(handles):
        try:
            feed(encoder, images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise NotAViTError(
                f"{type(encoder).__name__} does not take {shape_of((images.shape[2], images.shape[3]))}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return visits


def longest_run(visits: Sequence[Visit]) -> list[Visit]:
    """The longest sequence of blocks with one residual stream, of several the last."""
    often = Counter((visit.path, visit.index) for visit in visits)
    best: list[Visit] = []
    for path in dict.fromkeys(visit.path for visit in visits):
        run: list[Visit] = []
        for visit in (v for v in visits if v.path == path):
            if not visit.keeps or often[path, visit.index] > 1:
                run = []
                continue
            run = [*run, visit] if visit.follows and run else [visit]
            if len(run) >= len(best):
                best = run
    return best


def why_no_run(visits: Sequence[Visit]) -> str:
    """What keeps the blocks of a list from being a sequence on one residual stream."""
    order = [visit.index for visit in visits]
    if not order:
        return "which the forward pass does not call"
    if order != sorted(set(order)):
        return f"which are called as {order}, not once each, in order"
    changed = next((v for v in visits if not v.keeps), None)
    if changed is not None:
        return (
            f"of which block {changed.index} returns another shape than the {tuple(changed.shape)} it takes"
        )
    apart = next((v.index for v in visits[1:] if not v.follows), 0)
    return f"of which block {apart} does not take what the one before returned"


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def _is_norm(module: nn.Module) -> bool:
    """By its name; a norm and a linear layer in one module is none."""
    mixed = any(isinstance(child, nn.Linear | nn.Conv2d) for child in module.children())
    return "norm" in type(module).__name__.lower() and not mixed
