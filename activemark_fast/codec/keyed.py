"""The keyed codec: fixed directions drawn from the key. Nothing in it is fitted to any model."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from activemark_fast.key import Key
from activemark_fast.ops.bits import pack_bits
from activemark_fast.ops.decode import Decoded, decode_keyed
from activemark_fast.ops.inject import inject_keyed
from activemark_fast.site import Site

MAX_SLOTS = 64
STRENGTH = 2.0
"""Length of the injected vector over the median length of the token it is added to."""


class KeyedCodec:
    """Adds s (2m - 1) U to some tokens after the site and reads the message off with a projection P.

    U (M, D) and one P (M, D) for each tap are random rows, orthonormal, orthogonal to each other, to the
    all-ones vector (which layer norm takes out) and to the channels that carry massive activations. P ⟂ U:
    what a residual stream merely carries along is invisible to the read-out. The *slots*, up to 64 patch
    tokens in a keyed order, all take the same message, and their projections are averaged.

    Each image is read twice, with its message and with the complement, and the two readings are subtracted:
    z = mean over slots of P (h⁺ - h⁻) / 2s. What the image itself and the suspect's later training put there
    cancels. z is linear in P, so flipping a row of P flips exactly one bit's scores.
    """

    name = "keyed"
    exact = True
    sharpness = 10.0

    def __init__(self, key: Key, site: Site, bits: int, scale: Tensor) -> None:
        """scale: () float32, length s of one bit's contribution to a token."""
        self.bits = bits
        self.taps = site.taps
        self.scale = scale
        self.original_rate = torch.ones(())
        self.slots = torch.from_numpy(keyed_slots(key, site))
        rows = keyed_directions(key, site, bits)
        self.inject_directions = torch.from_numpy(rows[0]).float()  # U: (M, D)
        self.read_directions = {  # P of each tap: (M, D)
            tap: torch.from_numpy(row).float() for tap, row in zip(site.taps, rows[1:], strict=True)
        }

    @classmethod
    def create(cls, key: Key, site: Site, bits: int, output: Tensor, axis: str) -> Self:
        """See `Codec.create`."""
        most = (site.width - 1 - len(site.massive_channels)) // (1 + len(site.taps))
        if bits > most:
            raise ValueError(
                f"bits: wanted at most {most} for a model of width {site.width} read at {len(site.taps)} "
                f"tap(s), got {bits}"
            )
        if not site.patch_tokens:
            raise ValueError("model: wanted patch tokens without massive activations, found none")
        kept = [c for c in range(site.width) if c not in site.massive_channels]
        length = output[:, site.patch_tokens][..., kept].float().norm(dim=-1).median()
        return cls(key, site, bits, (STRENGTH * length / math.sqrt(bits)).cpu())

    @classmethod
    def restore(cls, key: Key, site: Site, bits: int, state: dict[str, Tensor], axis: str) -> Self:
        """See `Codec.restore`."""
        return cls(key, site, bits, state["scale"])

    def state(self) -> dict[str, Tensor]:
        """The injected length: the rest follows from the key."""
        return {"scale": self.scale.cpu()}

    def to(self, device: torch.device) -> Self:
        """Moves the codec's tensors to `device`."""
        self.scale = self.scale.to(device)
        self.slots = self.slots.to(device)
        self.inject_directions = self.inject_directions.to(device)
        self.read_directions = {tap: p.to(device) for tap, p in self.read_directions.items()}
        return self

    def aligned(self, matrix: Tensor, scale: float) -> Self:
        """A copy for a suspect whose residual stream is `scale` h @ `matrix` where the marked model's is h.

        matrix: (D, D) float32, orthogonal, on the codec's device.
        """
        moved = copy.copy(self)
        moved.scale = self.scale * scale
        moved.inject_directions = self.inject_directions @ matrix
        moved.read_directions = {tap: p @ matrix for tap, p in self.read_directions.items()}
        return moved

    def inject(self, output: Tensor, source: Tensor, message: Tensor) -> Tensor:
        """See `Codec.inject`: first the images with their message, then with its complement."""
        return inject_keyed(output, self.inject_directions, self.scale, pack_bits(message), self.slots)

    def decode(self, tapped: Tensor, tap: int, message: Tensor) -> Decoded:
        """See `Codec.decode`: P (h⁺ - h⁻), mean over the slots, 1 being as much as was injected."""
        directions, expected = self.read_directions[tap], pack_bits(message)
        return decode_keyed(tapped, directions, self.scale, self.slots, expected, self.sharpness)


def keyed_slots(key: Key, site: Site) -> np.ndarray:
    """(S,) int64, the tokens which take the message, ascending: up to 64 of `site.patch_tokens`."""
    allowed = np.array(site.patch_tokens)
    return np.sort(allowed[key.stream("slots").permutation(len(allowed))[:MAX_SLOTS]])


def keyed_directions(key: Key, site: Site, bits: int) -> np.ndarray:
    """(1 + taps, bits, width) float64: U, then P of each tap.

    All rows are orthonormal and orthogonal to the all-ones vector and to the massive channels. Their signs
    are those of the Gaussian rows they are made of, so each row's sign is a fair coin of its own.
    """
    sets = 1 + len(site.taps)
    gaussian = key.stream("directions").normal((sets * bits, site.width))
    fixed = np.concatenate([np.ones((1, site.width)), np.eye(site.width)[list(site.massive_channels)]])
    rows = orthonormal(torch.from_numpy(gaussian), torch.from_numpy(fixed))
    return rows.numpy().reshape(sets, bits, site.width)


def orthonormal(rows: Tensor, fixed: Tensor) -> Tensor:
    """`rows` (M, D) made orthonormal, in order, and orthogonal to `fixed` (F, D); each keeps its sign."""
    q, r = np.linalg.qr(torch.cat([fixed, rows]).numpy().T)
    return torch.from_numpy((q * np.sign(np.diag(r))).T[len(fixed) :].copy())
