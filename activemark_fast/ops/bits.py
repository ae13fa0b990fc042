"""Messages packed 32 bits to a word, as kernels read and write them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD_BITS = 32


def words_for(bits: int) -> int:
    """How many words hold `bits` bits."""
    return -(-bits // WORD_BITS)


def pack_bits(
    message: Tensor,  # (images, bits) of 0 and 1, any dtype
) -> Tensor:
    """(images, ceil(bits / 32)) int32: bit i is bit i % 32 of word i // 32, and what is left over is 0."""
    padded = pad(message.to(torch.int32), (0, -message.shape[1] % WORD_BITS))
    places = torch.arange(WORD_BITS, dtype=torch.int32, device=message.device)
    return (padded.unflatten(1, (-1, WORD_BITS)) << places).sum(dim=2, dtype=torch.int32)


def unpack_bits(
    words: Tensor,  # (images, ceil(bits / 32)) int32
    bits: int,
) -> Tensor:
    """(images, bits) int32 of 0 and 1."""
    places = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return (words[:, :, None] >> places & 1).flatten(1)[:, :bits]
