"""Overwriting: a second mark on top of the first, by somebody who has the method but not the key."""

from __future__ import annotations

import warnings

from torch import nn

from activemark_fast.datasets import Labelled
from activemark_fast.embedding import UnverifiedMarkError, embed
from activemark_fast.key import Key


def overwriting_key(seed: int) -> Key:
    """The key that `overwrite` marks with. It is no secret."""
    return Key(f"activemark_fast: overwriting key {seed}".encode())


def overwrite(model: nn.Module, data: Labelled | None, seed: int, strength: float) -> nn.Module:
    """A copy of `model` that carries a mark under `overwriting_key(seed)`, too.

    Args:
        model: a plain ViT.
        data: not used: the images are made from that key.
        seed: chooses the key.
        strength: how far the second mark may take the features: 1 - `fidelity` of `embed`.
    """
    with warnings.catch_warnings():
        # Whether the thief's own mark is as strong as `embed` promises is not the owner's concern.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return embed(model, overwriting_key(seed), fidelity=1 - strength).model
        except UnverifiedMarkError as error:
            return error.model
