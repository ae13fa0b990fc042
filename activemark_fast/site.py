"""Where the mark goes: the block it is injected at, the taps it is read at, what it stays away from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

MAX_MOVED = 4
"""Blocks more or fewer than the marked model's for which every place is tried that the mark may have."""


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
        massive_tokens, massive_channels: where its massive activations sit at `block`; a mark in bands
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


def check_block(block: int | None, depth: int) -> None:
    """Raises SiteError where a model of `depth` blocks has no room for a mark after `block` (None: any)."""
    latest = depth - 3
    if latest < 0:
        raise SiteError(f"model: wanted at least 3 blocks (site, marked block, last block), got {depth}")
    if block is not None and not 0 <= block <= latest:
        raise SiteError(
            f"block: wanted 0 to {latest} (the mark needs room before the last of this model's {depth} "
            f"blocks), got {block}"
        )


def taps_after(block: int, depth: int) -> tuple[int, ...]:
    """The taps of a mark that is injected after `block` in a model of `depth` blocks.

    The last but one block, which the paper reads at; and one half way there, but no later than before the
    last three blocks, where there is room: a thief who cuts those off or starts them anew leaves a mark to
    read.
    """
    last = depth - 2
    half_way = block + (last - block + 1) // 2
    return (last,) if last - block < 2 else (max(block + 1, min(half_way, depth - 4)), last)


def sites_in(own: Site, blocks: int, depth: int, moved: bool) -> list[Site]:
    """Where a mark may lie in a suspect.

    Blocks that were dropped, doubled or put in before the site move it and its taps by as many; those
    between the site and a tap, that tap. Up to `MAX_MOVED` blocks, every way there is; of more, all in
    one place or spread evenly.

    Args:
        own: the place that the mark was given.
        blocks: how many the suspect has.
        depth: how many of them, from the first, can be run.
        moved: whether it is looked for elsewhere.

    Returns:
        `own` first, and nothing else for a suspect of less than half of the marked model's blocks; none where
        the suspect is too short.
    """
    more = blocks - own.depth
    moves = [(0,) * (1 + len(own.taps))]
    # An owner who states another depth chooses among no more than `freedoms.DEPTHS`: not endless ones.
    if moved and more and own.depth <= 2 * blocks:
        steps = range(abs(more) + 1) if abs(more) <= MAX_MOVED else (0, abs(more))
        sign = 1 if more > 0 else -1
        moves = [
            tuple(sign * move for move in ways)
            for ways in combinations_with_replacement(steps, 1 + len(own.taps))
        ]
        moves.append(
            tuple(round((place + 1) * blocks / own.depth) - 1 - place for place in (own.block, *own.taps))
        )
    found = {}
    for move, *tap_moves in moves:
        taps = (tap + by for tap, by in zip(own.taps, tap_moves, strict=True))
        places = (own.block + move, *(tap for tap in taps if tap < depth))
        rises = all(before < after for before, after in zip((-1, *places), places, strict=False))
        if rises and len(places) > 1:
            found[places] = replace(own, block=places[0], taps=places[1:])
    return list(found.values())
