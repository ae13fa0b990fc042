"""Writing messages into a residual stream: one call for every device.

On a CUDA device, in float32, float16 and bfloat16, Triton kernels run; everywhere else, and for float64, the
PyTorch reference. Both accumulate in at least float32, inside autocast too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from activemark_fast.ops.common import (
    AXES,
    Perceptron,
    check_channel,
    check_keyed,
    check_perceptron,
    check_stream,
    check_tensor,
    check_words,
)


def inject_keyed(
    stream: Tensor,  # (images, tokens, width)
    directions: Tensor,  # (bits, width)
    scale: Tensor,  # ()
    words: Tensor,  # (images, ceil(bits / 32)) int32
    slots: Tensor,  # (slots,) int64
) -> Tensor:
    """`stream` twice, with v = scale * (2m - 1) * directions added at every slot, and with v taken away.

    Args:
        stream: Residual stream (images, tokens, width) of a floating-point dtype, of any strides.
        directions: (bits, width), U.
        scale: (), s.
        words: (images, ceil(bits / 32)) int32, the messages m as `pack_bits` makes them.
        slots: (slots,) int64, tokens, each at most once. An index that is no token is an error on the CPU;
            on CUDA, where looking at it would hold up the device, nothing is added there.

    Returns:
        (2 * images, tokens, width) in the dtype of `stream`, contiguous: the images with their messages, then
        with the complements. Differentiable in `stream`.

    Raises:
        TypeError, ValueError: an argument is not as described, or `directions` or `scale` needs a gradient.
    """
    _check_keyed(stream, directions, scale, words, slots)
    return _operators().inject_keyed(stream, directions, scale, words, slots)


def inject_keyed_(
    stream: Tensor,  # (images, tokens, width)
    directions: Tensor,  # (bits, width)
    scale: Tensor,  # ()
    words: Tensor,  # (images, ceil(bits / 32)) int32
    slots: Tensor,  # (slots,) int64
) -> Tensor:
    """Adds v (see `inject_keyed`) to `stream` itself, which is returned; not differentiable."""
    _check_keyed(stream, directions, scale, words, slots)
    _check_inplace("stream", stream)
    _operators().inject_keyed_(stream, directions, scale, words, slots)
    return stream


def inject_learned(
    output: Tensor,  # (images, tokens, width)
    source: Tensor,  # (images, tokens, width)
    words: Tensor,  # (images, ceil(bits / 32)) int32
    encoder: Perceptron,  # length + bits → length
    index: int,
    axis: str,
) -> Tensor:
    """A copy of `output`, one channel of which is replaced by an encoding of the same channel of `source`.

    With c the channel and m the message: sigmoid(weight2 relu(weight1 [c, m] + bias1) + bias2).

    Args:
        output: Residual stream (images, tokens, width) of a floating-point dtype, of any strides.
        source: The same shape and dtype, the input of the block that `output` comes from.
        words: (images, ceil(bits / 32)) int32, the messages as `pack_bits` makes them.
        encoder: From length + bits values, where length is width or tokens, see `axis`, to length values.
        index: The channel's place on its axis.
        axis: "token": the channel holds the width values of a token; "channel": a value of each token.

    Returns:
        (images, tokens, width) in the dtype of `output`, contiguous. Differentiable in `output`, `source` and
        the encoder.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_learned(output, source, words, encoder, index, axis)
    return _operators().inject_learned(output, source, words, *encoder, index, AXES[axis])


def inject_learned_(
    output: Tensor,  # (images, tokens, width)
    source: Tensor,  # (images, tokens, width)
    words: Tensor,  # (images, ceil(bits / 32)) int32
    encoder: Perceptron,  # length + bits → length
    index: int,
    axis: str,
) -> Tensor:
    """`inject_learned` into `output` itself, which is returned; `source` may be `output`; no gradients."""
    _check_learned(output, source, words, encoder, index, axis)
    _check_inplace("output", output)
    for name, tensor in zip(("source", *Perceptron._fields), (source, *encoder), strict=True):
        _check_no_gradient(name, tensor)
    _operators().inject_learned_(output, source, words, *encoder, index, AXES[axis])
    return output


def _check_keyed(stream: Tensor, directions: Tensor, scale: Tensor, words: Tensor, slots: Tensor) -> None:
    check_stream("stream", stream)
    check_keyed(stream, directions, scale, slots)
    check_words("words", words, stream.shape[0], directions.shape[0], stream)


def _check_learned(
    output: Tensor, source: Tensor, words: Tensor, encoder: Perceptron, index: int, axis: str
) -> None:
    check_stream("output", output)
    check_tensor("source", source, output.shape, output.dtype, output.device)
    length = check_channel(output, index, axis)
    check_perceptron("encoder", encoder, -1, length, output)
    bits = encoder.weight1.shape[1] - length
    if bits < 1:
        raise ValueError(
            f"encoder.weight1: wanted more than {length} columns, the last ones for the message, got "
            f"{encoder.weight1.shape[1]}"
        )
    check_words("words", words, output.shape[0], bits, output)


def _check_inplace(name: str, stream: Tensor) -> None:
    _check_no_gradient(name, stream)
    if any(size > 1 and stride == 0 for size, stride in zip(stream.shape, stream.stride(), strict=True)):
        raise ValueError(
            f"{name}: wanted a place in memory for every value, got an expanded tensor of strides "
            f"{stream.stride()}"
        )


def _check_no_gradient(name: str, tensor: Tensor) -> None:
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name}: wanted a tensor that needs no gradient, for there is none in place")


def _operators() -> Any:
    import activemark_fast.ops.inject.registration  # noqa: F401  # imports Triton, so not with the package

    return torch.ops.activemark_fast
