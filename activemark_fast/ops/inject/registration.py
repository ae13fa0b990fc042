"""The operators behind `op`, registered with PyTorch: schema, fake, autograd, and what runs where.

PyTorch imports Triton as it registers them, so this is imported on the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from activemark_fast.ops.common import (
    GRADIENTS_SCHEMA,
    PERCEPTRON_SCHEMA,
    Perceptron,
    perceptron_backward_fake,
    runs_in_triton,
)
from activemark_fast.ops.inject.reference import (
    encode_backward_reference,
    inject_keyed_inplace_reference,
    inject_keyed_reference,
    inject_learned_inplace_reference,
)

_KEYED = "Tensor directions, Tensor scale, Tensor words, Tensor slots"
_LEARNED = f"Tensor source, Tensor words, {PERCEPTRON_SCHEMA}, int index, int dim"


@triton_op(
    "activemark_fast::inject_keyed",
    mutates_args=(),
    schema=f"(Tensor stream, {_KEYED}) -> Tensor",
)
def _inject_keyed(stream: Tensor, directions: Tensor, scale: Tensor, words: Tensor, slots: Tensor) -> Tensor:
    if runs_in_triton(stream):
        from activemark_fast.ops.inject import kernel

        return kernel.inject_keyed(stream, directions, scale, words, slots)
    return inject_keyed_reference(stream, directions, scale, words, slots)


def _inject_keyed_fake(stream: Tensor, *_: Tensor) -> Tensor:
    images, tokens, width = stream.shape
    return stream.new_empty(2 * images, tokens, width)


def _inject_keyed_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    plus, minus = grad.chunk(2)
    return plus + minus, None, None, None, None


_inject_keyed.register_fake(_inject_keyed_fake)
_inject_keyed.register_autograd(_inject_keyed_gradients)


@triton_op(
    "activemark_fast::inject_keyed_",
    mutates_args={"stream"},
    schema=f"(Tensor(a!) stream, {_KEYED}) -> ()",
)
def _inject_keyed_inplace(
    stream: Tensor, directions: Tensor, scale: Tensor, words: Tensor, slots: Tensor
) -> None:
    if runs_in_triton(stream):
        from activemark_fast.ops.inject import kernel

        kernel.inject_keyed_inplace(stream, directions, scale, words, slots)
    else:
        inject_keyed_inplace_reference(stream, directions, scale, words, slots)


@triton_op(
    "activemark_fast::inject_learned",
    mutates_args=(),
    schema=f"(Tensor output, {_LEARNED}) -> Tensor",
)
def _inject_learned(
    output: Tensor,
    source: Tensor,
    words: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    index: int,
    dim: int,
) -> Tensor:
    encoder = Perceptron(weight1, bias1, weight2, bias2)
    if runs_in_triton(output):
        from activemark_fast.ops.inject import kernel

        return kernel.inject_learned(output, source, words, encoder, index, dim)
    injected = output.clone(memory_format=torch.contiguous_format)
    inject_learned_inplace_reference(injected, source, words, encoder, index, dim)
    return injected


@triton_op(
    "activemark_fast::inject_learned_",
    mutates_args={"output"},
    schema=f"(Tensor(a!) output, {_LEARNED}) -> ()",
)
def _inject_learned_inplace(
    output: Tensor,
    source: Tensor,
    words: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    index: int,
    dim: int,
) -> None:
    encoder = Perceptron(weight1, bias1, weight2, bias2)
    if runs_in_triton(output):
        from activemark_fast.ops.inject import kernel

        kernel.inject_learned_inplace(output, source, words, encoder, index, dim)
    else:
        inject_learned_inplace_reference(output, source, words, encoder, index, dim)


_inject_keyed_inplace.register_fake(lambda *_: None)
_inject_learned_inplace.register_fake(lambda *_: None)


def _inject_learned_fake(output: Tensor, *_: Any) -> Tensor:
    return output.new_empty(output.shape)


@torch.library.custom_op(
    "activemark_fast::inject_learned_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_LEARNED}) -> {GRADIENTS_SCHEMA}",
)
def _inject_learned_backward(
    grad: Tensor,
    source: Tensor,
    words: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    index: int,
    dim: int,
) -> tuple[Tensor, ...]:
    """Gradients to the channel of `source` and to the encoder: dense products, so they are PyTorch's."""
    encoder = Perceptron(weight1, bias1, weight2, bias2)
    to_channel, to_encoder = encode_backward_reference(
        grad.select(dim, index), source.select(dim, index), words, encoder
    )
    return to_channel, *to_encoder


def _inject_learned_backward_fake(
    grad: Tensor, source: Tensor, words: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *encoder, index, dim = rest
    return perceptron_backward_fake(source.select(dim, index), encoder)


_inject_learned_backward.register_fake(_inject_learned_backward_fake)


def _keep_learned(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:7])
    ctx.index, ctx.dim = inputs[7:]


def _inject_learned_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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


_inject_learned.register_fake(_inject_learned_fake)
_inject_learned.register_autograd(_inject_learned_gradients, setup_context=_keep_learned)
