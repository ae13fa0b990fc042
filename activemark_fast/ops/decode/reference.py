"""The ground truth of the decoding, in plain PyTorch: any floating-point dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from activemark_fast.ops.bits import pack_bits, unpack_bits
from activemark_fast.ops.common import (
    Perceptron,
    compute_dtype,
    in_full_precision,
    perceptron,
    perceptron_backward,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""logits (images, bits); words (images, words) int32; bit errors (images,) int32; the loss of each image
(images,); its gradient to the logits (images, bits)."""


def decode_keyed_reference(
    tapped: Tensor,  # (2 * images, tokens, width)
    directions: Tensor,  # (bits, width): P
    scale: Tensor,  # (): s
    slots: Tensor,  # (slots,) int64
    expected: Tensor,  # (images, words) int32
    sharpness: float,
) -> Outputs:
    """P (h⁺ - h⁻), mean over the slots, over 2 s."""
    dtype = compute_dtype(tapped)
    plus, minus = tapped[:, slots].sum(dim=1, dtype=dtype).chunk(2)
    with in_full_precision(tapped):
        logits = (plus - minus) @ directions.to(dtype).T / (2 * len(slots) * scale.to(dtype))
    return with_loss(logits, expected, sharpness)


def decode_keyed_backward_reference(
    grad: Tensor,  # (images, bits): of the logits
    directions: Tensor,  # (bits, width)
    scale: Tensor,  # ()
    slots: Tensor,  # (slots,) int64
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient to `tapped`, in `dtype`: ± g P over 2 s slots at every slot, 0 elsewhere."""
    with in_full_precision(grad):
        each = grad @ directions.to(grad.dtype) / (2 * len(slots) * scale.to(grad.dtype))
    each = torch.cat([each, -each])
    tapped = torch.zeros(len(each), tokens, each.shape[1], dtype=dtype, device=grad.device)
    tapped[:, slots] = each[:, None].to(dtype)
    return tapped


def decode_learned_reference(
    channel: Tensor,  # (images, length)
    decoder: Perceptron,  # length → bits
    expected: Tensor,  # (images, words) int32
    sharpness: float,
) -> Outputs:
    """The learned decoder's two layers."""
    _, logits = perceptron(channel.to(compute_dtype(channel)), decoder)
    return with_loss(logits, expected, sharpness)


def decode_learned_backward_reference(
    grad: Tensor,  # (images, bits): of the logits
    channel: Tensor,  # (images, length)
    decoder: Perceptron,  # length → bits
) -> tuple[Tensor, Perceptron]:
    """Gradients to the channel and the decoder; the layers are computed once more."""
    inputs = channel.to(compute_dtype(channel))
    hidden, _ = perceptron(inputs, decoder)
    to_channel, to_decoder = perceptron_backward(grad.to(inputs.dtype), inputs, hidden, decoder)
    return to_channel.to(channel.dtype), to_decoder


def with_loss(
    logits: Tensor,  # (images, bits)
    expected: Tensor,  # (images, words) int32
    sharpness: float,
) -> Outputs:
    """Threshold, bit errors, binary cross-entropy of sharpness * logits (mean over the bits), its gradient.

    A logit that is neither above nor below 0 is an error, whatever is expected.
    """
    bits = logits.shape[1]
    signs = 2 * unpack_bits(expected, bits).to(logits.dtype) - 1
    margins = signs * logits
    # The loss from the margin, not from logit and target: nothing cancels where a bit is read safely.
    loss = softplus(-sharpness * margins).mean(dim=1)
    loss_grad = -signs * torch.sigmoid(-sharpness * margins) * (sharpness / bits)
    errors = (~(margins > 0)).sum(dim=1, dtype=torch.int32)
    return logits, pack_bits(logits > 0), errors, loss, loss_grad
