"""What runs of a whole tower on random images show: its blocks, how they are called, what comes after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from activemark_fast.backbone.calls import Call, removing
from activemark_fast.backbone.layout import Layout
from activemark_fast.backbone.visits import Visit, longest_run, visits_of, why_no_run
from activemark_fast.towers import LOOKED_FOR, MIN_BLOCKS, NotAViTError, Stop, feed, random_images

Layer = nn.Linear | nn.Conv2d
"""What writes to the residual stream: a linear layer or a 1 x 1 convolution."""


@dataclass(frozen=True, eq=False)
class Probe:
    """What a tower was seen to do.

    Attributes:
        blocks: the live blocks, in order.
        packed: of each, what it returns beside the stream, as `Visit.packed`.
        calls: of each, how it is called; None where that depends on the number of images.
        layout: of the residual stream.
        layers: of each block, its layers to the stream's width, in the order of their last calls.
        within: what a torch.nn.MultiheadAttention applies without calling it, and which.
        norm: the live final norm; `nn.Identity` where the tower has none.
        goes_on: whether other blocks run between these and the norm.
    """

    blocks: tuple[nn.Module, ...]
    packed: list[tuple[Any, ...] | None]
    calls: list[Call] | None
    layout: Layout
    layers: list[list[Layer]]
    within: dict[nn.Module, nn.MultiheadAttention]
    norm: nn.Module
    goes_on: bool


def probe(
    encoder: nn.Module,
    lists: Mapping[str, Sequence[nn.Module]],
    image_size: tuple[int, int],
    like: Tensor,
) -> Probe:
    """Runs a tower and picks its blocks, their layers and what comes after them.

    Args:
        encoder: the tower, in eval mode; no gradients are wanted.
        lists: of blocks, by their names.
        image_size: (height, width) in pixels.
        like: a tensor with the dtype and on the device of its images.

    Raises:
        NotAViTError: no blocks of it are a sequence on one residual stream.
    """
    noise = random_images(2, image_size, like)
    layers: list[tuple[nn.Module, torch.Size]] = []
    visits = visits_of(encoder, lists, noise, layers)
    run = longest_run(visits)
    if len(run) < MIN_BLOCKS:
        longest = max(lists, key=lambda path: len(lists[path]))
        why = why_no_run([visit for visit in visits if visit.path == longest])
        raise NotAViTError(f"looked for {LOOKED_FOR}; found {described(encoder, lists[longest])}, {why}")
    blocks = tuple(lists[run[0].path][visit.index] for visit in run)
    one, call_of_one = enter(encoder, blocks, random_images(1, image_size, like))
    _, call_of_blank = enter(encoder, blocks, 0 * noise)
    two = run[0].shape
    layout = Layout.of(one.shape, two, blocks[0], square=image_size[0] == image_size[1])
    if layout is None:
        raise NotAViTError(
            f"looked for {LOOKED_FOR}; found {described(encoder, blocks)}, called with {tuple(one.shape)} "
            f"for one image and {tuple(two)} for two"
        )
    alone, together, blank = (list(call.tensors()) for call in (call_of_one, run[0].call, call_of_blank))
    if not all(map(torch.equal, together, blank)):
        raise NotAViTError(
            "looked for blocks whose further arguments do not depend on the image; found "
            f"{described(encoder, blocks)}"
        )
    by_batch = [t.shape for t in alone] != [t.shape for t in together]
    calls = None if by_batch else [visit.call for visit in run]
    packed = [visit.packed for visit in run]
    written, within = _layers_of(run, layers, layout.width)
    goes_on = any(visit.begun >= run[-1].ended for visit in visits)
    after = _norms_after(blocks, layers[run[-1].ended :])
    at_once = [norm for norm, shape in after if shape[-1] == layout.width and not layout.channels_first]
    if goes_on and after:
        return Probe(blocks, packed, calls, layout, written, within, after[-1][0], goes_on=True)
    norm = at_once[0] if at_once else nn.Identity()
    return Probe(blocks, packed, calls, layout, written, within, norm, goes_on=False)


def enter(encoder: nn.Module, blocks: Sequence[nn.Module], images: Tensor) -> tuple[Tensor, Call]:
    """What enters the first of the blocks, in the tower's own layout, and how it is called.

    Raises:
        NotAViTError: it is not called.
    """

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Stop(*Call.of(args, kwargs))

    with removing([blocks[0].register_forward_pre_hook(stop, with_kwargs=True)]):
        try:
            feed(encoder, images)
        except Stop as stopped:
            stream, call = stopped.carried
            return stream, call
    raise NotAViTError(f"{described(encoder, blocks)}: the forward pass did not call them again")


def described(encoder: nn.Module, blocks: Sequence[nn.Module]) -> str:
    """Some blocks of a tower, in words."""
    return f"{len(blocks)} blocks {type(blocks[0]).__name__} in {type(encoder).__name__}"


def _layers_of(
    run: Sequence[Visit], layers: Sequence[tuple[nn.Module, torch.Size]], width: int
) -> tuple[list[list[Layer]], dict[nn.Module, nn.MultiheadAttention]]:
    """`Probe.layers` and `Probe.within`."""
    found: list[list[Layer]] = []
    within: dict[nn.Module, nn.MultiheadAttention] = {}
    for visit in run:
        called: dict[Layer, None] = {}
        for module, _ in layers[visit.begun : visit.ended]:
            if isinstance(module, nn.MultiheadAttention):
                within[module.out_proj] = module
            layer = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == width:
                called.pop(layer, None)
                called[layer] = None
        found.append(list(called))
    return found, within


def _norms_after(
    blocks: Sequence[nn.Module], layers: Sequence[tuple[nn.Module, torch.Size]]
) -> list[tuple[nn.Module, torch.Size]]:
    """The norms outside the blocks, of the layers that were called after them."""
    inside = {module for block in blocks for module in block.modules()}
    return [
        (layer, shape)
        for layer, shape in layers
        if layer not in inside and not isinstance(layer, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
    ]
