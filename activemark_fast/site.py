"""Where the mark goes: the block it is injected at, the taps it is read at, what it stays away from."""

from __future__ import annotations

from dataclasses import dataclass


class SiteError(ValueError):
    """The model has no room for the mark at the block asked for."""


@dataclass(frozen=True)
class Site:
    """Place of a mark in a backbone. Blocks count from 0.

    Attributes:
        block: the expressive block (paper, section 3.2): the message is injected into its output.
        taps: blocks whose outputs are read, ascending. The last is the last but one block of the model, so
            its output is the input of the last block.
        num_tokens, prefix_tokens, width: token layout of the marked model.
        massive_tokens, massive_channels: where its massive activations sit at `block`; a mark in two bands
            goes by neither, and leaves them empty.
        depth: number of blocks of the marked model; 0 where it is not known (old watermarks).
    """

    block: int
    taps: tuple[int, ...]
    num_tokens: int
    prefix_tokens: int
    width: int
    massive_tokens: tuple[int, ...] = ()
    massive_channels: tuple[int, ...] = ()
    depth: int = 0

    @property
    def patch_tokens(self) -> list[int]:
        """Tokens the mark may use: patches that carry no recurring massive activation."""
        return [t for t in range(self.prefix_tokens, self.num_tokens) if t not in self.massive_tokens]


@dataclass(frozen=True)
class Placement:
    """What `Profile.site` answers.

    Attributes:
        site: where the mark goes.
        emergence: the block where massive activations emerge, by the rule; None if it finds no such block.
        agreement: share of images, each looked at alone, for which the rule gives the same `emergence`.
        reason: one sentence on why the mark is there, and how sure that is.
    """

    site: Site
    emergence: int | None
    agreement: float
    reason: str


def taps_after(block: int, depth: int) -> tuple[int, ...]:
    """The taps of a mark that is injected after `block` in a model of `depth` blocks.

    The last but one block, which the paper reads at; and one half way there, but no later than before the
    last three blocks, where there is room: a thief who cuts those off or starts them anew leaves a mark to
    read.
    """
    last = depth - 2
    half_way = block + (last - block + 1) // 2
    return (last,) if last - block < 2 else (max(block + 1, min(half_way, depth - 4)), last)
