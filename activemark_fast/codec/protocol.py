"""What every codec does, so that embedding and verifying need not know which one they use."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from activemark_fast.key import Key
from activemark_fast.ops.decode import Decoded
from activemark_fast.site import Site


class Codec(Protocol):
    """An encoder that writes a message into the residual stream and a decoder that reads it further on.

    Attributes:
        name: "keyed" or "learned"; the key of `CODECS`.
        exact: nothing in the codec is fitted to data, so the sign-flip p-value is exact.
        bits: message length M.
        sharpness: what logits are multiplied with in the loss, so that about 1 is hardly read and 10 is read
            safely.
        taps: blocks `decode` can read at.
        original_rate: () float32, the detection rate on the unmarked original, 1 until `embed` has measured
            it; a codec that is not exact keeps it in its state.
    """

    name: str
    exact: bool
    bits: int
    sharpness: float
    taps: tuple[int, ...]
    original_rate: Tensor

    @classmethod
    def create(cls, key: Key, site: Site, bits: int, output: Tensor, axis: str) -> Self:
        """A new codec.

        Args:
            key: the owner's.
            site: where it writes and reads.
            bits: message length M.
            output: (n, N, D), what the original model's block `site.block` puts out.
            axis: "token", or "channel" for the learned codec (`embed` checks it).

        Raises:
            ValueError: the model has no room for so many bits, or no token to write them to.
        """
        ...

    @classmethod
    def restore(cls, key: Key, site: Site, bits: int, state: dict[str, Tensor], axis: str) -> Self:
        """The codec whose `state` was stored."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What has to be stored beside key, site, bits and axis."""
        ...

    def to(self, device: torch.device) -> Self:
        """The codec on `device`."""
        ...

    def inject(self, output: Tensor, source: Tensor, message: Tensor) -> Tensor:
        """Writes a message into each image's residual stream.

        Args:
            output: (B, N, D), output of the site's block.
            source: (B, N, D), input of that block.
            message: (B, M) of 0 and 1, any dtype.

        Returns:
            (B, N, D) in the dtype of `output`; or (2 * B, N, D), the images with their message, then with its
            complement.
        """
        ...

    def decode(self, tapped: Tensor, tap: int, message: Tensor) -> Decoded:
        """Reads a message off each image's residual stream.

        Args:
            tapped: (B or 2 * B, N, D), output of block `tap` after `inject`.
            tap: one of `taps`.
            message: (B, M), what was injected.

        Returns:
            Logits, and how they compare with the message: bit errors, and the loss of `sharpness` * logits.
        """
        ...
