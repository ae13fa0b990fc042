"""Device functions and the kernel that more than one op uses.

All of them load in the dtype of the tensor, compute in float32 and round on the store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton


@triton.jit
def is_slot(token, slots, slot_count, BLOCK_T: tl.constexpr):
    """(BLOCK_T,) int32: 1 where `token` is one of the slots."""
    found = tl.zeros((BLOCK_T,), tl.int32)
    for first in range(0, slot_count, 32):
        place = first + tl.arange(0, 32)
        slot = tl.load(slots + place, mask=place < slot_count, other=-1)
        found = tl.maximum(found, tl.max((token[:, None] == slot[None, :]).to(tl.int32), axis=1))
    return found


@triton.jit
def second_layer(
    hidden,  # (images, units) float32
    weight,  # (outputs, units)
    bias,  # (outputs,)
    image,  # (BLOCK_B,) int64
    output,  # (BLOCK_O,)
    images,
    outputs,
    units,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_B, BLOCK_O) float32, weight hidden + bias, of these images and outputs."""
    total = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for first in range(0, units, BLOCK_K):
        unit = first + tl.arange(0, BLOCK_K)
        h = tl.load(
            hidden + image[:, None] * units + unit[None, :],
            mask=(image < images)[:, None] & (unit < units)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + output[None, :] * units + unit[:, None],
            mask=(output < outputs)[None, :] & (unit < units)[:, None],
            other=0.0,
        )
        total = tl.dot(h, w.to(tl.float32), total, input_precision="tf32x3")
    return total + tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]


@triton.jit
def first_layer_kernel(
    channel,  # (images, length), of any strides
    words,  # (images, ceil(bits / 32)) int32; not read where bits = 0
    weight,  # (units, length + bits)
    bias,  # (units,)
    hidden,  # out: (images, units) float32
    images,
    length,
    bits,
    units,
    image_stride,
    value_stride,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Hidden = relu(weight [channel, message] + bias), and the two are never put side by side."""
    image = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    unit = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = length + bits
    total = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for first in range(0, length, BLOCK_K):
        value = first + tl.arange(0, BLOCK_K)
        x = tl.load(
            channel + image[:, None] * image_stride + value[None, :] * value_stride,
            mask=(image < images)[:, None] & (value < length)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + unit[None, :] * columns + value[:, None],
            mask=(unit < units)[None, :] & (value < length)[:, None],
            other=0.0,
        )
        total = tl.dot(x.to(tl.float32), w.to(tl.float32), total, input_precision="tf32x3")
    for first in range(0, bits, 32):
        place = tl.arange(0, 32)
        word = tl.load(words + image * ((bits + 31) // 32) + first // 32, mask=image < images, other=0)
        message = (word[:, None] >> place[None, :]) & 1
        w = tl.load(
            weight + unit[None, :] * columns + length + (first + place)[:, None],
            mask=(unit < units)[None, :] & (first + place < bits)[:, None],
            other=0.0,
        )
        total = tl.dot(message.to(tl.float32), w.to(tl.float32), total, input_precision="tf32x3")
    total += tl.load(bias + unit, mask=unit < units, other=0.0).to(tl.float32)[None, :]
    tl.store(
        hidden + image[:, None] * units + unit[None, :],
        tl.maximum(total, 0.0),
        mask=(image < images)[:, None] & (unit < units)[None, :],
    )


def layer_blocks(images: int) -> dict[str, int]:
    """Launch configuration of a layer: a tile of images by outputs, and of the values that are summed.

    Few images: narrow tiles, so that many programs share the weights out among them and each has several
    loads under way. Many: tiles that use a weight more often.
    """
    if images <= 64:
        return {"BLOCK_B": 16, "BLOCK_O": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 5}
    return {"BLOCK_B": 64, "BLOCK_O": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4}


def first_layer(
    channel: Tensor,  # (images, length)
    words: Tensor,  # (images, ceil(bits / 32)) int32, anything where there is no message
    weight: Tensor,  # (units, length + bits)
    bias: Tensor,  # (units,)
) -> Tensor:
    """(images, units) float32, relu(weight [channel, message] + bias)."""
    images, length = channel.shape
    units, columns = weight.shape
    blocks = layer_blocks(images)
    hidden = torch.empty(images, units, dtype=torch.float32, device=channel.device)
    grid = (triton.cdiv(images, blocks["BLOCK_B"]), triton.cdiv(units, blocks["BLOCK_O"]))
    wrap_triton(first_layer_kernel)[grid](
        channel,
        words,
        weight,
        bias,
        hidden,
        images,
        length,
        columns - length,
        units,
        *channel.stride(),
        **blocks,
    )
    return hidden
