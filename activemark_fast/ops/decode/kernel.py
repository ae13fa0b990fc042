"""Triton kernels of the decoding, and their launchers.

Long, for forward and backward of one op have their parts in common.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from activemark_fast.ops.bits import WORD_BITS, words_for
from activemark_fast.ops.common import Perceptron
from activemark_fast.ops.kernels import first_layer, is_slot, second_layer

BLOCK_T = 32
BLOCK_D = 128
"""Tokens and channels of a gradient that are written at a time."""
PART = 64
"""Channels of an image that a program of `decode_keyed_partial_kernel` reads."""


@triton.jit
def expected_signs(
    expected,  # (images, words) int32
    image,  # (BLOCK_B,) int64
    bit,  # (BLOCK_M,) int32
    images,
    bits,
):
    """(BLOCK_B, BLOCK_M) float32: 1 where a 1 is expected and -1 where a 0 is."""
    at = image[:, None] * ((bits + 31) // 32) + (bit // 32)[None, :]
    word = tl.load(expected + at, mask=(image < images)[:, None] & (bit < bits)[None, :], other=0)
    return (((word >> (bit % 32)[None, :]) & 1) * 2 - 1).to(tl.float32)


@triton.jit
def with_loss(
    logits,  # (BLOCK_B, BLOCK_M) float32
    sign,  # (BLOCK_B, BLOCK_M) float32: `expected_signs`
    image,  # (BLOCK_B,) int64
    bit,  # (BLOCK_M,) int32: 0 ... BLOCK_M - 1
    logits_out,  # (images, bits) float32
    words_out,  # (images, words) int32
    errors_out,  # (images,) int32
    loss_out,  # (images,) float32
    loss_grad_out,  # (images, bits) float32
    images,
    bits,
    sharpness,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Stores logits and packed bits, and how they compare with what is expected.

    With y = sharpness * logit, its sign turned where a 0 is expected: loss = mean log(1 + exp(-y)).
    """
    word_count = (bits + 31) // 32
    known = image < images
    inside = known[:, None] & (bit < bits)[None, :]
    at = image[:, None] * bits + bit[None, :]
    tl.store(logits_out + at, logits, mask=inside)
    places = tl.where((logits > 0) & inside, 1 << (bit % 32)[None, :], 0)
    packed = tl.sum(tl.reshape(places, (BLOCK_B, BLOCK_M // 32, 32)), axis=2)
    word = tl.arange(0, BLOCK_M // 32)
    tl.store(
        words_out + image[:, None] * word_count + word[None, :],
        packed,
        mask=known[:, None] & (word < word_count)[None, :],
    )
    # Neither 0 nor NaN is above 0, so both are errors.
    right = sign * logits > 0
    # Counted in float32: of a sum of booleans, LLVM makes a population count through the stack.
    wrong_bits = tl.sum(tl.where(inside & ~right, 1.0, 0.0), axis=1)
    tl.store(errors_out + image, wrong_bits.to(tl.int32), mask=known)
    y = sharpness * sign * logits
    e = tl.exp(-tl.abs(y))
    # log(1 + e) where 1 + e rounds: its error cancels in the quotient.
    rounded = 1.0 + e
    exact = rounded == 1.0
    log1p = tl.where(exact, e, tl.log(rounded) * (e / tl.where(exact, 1.0, rounded - 1.0)))
    loss = tl.where(inside, tl.maximum(-y, 0.0) + log1p, 0.0)
    tl.store(loss_out + image, tl.sum(loss, axis=1) / bits, mask=known)
    wrong = tl.where(y > 0, e, 1.0) / rounded
    tl.store(loss_grad_out + at, -sign * wrong * (sharpness / bits), mask=inside)


@triton.jit
def decode_keyed_partial_kernel(
    tapped,  # (2 * images, tokens, width), of any strides
    directions,  # (bits, width)
    slots,  # (slot_count,) int64
    partials,  # out: (images, parts, bits) float32
    images,
    tokens,
    width,
    bits,
    slot_count,
    parts,
    image_stride,
    token_stride,
    channel_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Partials = directions (sum of tapped[b] - tapped[images + b] over the slots), over BLOCK_D channels.

    A program reads these channels of an image. It subtracts the passes before it sums, so equal passes give
    exactly 0, and passes that are swapped exactly the opposite.
    """
    # The parts of an image follow one another: whole rows are read at about the same time.
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    channel = part * BLOCK_D + tl.arange(0, BLOCK_D)
    bit = tl.arange(0, BLOCK_M)
    difference = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for start in range(0, slot_count, BLOCK_S):
        place = start + tl.arange(0, BLOCK_S)
        token = tl.load(slots + place, mask=place < slot_count, other=0)
        there = (token >= 0) & (token < tokens)
        inside = ((place < slot_count) & there)[:, None] & (channel < width)[None, :]
        at = tapped + token[:, None] * token_stride + channel[None, :] * channel_stride
        # A slot that is no token must not read as a mark that is not there.
        nothing = tl.where(there, 0.0, float("nan"))[:, None]
        plus = tl.load(at + image * image_stride, mask=inside, other=0.0)
        minus = tl.load(at + (image + images) * image_stride, mask=inside, other=0.0)
        difference += plus.to(tl.float32) - minus.to(tl.float32) + nothing
    rows = tl.load(
        directions + bit[:, None] * width + channel[None, :],
        mask=(bit < bits)[:, None] & (channel < width)[None, :],
        other=0.0,
    )
    partial = tl.sum(rows.to(tl.float32) * tl.sum(difference, axis=0)[None, :], axis=1)
    tl.store(partials + (image * parts + part) * bits + bit, partial, mask=bit < bits)


@triton.jit
def decode_keyed_reduce_kernel(
    partials,  # (images, parts, bits) float32
    scale,  # ()
    expected,  # (images, words) int32
    logits_out,
    words_out,
    errors_out,
    loss_out,
    loss_grad_out,
    images,
    bits,
    slot_count,
    parts,
    sharpness,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Logits = sum of the partials / (2 slots scale). A program reads an image."""
    image = tl.program_id(0) + tl.zeros((1,), tl.int64)
    bit = tl.arange(0, BLOCK_M)
    sign = expected_signs(expected, image, bit, images, bits)
    divisor = 2 * slot_count * tl.load(scale).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        total += tl.load(
            partials + (image * parts + part)[:, None] * bits + bit[None, :],
            mask=(part < parts)[:, None] & (bit < bits)[None, :],
            other=0.0,
        )
    with_loss(
        (tl.sum(total, axis=0) / divisor)[None, :],
        sign,
        image,
        bit,
        logits_out,
        words_out,
        errors_out,
        loss_out,
        loss_grad_out,
        images,
        bits,
        sharpness,
        1,
        BLOCK_M,
    )


@triton.jit
def decode_keyed_backward_kernel(
    grad,  # (images, bits) float32
    directions,  # (bits, width)
    scale,  # ()
    slots,  # (slot_count,) int64
    out,  # (2 * images, tokens, width), contiguous
    images,
    tokens,
    width,
    bits,
    slot_count,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b] = grad directions / (2 slots scale) at the slots and 0 elsewhere, out[images + b] = -out[b]."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    each = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, bits, 32):
        bit = first + tl.arange(0, 32)
        g = tl.load(grad + image * bits + bit, mask=bit < bits, other=0.0)
        rows = tl.load(
            directions + bit[:, None] * width + channel[None, :],
            mask=(bit < bits)[:, None] & (channel < width)[None, :],
            other=0.0,
        )
        each += tl.sum(g[:, None] * rows.to(tl.float32), axis=0)
    each = each / (2 * slot_count * tl.load(scale).to(tl.float32))
    for tile in range(0, tiles):
        token = (tl.program_id(1) * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (token < tokens)[:, None] & (channel < width)[None, :]
        found = is_slot(token, slots, slot_count, BLOCK_T) > 0
        values = tl.where(found[:, None], each[None, :], 0.0)
        at = (image * tokens + token[:, None]) * width + channel[None, :]
        tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)
        at = ((image + images) * tokens + token[:, None]) * width + channel[None, :]
        tl.store(out + at, (-values).to(out.dtype.element_ty), mask=inside)


@triton.jit
def decode_learned_kernel(
    hidden,  # (images, units) float32
    weight,  # (bits, units)
    bias,  # (bits,)
    expected,  # (images, words) int32
    logits_out,
    words_out,
    errors_out,
    loss_out,
    loss_grad_out,
    images,
    units,
    bits,
    sharpness,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits = weight hidden + bias. A program reads BLOCK_B images."""
    image = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    bit = tl.arange(0, BLOCK_M)
    logits = second_layer(hidden, weight, bias, image, bit, images, bits, units, BLOCK_B, BLOCK_M, BLOCK_K)
    sign = expected_signs(expected, image, bit, images, bits)
    with_loss(
        logits,
        sign,
        image,
        bit,
        logits_out,
        words_out,
        errors_out,
        loss_out,
        loss_grad_out,
        images,
        bits,
        sharpness,
        BLOCK_B,
        BLOCK_M,
    )


def decode_keyed(
    tapped: Tensor,
    directions: Tensor,
    scale: Tensor,
    slots: Tensor,
    expected: Tensor,
    sharpness: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `op.decode_keyed`. Many programs read an image, as a few images must fill a GPU too.

    A second launch adds up what they found. A counter that tells a program that it is the last would need
    zeroing, which is a launch as well.
    """
    images, tokens, width = tapped.shape[0] // 2, *tapped.shape[1:]
    bits = directions.shape[0]
    outputs = _outputs(tapped, images, bits)
    if images == 0:
        return outputs
    block_m = _block_of_bits(bits)
    # Of the width alone: an image's logits are the same in every batch.
    parts = triton.cdiv(width, PART)
    partials = torch.empty(images, parts, bits, dtype=torch.float32, device=tapped.device)
    wrap_triton(decode_keyed_partial_kernel)[(images * parts,)](
        tapped,
        directions.contiguous(),
        slots.contiguous(),
        partials,
        images,
        tokens,
        width,
        bits,
        slots.shape[0],
        parts,
        *tapped.stride(),
        BLOCK_S=64,
        BLOCK_D=PART,
        BLOCK_M=block_m,
        num_warps=max(4, block_m // 64),
    )
    wrap_triton(decode_keyed_reduce_kernel)[(images,)](
        partials,
        scale,
        expected.contiguous(),
        *outputs,
        images,
        bits,
        slots.shape[0],
        parts,
        sharpness,
        BLOCK_P=16,
        BLOCK_M=block_m,
        num_warps=max(1, block_m // 64),
    )
    return outputs


def decode_keyed_backward(
    grad: Tensor,
    directions: Tensor,
    scale: Tensor,
    slots: Tensor,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of `decode_keyed` to `tapped`, (2 * images, tokens, width) in `dtype`."""
    images, bits = grad.shape
    width = directions.shape[1]
    out = torch.empty(2 * images, tokens, width, dtype=dtype, device=grad.device)
    if out.numel() == 0:
        return out
    tiles = 1 if images < 16 else min(4, triton.cdiv(tokens, BLOCK_T))
    grid = (images, triton.cdiv(tokens, tiles * BLOCK_T), triton.cdiv(width, BLOCK_D))
    wrap_triton(decode_keyed_backward_kernel)[grid](
        grad.contiguous(),
        directions.contiguous(),
        scale,
        slots.contiguous(),
        out,
        images,
        tokens,
        width,
        bits,
        slots.shape[0],
        tiles,
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return out


def decode_learned(
    channel: Tensor, decoder: Perceptron, expected: Tensor, sharpness: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `op.decode_learned`: a launch for each layer, as the second needs all of the first."""
    images = channel.shape[0]
    weight1, bias1, weight2, bias2 = (tensor.contiguous() for tensor in decoder)
    bits, units = weight2.shape
    outputs = _outputs(channel, images, bits)
    if images == 0:
        return outputs
    block_m = _block_of_bits(bits)
    hidden = first_layer(channel, outputs[1], weight1, bias1)
    wrap_triton(decode_learned_kernel)[(triton.cdiv(images, 16),)](
        hidden,
        weight2,
        bias2,
        expected.contiguous(),
        *outputs,
        images,
        units,
        bits,
        sharpness,
        BLOCK_B=16,
        BLOCK_M=block_m,
        BLOCK_K=32,
        num_warps=4 if block_m <= 64 else 8,
        num_stages=3,
    )
    return outputs


def _block_of_bits(bits: int) -> int:
    """The smallest power of two that holds all bits and whole words."""
    return max(WORD_BITS, triton.next_power_of_2(bits))


def _outputs(stream: Tensor, images: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, words, errors, loss and its gradient."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=stream.device)

    return (
        empty(images, bits),
        empty(images, words_for(bits), dtype=torch.int32),
        empty(images, dtype=torch.int32),
        empty(images),
        empty(images, bits),
    )
