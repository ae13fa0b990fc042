"""Codebooks: the directions that a mark is written along and read along, in two bands of injections.

A *codebook* is a `KeyedCodec` over all patch tokens: rows U that are written after the site, rows P that are
read at each tap. A mark has two *bands* of them (and a third band without: `codec.passive`):

- The *loud* band writes random directions, twice as long as tokens vary. Its edit hides where photographs
  hardly excite the model, so it can be large: every image reads right. Whoever knows the method can take it
  out for little.
- The *natural* band writes directions along which the suspect's own tokens vary, and no longer than they do:
  U = G C^(1/2), with G random from the key and C the covariance of the suspect's tokens. Its edit changes
  what the model does with photographs, by a little, so a matrix that is fitted anew to the model's behaviour
  learns the mark with it. Single images read it badly; many images prove it.

Nothing of this is the owner's to choose. G and the rows P are Gaussian rows from the *stretched* key; C and
the length of a token's variation are measured on the suspect, on images from the key; tokens, lengths and
taps follow from the site. P is made orthogonal to U, so that what a residual stream merely carries along is
not read. C and U do not depend on the rows that P is made of, so flipping the sign of such a row flips the
sign of its row of P and changes nothing else: the sign-flip p-value is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from activemark_fast.codec.keyed import KeyedCodec, orthonormal
from activemark_fast.key import Key, KeyStream
from activemark_fast.site import Site

MEASURED_IMAGES = 32
"""So many of the trigger images, the first, tell how the suspect's tokens vary."""
FLOOR = 1e-3
"""Added to the eigenvalues of the covariance, over their mean."""


@dataclass(frozen=True)
class Band:
    """How the codebooks of one band are made and read.

    Attributes:
        name: "loud", "natural" or "traced".
        books: how many codebooks.
        reads: how often each image is read with each of them, with other messages every time.
        strength: length of the injected vector, over how far a token of the suspect lies from the median one.
        natural: whether U lies where the suspect's tokens vary.
    """

    name: str
    books: int
    reads: int
    strength: float
    natural: bool


LOUD = Band("loud", books=1, reads=6, strength=2.3, natural=False)
NATURAL = Band("natural", books=2, reads=2, strength=1.0, natural=True)
BANDS = (LOUD, NATURAL)
"""The bands of an owner's mark."""
MAX_BOOKS = max(band.books for band in BANDS)
"""How many messages each tap is read for, of the band with most."""
TRACED = Band("traced", books=8, reads=1, strength=1.0, natural=False)
"""Tells the copies of recipients apart (`tracing`): each of its rows answers as a codeword says. Tokens vary
in few directions: were U among those, two who collude would find them all in what their copies differ in,
and could take them out."""


@dataclass(frozen=True, eq=False)
class SiteMeasure:
    """How the patch tokens of a model vary at the site.

    Attributes:
        covariance: (D, D) float64 on the CPU, of the tokens, each less its mean over the channels and over
            its standard deviation, as a layer norm shows them to the next block.
        spread: median distance of a token from the median token.
    """

    covariance: Tensor
    spread: float

    @classmethod
    def of(cls, output: Tensor, prefix_tokens: int) -> Self:
        """output: (n, N, D), the output of the site's block for n images."""
        tokens = output[:, prefix_tokens:].flatten(0, 1).float()
        tokens = tokens - tokens.mean(dim=1, keepdim=True)
        spread = (tokens - tokens.median(dim=0).values).norm(dim=1).median()
        seen = tokens / tokens.std(dim=1, keepdim=True, correction=0).clamp_min(
            torch.finfo(tokens.dtype).tiny
        )
        seen = (seen - seen.mean(dim=0)).double()
        covariance = (seen.T @ seen / len(seen)).cpu()
        if float(spread) == 0 or not bool(covariance.any()):  # a dead model is read as if it were alive
            return cls(torch.eye(len(covariance), dtype=torch.float64), 1.0)
        return cls(covariance, float(spread))

    @property
    def usable(self) -> bool:
        """Whether the tokens are finite."""
        return math.isfinite(self.spread) and bool(torch.isfinite(self.covariance).all())

    @cached_property
    def root(self) -> Tensor:
        """(D, D) float64, the square root of the covariance, its eigenvalues raised by `FLOOR`."""
        values, vectors = np.linalg.eigh(self.covariance.numpy())
        values = np.maximum(values, 0)
        values += FLOOR * values.mean()
        return torch.from_numpy((vectors * np.sqrt(values)) @ vectors.T)

    def turned_back(self, matrix: Tensor) -> SiteMeasure:
        """As it would be of a model whose stream is h where this one's is h @ `matrix` (orthogonal)."""
        turn = matrix.double().cpu()
        return SiteMeasure(turn @ self.covariance @ turn.T, self.spread)


