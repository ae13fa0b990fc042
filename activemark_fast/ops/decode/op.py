"""Reading messages off a residual stream: one call for every device.

On a CUDA device, in float32, float16 and bfloat16, Triton kernels run; everywhere else, and for float64, the
PyTorch reference. Both accumulate in at least float32, inside autocast too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from activemark_fast.ops.common import (
    AXES,
    Perceptron,
    check_channel,
    check_keyed,
    check_perceptron,
    check_stream,
    check_words,
)
from activemark_fast.ops.decode.reference import Outputs


class Decoded(NamedTuple):
    """What was read from each image, on the device of the residual stream."""

    logits: Tensor
    """(images, bits) float32 (float64 from a float64 stream); above 0 reads as 1."""
    words: Tensor
    """(images, ceil(bits / 32)) int32, the bits that were read, packed (`unpack_bits` takes them apart)."""
    errors: Tensor
    """(images,) int32, bits that are not as expected; a logit of 0 or NaN never is."""
    loss: Tensor
    """(images,) in the dtype of `logits`, mean over the bits of the binary cross-entropy between
    sharpness * logits and what was expected."""


def decode_keyed(
    tapped: Tensor,  # (2 * images, tokens, width)
    directions: Tensor,  # (bits, width)
    scale: Tensor,  # ()
    slots: Tensor,  # (slots,) int64
    expected: Tensor,  # (images, ceil(bits / 32)) int32
    sharpness: float = 1.0,
) -> Decoded:
    """Projects what the slots hold: logits = directions (h⁺ - h⁻), mean over the slots, over 2 scale.

    Args:
        tapped: Residual stream (2 * images, tokens, width) of a floating-point dtype, of any strides: the
            images with their messages, then with the complements.
        directions: (bits, width), P.
        scale: (), s: the logit of a projection of s is 1.
        slots: (slots,) int64, tokens. An index that is no token is an error on the CPU; on CUDA, where a look
            at it would hold up the device, it makes the logits NaN.
        expected: (images, ceil(bits / 32)) int32, the messages as `pack_bits` makes them.
        sharpness: Factor of the logits in the loss.

    Returns:
        See `Decoded`. Logits and loss are differentiable in `tapped`, once.

    Raises:
        TypeError, ValueError: an argument is not as described, or `directions` or `scale` needs a gradient.
    """
    check_stream("tapped", tapped)
    check_keyed(tapped, directions, scale, slots)
    images, odd = divmod(tapped.shape[0], 2)
    if odd:
        raise ValueError(f"tapped: wanted each image twice, got {tapped.shape[0]} images")
    check_words("expected", expected, images, directions.shape[0], tapped)
    outputs = _operators().decode_keyed(tapped, directions, scale, slots, expected, sharpness)
    return _decoded(outputs)


def decode_learned(
    tapped: Tensor,  # (images, tokens, width)
    decoder: Perceptron,  # length → bits
    index: int,
    axis: str,
    expected: Tensor,  # (images, ceil(bits / 32)) int32
    sharpness: float = 1.0,
) -> Decoded:
    """Runs the learned decoder on one channel c: logits = weight2 relu(weight1 c + bias1) + bias2.

    Args:
        tapped: Residual stream (images, tokens, width) of a floating-point dtype, of any strides.
        decoder: From length values, which is width or tokens, see `axis`, to bits logits.
        index: The channel's place on its axis.
        axis: "token": the channel holds the width values of a token; "channel": a value of each token.
        expected: (images, ceil(bits / 32)) int32, the messages as `pack_bits` makes them.
        sharpness: Factor of the logits in the loss.

    Returns:
        See `Decoded`. Logits and loss are differentiable in `tapped` and the decoder, once.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_stream("tapped", tapped)
    length = check_channel(tapped, index, axis)
    check_perceptron("decoder", decoder, length, -1, tapped)
    check_words("expected", expected, tapped.shape[0], decoder.weight2.shape[0], tapped)
    outputs = _operators().decode_learned(tapped, *decoder, index, AXES[axis], expected, sharpness)
    return _decoded(outputs)


def _decoded(outputs: Outputs) -> Decoded:
    logits, words, errors, loss, _ = outputs
    return Decoded(logits, words, errors, loss)


def _operators() -> Any:
    import activemark_fast.ops.decode.registration  # noqa: F401  # imports Triton, so not with the package

    return torch.ops.activemark_fast
