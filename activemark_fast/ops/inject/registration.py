"""The operators behind `op`, registered with PyTorch: schema, fake, gradients, and what runs where."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from activemark_fast.ops.common import (
    GRADIENTS_SCHEMA,
    PERCEPTRON_SCHEMA,
    Perceptron,
    perceptron_backward_fake,
)
from activemark_fast.ops.inject.reference import (
    encode_backward_reference,
    inject_keyed_inplace_reference,
    inject_keyed_reference,
    inject_learned_inplace_reference,
    inject_learned_reference,
)
from activemark_fast.ops.registry import in_triton, register, with_perceptron

_KEYED = "Tensor directions, Tensor scale, Tensor words, Tensor slots"
_LEARNED = f"Tensor source, Tensor words, {PERCEPTRON_SCHEMA}, int index, int dim"


def _keyed_fake(stream: Tensor, *_: Tensor) -> Tensor:
    images, tokens, width = stream.shape
    return stream.new_empty(2 * images, tokens, width)


def _keyed_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    plus, minus = grad.chunk(2)
    return plus + minus, None, None, None, None


register(
    f"inject_keyed(Tensor stream, {_KEYED}) -> Tensor",
    fake=_keyed_fake,
    reference=inject_keyed_reference,
    kernel=in_triton("inject", "inject_keyed"),
    backward=_keyed_gradients,
)
register(
    f"inject_keyed_(Tensor(a!) stream, {_KEYED}) -> ()",
    fake=lambda *_: None,
    reference=inject_keyed_inplace_reference,
    kernel=in_triton("inject", "inject_keyed_inplace"),
)


def _learned_backward(
    grad: Tensor, source: Tensor, words: Tensor, encoder: Perceptron, index: int, dim: int
) -> tuple[Tensor, ...]:
    """Gradients to the channel of `source` and to the encoder: dense products, so they are PyTorch's."""
    channels = (grad.select(dim, index), source.select(dim, index))
    to_channel, to_encoder = encode_backward_reference(*channels, words, encoder)
    return to_channel, *to_encoder


def _learned_backward_fake(grad: Tensor, source: Tensor, words: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *encoder, index, dim = rest
    return perceptron_backward_fake(source.select(dim, index), encoder)


def _keep_learned(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:7])
    ctx.index, ctx.dim = inputs[7:]


def _learned_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors
    to_output = to_source = None
    channel, *to_weights = torch.ops.activemark_fast.inject_learned_backward(grad, *kept, ctx.index, ctx.dim)
    if ctx.needs_input_grad[0]:
        to_output = grad.clone()
        to_output.select(ctx.dim, ctx.index).zero_()
    if ctx.needs_input_grad[1]:
        to_source = torch.zeros_like(kept[0])
        to_source.select(ctx.dim, ctx.index).copy_(channel)
    return to_output, to_source, None, *to_weights, None, None


register(
    f"inject_learned(Tensor output, {_LEARNED}) -> Tensor",
    fake=lambda output, *_: output.new_empty(output.shape),
    reference=with_perceptron(inject_learned_reference, 3),
    kernel=with_perceptron(in_triton("inject", "inject_learned"), 3),
    backward=_learned_gradients,
    keep=_keep_learned,
)
register(
    f"inject_learned_(Tensor(a!) output, {_LEARNED}) -> ()",
    fake=lambda *_: None,
    reference=with_perceptron(inject_learned_inplace_reference, 3),
    kernel=with_perceptron(in_triton("inject", "inject_learned_inplace"), 3),
)
register(
    f"inject_learned_backward(Tensor grad, {_LEARNED}) -> {GRADIENTS_SCHEMA}",
    fake=_learned_backward_fake,
    reference=with_perceptron(_learned_backward, 3),
)
