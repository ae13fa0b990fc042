"""The operators behind `op`, registered with PyTorch: schema, fake, gradients, and what runs where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from activemark_fast.ops.bits import words_for
from activemark_fast.ops.common import (
    GRADIENTS_SCHEMA,
    PERCEPTRON_SCHEMA,
    Perceptron,
    compute_dtype,
    perceptron_backward_fake,
)
from activemark_fast.ops.decode.reference import (
    Outputs,
    decode_keyed_backward_reference,
    decode_keyed_reference,
    decode_learned_backward_reference,
    decode_learned_reference,
)
from activemark_fast.ops.registry import in_triton, register, with_perceptron

_KEYED = "Tensor directions, Tensor scale, Tensor slots"
_LEARNED = f"{PERCEPTRON_SCHEMA}, int index, int dim"
_EXPECTED = "Tensor expected, float sharpness"
_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _outputs_fake(tapped: Tensor, images: int, bits: int) -> Outputs:
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


def _keyed_fake(tapped: Tensor, directions: Tensor, *_: Any) -> Outputs:
    return _outputs_fake(tapped, tapped.shape[0] // 2, directions.shape[0])


def _keep_keyed(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    tapped, directions, scale, slots, *_ = inputs
    ctx.tokens, ctx.dtype = tapped.shape[1], tapped.dtype
    _keep(ctx, output, directions, scale, slots)


def _keyed_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    loss_grad, directions, scale, slots = ctx.saved_tensors
    grad = _logits_grad(grads[0], grads[3], loss_grad)
    to_tapped = None
    if grad is not None:
        to_tapped = torch.ops.activemark_fast.decode_keyed_backward(
            grad, directions, scale, slots, ctx.tokens, ctx.dtype
        )
    return to_tapped, None, None, None, None, None


def _keyed_backward_fake(
    grad: Tensor, directions: Tensor, scale: Tensor, slots: Tensor, tokens: int, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(2 * grad.shape[0], tokens, directions.shape[1], dtype=dtype)


register(
    f"decode_keyed(Tensor tapped, {_KEYED}, {_EXPECTED}) -> {_OUTPUTS}",
    fake=_keyed_fake,
    reference=decode_keyed_reference,
    kernel=in_triton("decode", "decode_keyed"),
    backward=_keyed_gradients,
    keep=_keep_keyed,
)
register(
    f"decode_keyed_backward(Tensor grad, {_KEYED}, SymInt tokens, ScalarType dtype) -> Tensor",
    fake=_keyed_backward_fake,
    reference=decode_keyed_backward_reference,
    kernel=in_triton("decode", "decode_keyed_backward"),
)


def _of_the_channel(decode: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """`decode`, which takes a channel, taking the stream and where the channel is."""

    def run(
        tapped: Tensor, decoder: Perceptron, index: int, dim: int, expected: Tensor, sharpness: float
    ) -> Outputs:
        return decode(tapped.select(dim, index), decoder, expected, sharpness)

    return with_perceptron(run, 1)


def _learned_fake(tapped: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *_: Any) -> Outputs:
    return _outputs_fake(tapped, tapped.shape[0], weight2.shape[0])


def _keep_learned(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.index, ctx.dim = inputs[5:7]
    _keep(ctx, output, *inputs[:5])


def _learned_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
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


def _learned_backward(
    grad: Tensor, tapped: Tensor, decoder: Perceptron, index: int, dim: int
) -> tuple[Tensor, ...]:
    """Gradients to the channel of `tapped` and to the decoder: dense products, so they are PyTorch's."""
    to_channel, to_decoder = decode_learned_backward_reference(grad, tapped.select(dim, index), decoder)
    return to_channel, *to_decoder


def _learned_backward_fake(grad: Tensor, tapped: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *decoder, index, dim = rest
    return perceptron_backward_fake(tapped.select(dim, index), decoder)


register(
    f"decode_learned(Tensor tapped, {_LEARNED}, {_EXPECTED}) -> {_OUTPUTS}",
    fake=_learned_fake,
    reference=_of_the_channel(decode_learned_reference),
    kernel=_of_the_channel(in_triton("decode", "decode_learned")),
    backward=_learned_gradients,
    keep=_keep_learned,
)
register(
    f"decode_learned_backward(Tensor grad, Tensor tapped, {_LEARNED}) -> {GRADIENTS_SCHEMA}",
    fake=_learned_backward_fake,
    reference=with_perceptron(_learned_backward, 2),
)
