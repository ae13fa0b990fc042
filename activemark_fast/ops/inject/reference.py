"""The ground truth of the injection, in plain PyTorch: any floating-point dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from activemark_fast.ops.bits import unpack_bits
from activemark_fast.ops.common import (
    Perceptron,
    compute_dtype,
    in_full_precision,
    perceptron,
    perceptron_backward,
)


def inject_keyed_reference(
    stream: Tensor,  # (images, tokens, width)
    directions: Tensor,  # (bits, width): U
    scale: Tensor,  # (): s
    words: Tensor,  # (images, words) int32
    slots: Tensor,  # (slots,) int64
) -> Tensor:
    """Stream + s (2m - 1) U at the slots, and below it stream - s (2m - 1) U."""
    injected = stream.repeat(2, 1, 1)
    added = _added(stream, directions, scale, words)
    add_at_slots(injected, torch.cat([added, -added]), slots)
    return injected


def inject_keyed_inplace_reference(
    stream: Tensor, directions: Tensor, scale: Tensor, words: Tensor, slots: Tensor
) -> None:
    """The first of the two, into `stream`."""
    add_at_slots(stream, _added(stream, directions, scale, words), slots)


def _added(stream: Tensor, directions: Tensor, scale: Tensor, words: Tensor) -> Tensor:
    """What a slot gets, s (2m - 1) U: (images, width)."""
    dtype = compute_dtype(stream)
    signs = 2 * unpack_bits(words, len(directions)).to(dtype) - 1
    with in_full_precision(stream):
        return scale.to(dtype) * (signs @ directions.to(dtype))


def add_at_slots(
    stream: Tensor,  # (images, tokens, width), changed in place
    added: Tensor,  # (images, width), in the dtype that is computed in
    slots: Tensor,  # (slots,) int64
) -> None:
    """Adds one vector an image to all its slots, rounding once."""
    stream[:, slots] = (stream[:, slots] + added[:, None]).to(stream.dtype)


def inject_learned_reference(
    output: Tensor,  # (images, tokens, width)
    source: Tensor,  # (images, tokens, width)
    words: Tensor,  # (images, words) int32
    encoder: Perceptron,  # length + bits → length
    index: int,
    dim: int,
) -> Tensor:
    """A contiguous copy of `output` with channel `index` on dimension `dim` overwritten."""
    injected = output.clone(memory_format=torch.contiguous_format)
    inject_learned_inplace_reference(injected, source, words, encoder, index, dim)
    return injected


def inject_learned_inplace_reference(
    output: Tensor,  # (images, tokens, width), changed in place
    source: Tensor,  # (images, tokens, width)
    words: Tensor,  # (images, words) int32
    encoder: Perceptron,  # length + bits → length
    index: int,
    dim: int,
) -> None:
    """Overwrites channel `index` on dimension `dim`."""
    output.select(dim, index).copy_(encode_reference(source.select(dim, index), words, encoder)[2])


def encode_reference(
    channel: Tensor,  # (images, length)
    words: Tensor,  # (images, words) int32
    encoder: Perceptron,  # length + bits → length
) -> tuple[Tensor, Tensor, Tensor]:
    """The learned encoder: its input with the message beside it, its hidden layer, and what it writes."""
    message = unpack_bits(words, encoder.weight1.shape[1] - channel.shape[1])
    inputs = torch.cat([channel, message], dim=1).to(compute_dtype(channel))
    hidden, outputs = perceptron(inputs, encoder)
    return inputs, hidden, torch.sigmoid(outputs)


def encode_backward_reference(
    grad: Tensor,  # (images, length): of what was written
    channel: Tensor,  # (images, length)
    words: Tensor,  # (images, words) int32
    encoder: Perceptron,
) -> tuple[Tensor, Perceptron]:
    """Gradients to the channel and the encoder; the layers are computed once more."""
    inputs, hidden, encoded = encode_reference(channel, words, encoder)
    through_sigmoid = grad.to(inputs.dtype) * encoded * (1 - encoded)
    to_inputs, to_encoder = perceptron_backward(through_sigmoid, inputs, hidden, encoder)
    return to_inputs[:, : channel.shape[1]].to(channel.dtype).contiguous(), to_encoder
