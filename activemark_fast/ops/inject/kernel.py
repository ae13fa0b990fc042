"""Triton kernels of the injection, and their launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from activemark_fast.ops.common import Perceptron
from activemark_fast.ops.kernels import first_layer, is_slot, layer_blocks, second_layer

BLOCK_T = 32
BLOCK_D = 128
"""Tokens and channels that are copied at a time."""


@triton.jit
def signed_sum(words, image, directions, channel, width, bits, BLOCK_D: tl.constexpr):
    """(BLOCK_D,) float32, sum over the bits of (2m - 1) directions, at the channels given."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, bits, 32):
        place = tl.arange(0, 32)
        word = tl.load(words + image * ((bits + 31) // 32) + first // 32)
        sign = (((word >> place) & 1) * 2 - 1).to(tl.float32)
        rows = tl.load(
            directions + (first + place)[:, None] * width + channel[None, :],
            mask=(first + place < bits)[:, None] & (channel < width)[None, :],
            other=0.0,
        )
        total += tl.sum(sign[:, None] * rows.to(tl.float32), axis=0)
    return total


# No argument of a kernel is called `stream`: the launchers that torch.compile writes have one of that name.
@triton.jit
def inject_keyed_kernel(
    residual,  # (images, tokens, width), of any strides
    out,  # (2 * images, tokens, width), contiguous
    directions,  # (bits, width)
    scale,  # ()
    words,  # (images, ceil(bits / 32)) int32
    slots,  # (slot_count,) int64
    images,
    tokens,
    width,
    bits,
    slot_count,
    image_stride,
    token_stride,
    channel_stride,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b] = residual[b] + v and out[images + b] = residual[b] - v, where v = scale (2m - 1) directions.

    v is 0 at tokens that are no slots. A program copies `tiles` tiles of BLOCK_T tokens.
    """
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    added = tl.load(scale).to(tl.float32) * signed_sum(
        words, image, directions, channel, width, bits, BLOCK_D
    )
    for tile in range(0, tiles):
        token = (tl.program_id(1) * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (token < tokens)[:, None] & (channel < width)[None, :]
        x = tl.load(
            residual
            + image * image_stride
            + token.to(tl.int64)[:, None] * token_stride
            + channel[None, :] * channel_stride,
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        v = is_slot(token, slots, slot_count, BLOCK_T).to(tl.float32)[:, None] * added[None, :]
        at = (image * tokens + token[:, None]) * width + channel[None, :]
        tl.store(out + at, (x + v).to(out.dtype.element_ty), mask=inside)
        at = ((image + images) * tokens + token[:, None]) * width + channel[None, :]
        tl.store(out + at, (x - v).to(out.dtype.element_ty), mask=inside)


@triton.jit
def inject_keyed_inplace_kernel(
    residual,  # (images, tokens, width), of any strides
    directions,  # (bits, width)
    scale,  # ()
    words,  # (images, ceil(bits / 32)) int32
    slots,  # (slot_count,) int64
    tokens,
    width,
    bits,
    slot_count,
    image_stride,
    token_stride,
    channel_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """residual[b, slot] += scale (2m - 1) directions, at every slot."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    added = tl.load(scale).to(tl.float32) * signed_sum(
        words, image, directions, channel, width, bits, BLOCK_D
    )
    for first in range(0, slot_count, BLOCK_T):
        place = first + tl.arange(0, BLOCK_T)
        token = tl.load(slots + place, mask=place < slot_count, other=-1)
        inside = ((token >= 0) & (token < tokens))[:, None] & (channel < width)[None, :]
        at = (
            residual
            + image * image_stride
            + token[:, None] * token_stride
            + channel[None, :] * channel_stride
        )
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (x + added[None, :]).to(residual.dtype.element_ty), mask=inside)


