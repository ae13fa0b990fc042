"""The operators behind `op`, registered with PyTorch: schema, fake, autograd, and what runs where.

PyTorch imports Triton as it registers them, so this is imported on the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from activemark_fast.ops.bits import words_for
from activemark_fast.ops.common import (
    GRADIENTS_SCHEMA,
    PERCEPTRON_SCHEMA,
    Perceptron,
    compute_dtype,
    perceptron_backward_fake,
    runs_in_triton,
)
from activemark_fast.ops.decode.reference import (
    Outputs,
    decode_keyed_backward_reference,
    decode_keyed_reference,
    decode_learned_backward_reference,
    decode_learned_reference,
)

_KEYED = "Tensor directions, Tensor scale, Tensor slots"
_JUDGED = "Tensor expected, float sharpness"
_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_LEARNED = f"{PERCEPTRON_SCHEMA}, int index, int dim"


@triton_op(
    "activemark_fast::decode_keyed",
    mutates_args=(),
    schema=f"(Tensor tapped, {_KEYED}, {_JUDGED}) -> {_OUTPUTS}",
)
def _decode_keyed(
    tapped: Tensor,
    directions: Tensor,
    scale: Tensor,
    slots: Tensor,
    expected: Tensor,
    sharpness: float,
) -> Outputs:
    if runs_in_triton(tapped):
        from activemark_fast.ops.decode import kernel

        return kernel.decode_keyed(tapped, directions, scale, slots, expected, sharpness)
    return decode_keyed_reference(tapped, directions, scale, slots, expected, sharpness)


def _decode_keyed_fake(tapped: Tensor, directions: Tensor, *_: Any) -> Outputs:
    return _fake_outputs(tapped, tapped.shape[0] // 2, directions.shape[0])


@triton_op(
    "activemark_fast::decode_keyed_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_KEYED}, SymInt tokens, ScalarType dtype) -> Tensor",
)
def _decode_keyed_backward(
    grad: Tensor,
    directions: Tensor,
    scale: Tensor,
    slots: Tensor,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    if runs_in_triton(grad):
        from activemark_fast.ops.decode import kernel

        return kernel.decode_keyed_backward(grad, directions, scale, slots, tokens, dtype)
    return decode_keyed_backward_reference(grad, directions, scale, slots, tokens, dtype)


def _decode_keyed_backward_fake(
    grad: Tensor,
    directions: Tensor,
    scale: Tensor,
    slots: Tensor,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty(2 * grad.shape[0], tokens, directions.shape[1], dtype=dtype)


def _keep_keyed(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    tapped, directions, scale, slots, *_ = inputs
    ctx.tokens, ctx.dtype = tapped.shape[1], tapped.dtype
    _keep(ctx, output, directions, scale, slots)


def _decode_keyed_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    loss_grad, directions, scale, slots = ctx.saved_tensors
    grad = _logits_grad(grads[0], grads[3], loss_grad)
    to_tapped = None
    if grad is not None:
        to_tapped = torch.ops.activemark_fast.decode_keyed_backward(
            grad, directions, scale, slots, ctx.tokens, ctx.dtype
        )
    return to_tapped, None, None, None, None, None


_decode_keyed.register_fake(_decode_keyed_fake)
_decode_keyed_backward.register_fake(_decode_keyed_backward_fake)
_decode_keyed.register_autograd(_decode_keyed_gradients, setup_context=_keep_keyed)


@triton_op(
    "activemark_fast::decode_learned",
    mutates_args=(),
    schema=f"(Tensor tapped, {_LEARNED}, {_JUDGED}) -> {_OUTPUTS}",
)
def _decode_learned(
    tapped: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    index: int,
    dim: int,
    expected: Tensor,
    sharpness: float,
) -> Outputs:
    decoder = Perceptron(weight1, bias1, weight2, bias2)
    channel = tapped.select(dim, index)
    if runs_in_triton(tapped):
        from activemark_fast.ops.decode import kernel

        return kernel.decode_learned(channel, decoder, expected, sharpness)
    return decode_learned_reference(channel, decoder, expected, sharpness)


def _decode_learned_fake(tapped: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *_: Any) -> Outputs:
    return _fake_outputs(tapped, tapped.shape[0], weight2.shape[0])


@torch.library.custom_op(
    "activemark_fast::decode_learned_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor tapped, {_LEARNED}) -> {GRADIENTS_SCHEMA}",
)
def _decode_learned_backward(
    grad: Tensor,
    tapped: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    index: int,
    dim: int,
) -> tuple[Tensor, ...]:
    """Gradients to the channel of `tapped` and to the decoder: dense products, so they are PyTorch's."""
    decoder = Perceptron(weight1, bias1, weight2, bias2)
    to_channel, to_decoder = decode_learned_backward_reference(grad, tapped.select(dim, index), decoder)
    return to_channel, *to_decoder


def _decode_learned_backward_fake(grad: Tensor, tapped: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *decoder, index, dim = rest
    return perceptron_backward_fake(tapped.select(dim, index), decoder)


def _keep_learned(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.index, ctx.dim = inputs[5:7]
    _keep(ctx, output, *inputs[:5])


def _decode_learned_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    loss_grad, tapped, *weights = ctx.saved_tensors
    grad = _logits_grad(grads[0], grads[3], loss_grad)
    to_tapped: Tensor | None = None
    to_weights: list[Tensor | None] = [None] * 4
    if grad is not None:
        channel, *to_weights = torch.ops.activemark_fast.decode_learned_backward(
            grad, tapped, *weights, ctx.index, ctx.dim
        )
        if ctx.needs_input_grad[0]:
            to_tapped = torch.zeros_like(tapped)
            to_tapped.select(ctx.dim, ctx.index).copy_(channel)
    return to_tapped, *to_weights, None, None, None, None


_decode_learned.register_fake(_decode_learned_fake)
_decode_learned_backward.register_fake(_decode_learned_backward_fake)
_decode_learned.register_autograd(_decode_learned_gradients, setup_context=_keep_learned)


def _fake_outputs(tapped: Tensor, images: int, bits: int) -> Outputs:
    dtype = compute_dtype(tapped)
    return (
        tapped.new_empty(images, bits, dtype=dtype),
        tapped.new_empty(images, words_for(bits), dtype=torch.int32),
        tapped.new_empty(images, dtype=torch.int32),
        tapped.new_empty(images, dtype=dtype),
        tapped.new_empty(images, bits, dtype=dtype),
    )


def _keep(ctx: Any, output: Outputs, *tensors: Tensor) -> None:
    """Keeps what the backward pass needs; the loss's gradient was computed with the loss."""
    ctx.mark_non_differentiable(output[1], output[2], output[4])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[4], *tensors)


def _logits_grad(to_logits: Tensor | None, to_loss: Tensor | None, loss_grad: Tensor) -> Tensor | None:
    """(images, bits), what logits and loss together pass back to the logits."""
    if to_loss is None:
        return to_logits
    through_loss = to_loss[:, None] * loss_grad
    return through_loss if to_logits is None else to_logits + through_loss
