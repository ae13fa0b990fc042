"""The learned codec: the paper's encoder and decoder, trained together with the model (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Self

from activemark_fast.key import Key
from activemark_fast.ops.bits import pack_bits
from activemark_fast.ops.common import Perceptron
from activemark_fast.ops.decode import Decoded, decode_learned
from activemark_fast.ops.inject import inject_learned
from activemark_fast.site import Site

ENCODER_WIDTH = 1024
DECODER_WIDTH = 512


class LearnedCodec(nn.Module):
    """Overwrites one channel with an encoding of the message; a decoder reads the channel at the last tap.

    A channel is an index on one axis of the residual stream (N, D): on the token axis a vector of D values,
    on the channel axis a vector of N. The encoder sees the same channel of the block's input and the message:
    V + M → 1024 → V with ReLU between and a sigmoid after; the decoder is V → 512 → M. The index comes from
    the key, among the patch tokens or channels without massive activations.

    The codec is fitted, so what it reads from a model is no proof by itself: a codec can be fitted to any
    model. So a codec that reads the unmarked original as well (`original_rate`) makes no match.
    """

    name = "learned"
    exact = False
    sharpness = 1.0

    def __init__(self, key: Key, site: Site, bits: int, axis: str) -> None:
        super().__init__()
        self.bits = bits
        self.axis = axis
        self.taps = site.taps[-1:]
        if axis == "token":
            allowed, length = site.patch_tokens, site.width
        else:
            allowed = [c for c in range(site.width) if c not in site.massive_channels]
            length = site.num_tokens
        self.index = allowed[int(key.stream("index").integers(0, len(allowed), 1)[0])]
        self.encoder = nn.Sequential(
            nn.Linear(length + bits, ENCODER_WIDTH), nn.ReLU(), nn.Linear(ENCODER_WIDTH, length), nn.Sigmoid()
        )
        self.decoder = nn.Sequential(
            nn.Linear(length, DECODER_WIDTH), nn.ReLU(), nn.Linear(DECODER_WIDTH, bits)
        )
        self.original_rate: Tensor
        self.register_buffer("original_rate", torch.ones(()))

    @classmethod
    def create(cls, key: Key, site: Site, bits: int, output: Tensor, axis: str) -> Self:
        """See `Codec.create`. The initial weights come from the key, in PyTorch's default ranges."""
        if axis == "token" and not site.patch_tokens:
            raise ValueError("model: wanted patch tokens without massive activations, found none")
        codec = cls(key, site, bits, axis)
        stream = key.stream("learned codec")
        for layer in codec.modules():
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                for parameter in (layer.weight, layer.bias):
                    drawn = torch.from_numpy(stream.uniform(tuple(parameter.shape)))
                    parameter.data.copy_((2 * drawn - 1) * bound)
        return codec

    @classmethod
    def restore(cls, key: Key, site: Site, bits: int, state: dict[str, Tensor], axis: str) -> Self:
        """See `Codec.restore`."""
        codec = cls(key, site, bits, axis)
        codec.load_state_dict(state)
        return codec.requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """The weights of encoder and decoder, and `original_rate`."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}

    def inject(self, output: Tensor, source: Tensor, message: Tensor) -> Tensor:
        """See `Codec.inject`."""
        encoder = Perceptron(*self.encoder.parameters())
        return inject_learned(output, source, pack_bits(message), encoder, self.index, self.axis)

    def decode(self, tapped: Tensor, tap: int, message: Tensor) -> Decoded:
        """See `Codec.decode`."""
        decoder = Perceptron(*self.decoder.parameters())
        return decode_learned(tapped, decoder, self.index, self.axis, pack_bits(message), self.sharpness)
