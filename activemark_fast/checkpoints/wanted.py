"""What a model needs of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from activemark_fast.checkpoints.names import block_of, clean_name, common_name, towers

Group = dict[str, tuple[str, tuple[int, ...]]]
"""Common name → (own name, shape)."""
ELSEWHERE = "/"
"""Before the common names of tensors that are not in the image tower."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a model needs.

    Attributes:
        stem: common name → (own name, shape) of what comes before the blocks, and of all else.
        blocks: the same for each block.
        own: clean tower-relative own name → common name.
        dtype: of the model.
        tower: what stands before the names of its image tower.
        depth: how many blocks the model has.
        grid: (rows, columns) of patches; None where positions must fit as they are.
        heads: of its attention, where that is known.
    """

    stem: Group
    blocks: list[Group]
    own: dict[str, str]
    dtype: torch.dtype
    tower: str
    depth: int
    grid: tuple[int, int] | None = None
    heads: int | None = None

    @classmethod
    def all_of(cls, state: Mapping[str, Tensor]) -> Wanted:
        """Every tensor of numbers in a state dict, which may be on "meta", in its own shape.

        Integers are none: they count (batches that a norm has seen) or index, and a checkpoint may lack them.
        """
        clean = {name: clean_name(name) for name in state}
        found = towers((whole for whole, role in clean.values() if not role), ())
        tower = found[0] if found else ""
        groups: dict[int | None, Group] = {None: {}}
        own = {}
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                continue
            whole, role = clean[name]
            whole = name if role not in ("", "scale") else whole
            inside = whole.startswith(tower)
            common = common_name(whole.removeprefix(tower)) if inside else ELSEWHERE + whole
            block = block_of(common)
            groups.setdefault(block, {})[common] = (name, tuple(tensor.shape))
            own[whole.removeprefix(tower) if inside else common] = common
        floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
        blocks = [groups[index] for index in sorted(index for index in groups if index is not None)]
        return cls(groups[None], blocks, own, next(iter(floating), torch.float32), tower, len(blocks))
