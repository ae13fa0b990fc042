"""How the residual stream lies in a tower's own tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Sequences, maps with the channels first or last, or patches of several images packed into one sequence.

    Attributes:
        shape: of the stream of one image, the channels last.
        batch_axis: the axis of `shape` that grows with the number of images.
        channels_first: whether it is (B, D, H, W).
        sequence_first: whether it is (N, B, D).
    """

    shape: torch.Size
    batch_axis: int
    channels_first: bool
    sequence_first: bool

    @classmethod
    def of(cls, one: torch.Size, two: torch.Size, block: nn.Module, square: bool) -> Layout | None:
        """Told by the shapes for one image and for two; None where they tell of no batch.

        block: one of those that take it; its vectors are as long as the stream is wide.
        square: whether the images are.
        """
        grown = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
        axis = grown[0] if len(grown) == 1 else -1
        sequence_first = len(one) == 3 and axis == 1 and one[1] == 1
        packed = axis >= 0 and two[axis] == 2 * one[axis] and all(size == 1 for size in one[:axis])
        if not (sequence_first or packed):
            return None
        widths = {p.numel() for p in block.parameters() if p.ndim == 1}
        channels_first = len(one) == 4 and (
            one[3] not in widths or (one[1] in widths and square and one[1] != one[2])
        )
        shape = torch.Size((one[0], *one[2:], one[1])) if channels_first else one
        return cls(shape, axis, channels_first, sequence_first)

    @property
    def width(self) -> int:
        """Channels of the stream."""
        return self.shape[-1]

    def rows(self, values: Tensor, batch: int, channels_first: bool) -> Tensor:
        """(B, N, C) of what lies as the stream does, but for where the channels are."""
        if channels_first and values.ndim == 4:
            values = values.movedim(1, -1)
        elif self.sequence_first and values.ndim == 3:
            values = values.transpose(0, 1)
        return values.reshape(batch, -1, values.shape[-1])

    def native(self, tokens: Tensor) -> Tensor:
        """(B, N, D) as the tower has it."""
        if self.sequence_first:
            return tokens.transpose(0, 1).contiguous()
        shape = list(self.shape)
        shape[self.batch_axis] *= len(tokens)
        values = tokens.reshape(shape)
        return values.movedim(-1, 1).contiguous() if self.channels_first else values