class Codebook(KeyedCodec):
    """One set of rows U, P of each tap, at all patch tokens."""

    def __init__(
        self, band: Band, bits: int, site: Site, measured: SiteMeasure, gaussian: list[Tensor]
    ) -> None:
        """gaussian: (bits, D) float64 rows, of U and of P at each tap; `measured` must be usable."""
        self.band = band
        self.bits = bits
        self.taps = site.taps
        self.scale = torch.tensor(band.strength * measured.spread / math.sqrt(bits))
        self.original_rate = torch.ones(())
        self.slots = torch.arange(site.prefix_tokens, site.num_tokens)
        written, *read = gaussian
        ones = torch.ones(1, site.width, dtype=torch.float64)
        if band.natural:
            written = written @ measured.root
        u = orthonormal(written, ones)
        self.inject_directions = u.float()
        against = torch.cat([ones, u])
        self.read_directions = {
            tap: orthonormal(rows, against).float() for tap, rows in zip(site.taps, read, strict=True)
        }


def max_bits(width: int) -> int:
    """The longest message for a model of this width: U, P and the all-ones vector are orthogonal."""
    return (width - 1) // 2


def codebooks(
    key: Key, site: Site, bits: int, measured: SiteMeasure, bands: Sequence[Band] = BANDS
) -> list[Codebook]:
    """All codebooks of `bands`, one after the other, on the CPU.

    Args:
        key: stretched (`Key.stretched`).
        site: where the mark is.
        bits: message length M, at most `max_bits(site.width)`.
        measured: on the suspect.
        bands: an owner's by default.
    """
    made = []
    for band in bands:
        for index in range(band.books):
            gaussian = [
                torch.from_numpy(
                    key.stream(f"codebook/{band.name}/{index}/{rows}").normal((bits, site.width))
                )
                for rows in ("write", *(f"read/{tap}" for tap in range(len(site.taps))))
            ]
            made.append(Codebook(band, bits, site, measured, gaussian))
    return made


def draw_sent(key: Key, purpose: str, images: int, bits: int, bands: Sequence[Band] = BANDS) -> list[Tensor]:
    """What is sent: for each codebook of `bands` (images, reads, bits) of 0 and 1, int64.

    An image's message is read several times, each time with another keyed mask over it; what is sent is
    message and mask together. Within a codebook any two bits agree as often as not over the images
    (`balanced_bits`), so that what one bit does to the reading of another cancels.
    """
    books = [band for band in bands for _ in range(band.books)]
    return [
        torch.from_numpy(
            balanced_bits(key.stream(f"messages/{purpose}/{index}"), images * band.reads, bits)
        ).view(images, band.reads, bits)
        for index, band in enumerate(books)
    ]


def balanced_bits(stream: KeyStream, count: int, bits: int) -> npt.NDArray[np.int64]:
    """(count, bits) of 0 and 1: rows of random Hadamard matrices, their rows, columns and signs shuffled.

    Within each run of n rows, n the least power of two that is not below `bits`, any two columns agree in
    half of the rows.
    """
    size = 1 << (bits - 1).bit_length()
    hadamard = np.ones((1, 1), dtype=np.int64)
    while len(hadamard) < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    parts = []
    for _ in range(-(-count // size)):
        rows, columns = stream.permutation(size), stream.permutation(size)[:bits]
        signs = 1 - 2 * stream.bits((1, bits)).astype(np.int64)
        flips = 1 - 2 * stream.bits((size, 1)).astype(np.int64)
        parts.append(hadamard[rows][:, columns] * signs * flips)
    return (np.concatenate(parts)[:count] + 1) // 2
