"""How each tensor of a model is made of an image tower's, whatever pieces and shapes that keeps it in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial

import torch

from activemark_fast.checkpoints.image_tower import ImageTower
from activemark_fast.checkpoints.names import FUSED, PATCH, block_of
from activemark_fast.checkpoints.steps import (
    Part,
    Step,
    joined,
    resized_positions,
    sorted_by_part,
    unfolded_patch,
)
from activemark_fast.checkpoints.wanted import Wanted

_MAX_REGISTERS = 16
_UNIT_AXES = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1, "gate.weight": 0, "up.weight": 0}
"""Along which axis a tensor of an MLP has its units."""

_DOUBTFUL_PATCHES = ("of grey images", "of more channels", "of other patches")


@dataclass(frozen=True, eq=False)
class Matcher:
    """Finds out how tensors are made.

    Attributes:
        tower: of the checkpoint.
        wanted: what the model needs, in the widths of the checkpoint.
        order: in which a linear patch embedding takes its pixels.
        heads: by which queries, keys and values are sorted; None where it is not known.
    """

    tower: ImageTower
    wanted: Wanted
    order: str
    heads: int | None

    def step(self, common: str, own: str, shape: tuple[int, ...]) -> Step | str:
        """How a tensor is made; or why it cannot be, "" where nothing of it is there."""
        part = self.tower.part(common)
        if isinstance(part, str):
            return part or self._of_several(common, own, shape)
        how = self._how(part)
        if not part.fits(shape):
            if common == "pos":
                return self._positions(own, shape, part, how)
            if common == PATCH:
                return self._patch(own, shape, part, how)
            units = self._other_units(common, part.shape, shape)
            if units is None:
                return f"{part.kind}, wanted {shape}"
            return Step(own, part.shape, (part,), (*how, f"MLP of {units} units"))
        positions = self.tower.part("pos") if common == "cls" and "pos" in self.wanted.stem else ""
        if isinstance(positions, Part) and self._leading_rows(positions, self.wanted.stem["pos"][1]) == (
            1,
            0,
        ):
            # The model adds no position to the class token.
            how = (*how, "class token plus its position")
            return Step(own, shape, (part, positions), how, lambda v: v[0].flatten() + v[1].flatten(0, -2)[0])
        return Step(own, shape, (part,), how)

    def _how(self, *parts: Part) -> tuple[str, ...]:
        how = []
        for part in parts:
            if part.source.how:
                how.append(part.source.how)
            elif part.source.dtype != self.wanted.dtype:
                how.append(str(part.source.dtype).removeprefix("torch."))
            if part.lora is not None:
                kind = "LoRA" if part.lora[2] is None else "DoRA"
                how.append(f"{kind} merged with the factor {part.lora[3]:g}")
        return tuple(how)

    def _other_units(self, common: str, there: tuple[int, ...], wanted: tuple[int, ...]) -> int | None:
        """How many units an MLP has, if a tensor of it differs only in that, and all others do, too.

        The model's MLP is then made as wide: what it adds to the residual stream is all that counts.
        """
        match = re.fullmatch(r"(blocks\.\d+\.mlp)\.(fc1|gate|up|fc2)\.(weight|bias)", common)
        if match is None or self.wanted.grid is None or len(there) != len(wanted) or 0 in there:
            return None
        axis = 1 if match[2] == "fc2" else 0
        if len(there) <= axis or there[:axis] + there[axis + 1 :] != wanted[:axis] + wanted[axis + 1 :]:
            return None
        shapes = {name: self.tower.shape(f"{match[1]}.{name}") for name in _UNIT_AXES}
        sizes = {name: (*shape, 0, 0)[_UNIT_AXES[name]] for name, shape in shapes.items() if shape}
        same = "fc2.weight" in sizes and len(set(sizes.values())) == 1 and len(sizes) > 1
        return there[axis] if same else None

    def _of_several(self, common: str, own: str, shape: tuple[int, ...]) -> Step | str:
        """A tensor that the checkpoint keeps in other pieces than the model does."""
        index = block_of(common)
        if index is None:
            return ""
        prefix = f"blocks.{index}."
        name, _, kind = common.removeprefix(prefix).rpartition(".")

        def there(*pieces: str) -> list[str]:
            """The common names of pieces that are all there."""
            names = [f"{prefix}{piece}.{kind}" for piece in pieces]
            return names if all(name in self.tower.found for name in names) else []

        for pieces in FUSED.get(name, ()):
            if there(*pieces):
                return self._joined(own, shape, there(*pieces))
        if name == "attn.qkv" and kind == "bias" and there("attn.q", "attn.v") and len(shape) == 1:
            return self._joined(own, shape, there("attn.q", "attn.v"), keys=False)
        if name == "attn.qkv" and there("attn.qkv_by_head"):
            if self.heads is None or shape[0] % (3 * self.heads):
                return "queries, keys and values sorted by head, of which the number is not known"
            return self._share(there("attn.qkv_by_head")[0], own, shape, None)
        for whole, choices in FUSED.items():
            for pieces in choices:
                if name in pieces and there(whole) and len(pieces) == len(choices[0]):
                    return self._share(there(whole)[0], own, shape, (pieces.index(name), len(pieces)))
        if name in ("attn.k", "attn.v") and there("attn.kv"):
            return self._share(there("attn.kv")[0], own, shape, (int(name == "attn.v"), 2))
        return ""

    def _joined(self, own: str, shape: tuple[int, ...], commons: list[str], keys: bool = True) -> Step | str:
        """Pieces below each other; without `keys` zeros, as many, between the first and the second."""
        parts: list[Part] = []
        for common in commons:
            part = self.tower.part(common)
            if isinstance(part, str):
                return part
            parts.append(part)
        rows = [part.shape for part in parts]
        whole = sum((size[:1] or (0,))[0] for size in (rows if keys else [rows[0], *rows]))
        if any(not size or size[1:] != shape[1:] for size in rows) or whole != shape[0]:
            return f"pieces of shapes {', '.join(map(str, rows))}, wanted {shape}"
        how = tuple(sorted({*self._how(*parts), "fused"}))
        if keys:
            return Step(own, shape, tuple(parts), how)
        return Step(own, shape, tuple(parts), how, lambda v: joined([v[0], torch.zeros_like(v[0]), v[1]]))

    def _share(self, stored: str, own: str, shape: tuple[int, ...], at: tuple[int, int] | None) -> Step | str:
        """One of so many equal shares of a tensor's rows; None for all of them, sorted by head."""
        part = self.tower.part(stored)
        if isinstance(part, str):
            return part
        which, shares = at or (0, 1)
        if part.shape != (shares * shape[0], *shape[1:]):
            return f"{part.kind}, wanted {shares} of {shape}"
        if at is None:
            assert self.heads is not None
            make = partial(sorted_by_part, heads=self.heads)
            return Step(own, shape, (part,), (*self._how(part), "sorted by head"), make)
        return Step(own, shape, (part,), (*self._how(part), "split"), lambda v: v[0].chunk(shares)[which])

    def _leading_rows(self, positions: Part, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """How many rows of the positions, there and wanted, are no patch's; None where it cannot be told."""
        if self.wanted.grid is None:
            return None
        patches = self.wanted.grid[0] * self.wanted.grid[1]
        wanted = math.prod(shape[:-1]) - patches
        rows = math.prod(positions.shape[:-1])
        if rows == patches + wanted:
            return wanted, wanted
        if wanted < rows - patches <= _MAX_REGISTERS:
            return rows - patches, wanted  # rows of registers, which follow those of the class token
        for leading in (wanted, 1, 0):
            if rows > leading and math.isqrt(rows - leading) ** 2 == rows - leading:
                return leading, wanted
        return None

    def _positions(self, own: str, shape: tuple[int, ...], part: Part, how: tuple[str, ...]) -> Step | str:
        leading, grid = self._leading_rows(part, shape), self.wanted.grid
        fits = leading is not None and part.shape[-1:] == shape[-1:]
        if grid is None or leading is None or not fits or 0 < leading[0] < leading[1]:
            return f"{part.kind}, wanted {shape}"
        make = partial(resized_positions, leading=leading[0], wanted=leading[1], grid=grid)
        return Step(own, shape, (part,), (*how, "positions resized"), make)

    def _patch(self, own: str, shape: tuple[int, ...], part: Part, how: tuple[str, ...]) -> Step | str:
        """A patch embedding that is linear, of videos, of grey images, or of other patches."""
        there = part.shape
        kind = ""
        if self.wanted.grid is None or len(shape) != 4 or not there or there[0] != shape[0]:
            pass
        elif len(there) == 2 and there[1] == math.prod(shape[1:]):
            kind = self.order
        elif len(there) == 5 and (there[1], *there[3:]) == shape[1:]:
            kind = "of videos"
        elif len(there) == 4 and there[2:] == shape[2:] and there[1] == 1:
            kind = "of grey images"
        elif len(there) == 4 and there[2:] == shape[2:] and there[1] > shape[1]:
            kind = "of more channels"
        elif len(there) == 4 and there[1] == shape[1] and there[2] == there[3] <= 64:
            kind = "of other patches"
        if not kind:
            return f"{part.kind}, wanted {shape}"
        what = f"patch embedding {'linear, ' if len(there) == 2 else ''}{kind}"
        doubt = f"a patch embedding {kind}" if kind in _DOUBTFUL_PATCHES else ""
        return Step(own, shape, (part,), (*how, what), partial(unfolded_patch, kind=kind, shape=shape), doubt)
