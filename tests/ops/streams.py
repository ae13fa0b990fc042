"""Arguments of the ops on residual streams, made from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from activemark_fast.ops.bits import pack_bits
from activemark_fast.ops.common import Perceptron


@dataclass(frozen=True)
class Sizes:
    images: int
    tokens: int
    width: int
    bits: int
    hidden: int
    slots: tuple[int, ...]
    index: int

    def length(self, axis: str) -> int:
        return self.width if axis == "token" else self.tokens


SIZES = [
    Sizes(1, 5, 64, 8, 20, (0,), 4),
    Sizes(3, 37, 100, 33, 70, (1, 4, 36), 0),
    Sizes(2, 9, 123, 256, 33, (8, 2), 5),
    Sizes(17, 40, 65, 32, 20, (1, 39), 2),
    Sizes(65, 3, 70, 32, 40, (1,), 1),
]
LARGE = Sizes(1, 70, 1664, 100, 129, tuple(range(1, 70, 3)), 60)


class Arguments:
    """Random tensors of these sizes: activations in `dtype`, what belongs to a codec in `codec_dtype`."""

    def __init__(
        self,
        sizes: Sizes,
        dtype: torch.dtype,
        device: str = "cpu",
        codec_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.sizes = sizes
        self._dtype, self._device, self._codec_dtype = dtype, device, codec_dtype
        self._generator = torch.Generator().manual_seed(seed)
        self.message = torch.randint(
            0, 2, (sizes.images, sizes.bits), generator=self._generator, dtype=torch.uint8
        ).to(device)
        self.words = pack_bits(self.message)
        self.directions = self._codec(sizes.bits, sizes.width, scale=sizes.width**-0.5)
        self.scale = torch.tensor(0.7, dtype=codec_dtype, device=device)
        self.slots = torch.tensor(sizes.slots, device=device)

    def _codec(self, *shape: int, scale: float) -> Tensor:
        return self._random(*shape, scale=scale).to(self._device, self._codec_dtype)

    def _random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self._generator)

    def stream(self, copies: int = 1) -> Tensor:
        """(copies * images, tokens, width), its memory in another order than its dimensions."""
        shape = (self.sizes.tokens, copies * self.sizes.images, self.sizes.width)
        return self._random(*shape).to(self._device, self._dtype).transpose(0, 1)

    def encoder(self, axis: str) -> Perceptron:
        """Length + bits → hidden → length."""
        return self._perceptron(self.sizes.length(axis) + self.sizes.bits, self.sizes.length(axis))

    def decoder(self, axis: str) -> Perceptron:
        """Length → hidden → bits."""
        return self._perceptron(self.sizes.length(axis), self.sizes.bits)

    def _perceptron(self, inputs: int, outputs: int) -> Perceptron:
        hidden = self.sizes.hidden
        return Perceptron(
            self._codec(hidden, inputs, scale=inputs**-0.5),
            self._codec(hidden, scale=0.3),
            self._codec(outputs, hidden, scale=2 * hidden**-0.5),
            self._codec(outputs, scale=0.3),
        )