@triton.jit
def encode_kernel(
    hidden,  # (images, units) float32
    weight,  # (length, units)
    bias,  # (length,)
    residual,  # (images, tokens, width), of any strides; read only where COPY
    out,  # (images, tokens, width), of any strides
    images,
    tokens,
    width,
    units,
    index,
    image_stride,
    token_stride,
    channel_stride,
    out_image_stride,
    out_token_stride,
    out_channel_stride,
    DIM: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One channel of out = sigmoid(weight hidden + bias); where COPY, the rest = residual.

    The first programs compute, the others copy. No two write to the same place.
    """
    length = width if DIM == 1 else tokens
    layer_programs = tl.cdiv(images, BLOCK_B) * tl.cdiv(length, BLOCK_O)
    program = tl.program_id(0)
    if program < layer_programs:
        # Programs that follow one another share a tile of the weights.
        image = (program % tl.cdiv(images, BLOCK_B) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
        value = program // tl.cdiv(images, BLOCK_B) * BLOCK_O + tl.arange(0, BLOCK_O)
        total = second_layer(
            hidden, weight, bias, image, value, images, length, units, BLOCK_B, BLOCK_O, BLOCK_K
        )
        encoded = 1.0 / (1.0 + tl.exp(-total))
        if DIM == 1:
            at = index * out_token_stride + value.to(tl.int64) * out_channel_stride
        else:
            at = index * out_channel_stride + value.to(tl.int64) * out_token_stride
        tl.store(
            out + image[:, None] * out_image_stride + at[None, :],
            encoded.to(out.dtype.element_ty),
            mask=(image < images)[:, None] & (value < length)[None, :],
        )
    elif COPY:
        tile = program - layer_programs
        row = (tile // tl.cdiv(width, BLOCK_D)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        row_image = row // tokens
        row_token = row % tokens
        channel = tile % tl.cdiv(width, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
        others = (row_token != index)[:, None] if DIM == 1 else (channel != index)[None, :]
        copied = (row_image < images)[:, None] & (channel < width)[None, :] & others
        x = tl.load(
            residual
            + (row_image * image_stride + row_token * token_stride)[:, None]
            + channel[None, :] * channel_stride,
            mask=copied,
            other=0.0,
        )
        tl.store(
            out
            + (row_image * out_image_stride + row_token * out_token_stride)[:, None]
            + channel[None, :] * out_channel_stride,
            x,
            mask=copied,
        )


def inject_keyed(stream: Tensor, directions: Tensor, scale: Tensor, words: Tensor, slots: Tensor) -> Tensor:
    """See `op.inject_keyed`."""
    images, tokens, width = stream.shape
    out = torch.empty(2 * images, tokens, width, dtype=stream.dtype, device=stream.device)
    if out.numel() == 0:
        return out
    # A program reads all directions at its channels: with many images it uses them for more tokens.
    tiles = 1 if images < 16 else min(4, triton.cdiv(tokens, BLOCK_T))
    grid = (images, triton.cdiv(tokens, tiles * BLOCK_T), triton.cdiv(width, BLOCK_D))
    wrap_triton(inject_keyed_kernel)[grid](
        stream,
        out,
        directions.contiguous(),
        scale,
        words.contiguous(),
        slots.contiguous(),
        images,
        tokens,
        width,
        directions.shape[0],
        slots.shape[0],
        *stream.stride(),
        tiles,
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return out


def inject_keyed_inplace(
    stream: Tensor, directions: Tensor, scale: Tensor, words: Tensor, slots: Tensor
) -> None:
    """See `op.inject_keyed_`."""
    images, tokens, width = stream.shape
    if stream.numel() == 0:
        return
    wrap_triton(inject_keyed_inplace_kernel)[(images, triton.cdiv(width, BLOCK_D))](
        stream,
        directions.contiguous(),
        scale,
        words.contiguous(),
        slots.contiguous(),
        tokens,
        width,
        directions.shape[0],
        slots.shape[0],
        *stream.stride(),
        BLOCK_T=16,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )


def inject_learned(
    output: Tensor, source: Tensor, words: Tensor, encoder: Perceptron, index: int, dim: int
) -> Tensor:
    """See `op.inject_learned`: a launch for each layer, as the second needs all of the first."""
    out = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    _encode(output, out, source, words, encoder, index, dim, copy=True)
    return out


def inject_learned_inplace(
    output: Tensor, source: Tensor, words: Tensor, encoder: Perceptron, index: int, dim: int
) -> None:
    """See `op.inject_learned_`."""
    _encode(output, output, source, words, encoder, index, dim, copy=False)


def _encode(
    stream: Tensor,
    out: Tensor,
    source: Tensor,
    words: Tensor,
    encoder: Perceptron,
    index: int,
    dim: int,
    copy: bool,
) -> None:
    if stream.numel() == 0:
        return
    images, tokens, width = stream.shape
    weight1, bias1, weight2, bias2 = (tensor.contiguous() for tensor in encoder)
    hidden = first_layer(source.select(dim, index), words.contiguous(), weight1, bias1)
    blocks = layer_blocks(images)
    length, units = weight2.shape
    programs = triton.cdiv(images, blocks["BLOCK_B"]) * triton.cdiv(length, blocks["BLOCK_O"])
    if copy:
        programs += triton.cdiv(images * tokens, BLOCK_T) * triton.cdiv(width, BLOCK_D)
    wrap_triton(encode_kernel)[(programs,)](
        hidden,
        weight2,
        bias2,
        stream,
        out,
        images,
        tokens,
        width,
        units,
        index,
        *stream.stride(),
        *out.stride(),
        DIM=dim,
        COPY=copy,
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        **blocks,
    )
