"""Where the mark goes: the block it is injected at, the taps it is read at, what it stays away from."""

from __future__ import annotations

from dataclasses import dataclass

from activemark_fast.backbone import Backbone
from activemark_fast.profile import Profile


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
        massive_tokens, massive_channels: where its massive activations sit at `block`.
    """

    block: int
    taps: tuple[int, ...]
    num_tokens: int
    prefix_tokens: int
    width: int
    massive_tokens: tuple[int, ...]
    massive_channels: tuple[int, ...]

    @property
    def patch_tokens(self) -> list[int]:
        """Tokens the mark may use: patches that carry no recurring massive activation."""
        return [t for t in range(self.prefix_tokens, self.num_tokens) if t not in self.massive_tokens]


def place_site(backbone: Backbone, profile: Profile, block: int | None = None) -> tuple[Site, str]:
    """The site for a mark, and one sentence on why it is there.

    Without `block` it is where massive activations emerge (the first sharp rise of the profile). A model that
    has none, or has them too late to leave two blocks for the mark, is marked at its middle block.

    Raises:
        SiteError: `block` leaves no block between it and the last one, or the model has fewer than 3 blocks.
    """
    latest = backbone.depth - 3
    if latest < 0:
        raise SiteError(
            f"model: wanted at least 3 blocks (site, marked block, last block), got {backbone.depth}"
        )
    if block is not None:
        if not 0 <= block <= latest:
            raise SiteError(
                f"block: wanted 0 to {latest} (the mark needs room before the last of this model's "
                f"{backbone.depth} blocks), got {block}"
            )
        reason = f"block {block}, as asked for"
    else:
        rise = profile.first_sharp_rise()
        middle = min(max(backbone.depth // 2 - 1, 0), latest)
        if rise is None:
            block, reason = middle, f"block {middle}, the middle: the model has no massive activations"
        elif rise > backbone.depth - 4:
            block = middle
            reason = f"block {middle}, the middle: massive activations emerge too late, after block {rise}"
        else:
            block, reason = rise, f"block {rise}, where massive activations emerge"
    last = backbone.depth - 2
    taps = (last,) if last - block < 2 else (block + (last - block + 1) // 2, last)
    massive = profile.massive[block]
    site = Site(
        block=block,
        taps=taps,
        num_tokens=backbone.num_tokens,
        prefix_tokens=backbone.prefix_tokens,
        width=backbone.width,
        massive_tokens=tuple(sorted({token for token, _ in massive})),
        massive_channels=tuple(sorted({channel for _, channel in massive})),
    )
    return site, reason
