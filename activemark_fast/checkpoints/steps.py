"""How one tensor of a model is made of what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from activemark_fast.checkpoints.stored import Source


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint with what is merged into it.

    name: its clean name.
    lora: the names of A, B and magnitude, and the factor.
    """

    name: str
    source: Source
    lora: tuple[str, str, str | None, float] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is made."""
        return self.source.shape

    @property
    def kind(self) -> str:
        """Dtype and shape, for messages."""
        return f"{str(self.source.dtype).removeprefix('torch.')} {self.shape}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is a tensor of this shape but for axes of length 1."""
        if _core(self.shape) == _core(shape):
            return True
        return (len(self.shape) == 1 or len(_core(shape)) == 1) and math.prod(self.shape) == math.prod(shape)

    def names(self) -> Iterator[str]:
        """The tensors of the checkpoint that it is made of."""
        yield from self.source.names.values()
        yield from (name for name in (self.lora or ())[:3] if isinstance(name, str))

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """It, of these tensors."""
        value = self.source.value(tensors)
        if self.lora is not None:
            a, b, magnitude, factor = self.lora
            value = value.float() + factor * (tensors[b].float() @ tensors[a].float())
            if magnitude is not None:  # DoRA (Liu et al. 2024): each row's length is learned apart
                value = value * (tensors[magnitude].float().reshape(-1, 1) / value.norm(dim=1, keepdim=True))
        return value


def joined(values: Sequence[Tensor]) -> Tensor:
    """Pieces, one below the other."""
    return values[0] if len(values) == 1 else torch.cat([value.float() for value in values])


@dataclass(frozen=True)
class Step:
    """How one tensor of the model is made.

    Attributes:
        target: its name.
        shape: and shape.
        parts: what of the checkpoint it is made of.
        how: what that does to them, in words; nothing for a tensor that is taken as it is.
        make: does it.
        doubt: why it may not be what the suspect computes with; "" for no reason but its parts.
    """

    target: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    how: tuple[str, ...] = ()
    make: Callable[[Sequence[Tensor]], Tensor] = joined
    doubt: str = ""

    @property
    def doubts(self) -> list[str]:
        """What of it may not be what the suspect computes with."""
        return [part.name for part in self.parts if part.source.doubtful] + [self.doubt] * bool(self.doubt)

    def names(self) -> Iterator[str]:
        """The tensors of the checkpoint that it takes."""
        for part in self.parts:
            yield from part.names()

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """It, of these tensors."""
        return self.make([part.value(tensors) for part in self.parts]).reshape(self.shape)


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without leading ones: libraries keep tokens as (D), (1, D) or (1, 1, D)."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return tuple(shape)


def sorted_by_part(values: Sequence[Tensor], heads: int) -> Tensor:
    """Rows that are sorted by head and then by query, key and value, the other way round."""
    return values[0].unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def resized_positions(values: Sequence[Tensor], leading: int, wanted: int, grid: tuple[int, int]) -> Tensor:
    """(..., n, D) positions for another grid, float32; leading rows are dropped, or zeros put in."""
    rows = values[0].flatten(0, -2).float()
    patches = rows[leading:]
    side = math.isqrt(len(patches))
    image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if (side, side) != grid:
        image = interpolate(image, grid, mode="bicubic", antialias=True, align_corners=False)
    first = rows[:leading] if leading else rows.new_zeros(wanted, rows.shape[1])
    return torch.cat([first[:wanted], image.flatten(2).transpose(1, 2)[0]])


def unfolded_patch(values: Sequence[Tensor], kind: str, shape: tuple[int, ...]) -> Tensor:
    """A patch embedding of `kind` as a (D, channels, rows, columns) convolution of single colour images."""
    weight = values[0].float()
    width, channels, *patch = shape
    if kind == "channels first":
        return weight.reshape(shape)
    if kind == "channels last":
        return weight.reshape(width, *patch, channels).permute(0, 3, 1, 2)
    if kind == "of videos":  # a still image is the same in every frame
        return weight.sum(2)
    if kind == "of grey images":
        return weight.expand(shape) / channels
    if kind == "of more channels":
        return weight[:, :channels]
    # Other patches: the kernel that answers a resized patch as the old one does the original (FlexiViT,
    # Beyer et al. 2023).
    enlarge = _resizing((weight.shape[2], weight.shape[3]), (patch[0], patch[1])).to(weight)
    return (weight.flatten(2) @ torch.linalg.pinv(enlarge)).reshape(shape)


@lru_cache(maxsize=8)
def _resizing(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(new pixels, old pixels), the matrix that resizes an image of `old` to `new`."""
    basis = torch.eye(old[0] * old[1]).reshape(-1, 1, *old)
    return interpolate(basis, new, mode="bicubic", antialias=True, align_corners=False).flatten(1).T
