"""Which tensor of a checkpoint is which of a model's, and what the result does not know.

Nothing is read here: plans are made from names, dtypes and shapes, one for every image tower that a file
holds, and carried out once the tensors they ask for are there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from activemark_fast.checkpoints.errors import UnreadFormError
from activemark_fast.checkpoints.names import (
    FUSED,
    PATCH,
    STEM,
    Adapters,
    block_of,
    clean_name,
    common_name,
    sorted_out,
    towers,
)
from activemark_fast.checkpoints.stored import Source, Stored, source_of
from activemark_fast.checkpoints.width import Narrowing

_SHOWN_NAMES = 20
_LONGEST_NAME = 120
_MOST_TOWERS = 16
_MOST_REGISTERS = 16
_ELSEWHERE = "/"
"""Before the common names of tensors that are not in the image tower."""
_LAYER_SCALES = (".ls1", ".ls2")


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

    stem: dict[str, tuple[str, tuple[int, ...]]]
    blocks: list[dict[str, tuple[str, tuple[int, ...]]]]
    own: dict[str, str]
    dtype: torch.dtype
    tower: str
    depth: int
    grid: tuple[int, int] | None = None
    heads: int | None = None

    @classmethod
    def all_of(cls, state: Mapping[str, Tensor]) -> Wanted:
        """Every tensor of a state dict, which may be on "meta", in its own shape."""
        clean = {name: clean_name(name) for name in state}
        found = towers((whole for whole, role in clean.values() if not role), ())
        tower = found[0] if found else ""
        groups: dict[int | None, dict[str, tuple[str, tuple[int, ...]]]] = {None: {}}
        own = {}
        for name, tensor in state.items():
            whole, role = clean[name]
            whole = name if role not in ("", "scale") else whole
            inside = whole.startswith(tower)
            common = common_name(whole.removeprefix(tower)) if inside else _ELSEWHERE + whole
            block = block_of(common)
            groups.setdefault(block, {})[common] = (name, tuple(tensor.shape))
            own[whole.removeprefix(tower) if inside else common] = common
        floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
        blocks = [groups[index] for index in sorted(index for index in groups if index is not None)]
        return cls(groups[None], blocks, own, next(iter(floating), torch.float32), tower, len(blocks))


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits the marked model, up to the last tap.

    Attributes:
        tower: what stands before the names of the image tower that was read.
        matched: tensors of the model that were loaded as they are.
        converted: what was done to others → to how many.
        missing: names of the model's tensors that the checkpoint does not have, or not in the right shape.
        why: of some of the missing, what stands in their place.
        ignored: names of the checkpoint's tensors that were not used.
        odd: those of `ignored` which the suspect's own image tower seems to compute with.
        doubts: what may hide a mark: a suspect that has any is never "no match".
    """

    tower: str = ""
    matched: int = 0
    converted: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    why: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def missing_and_why(self) -> list[str]:
        """The first of what is missing, each with what stands in its place."""
        return shown_names(
            tuple(f"{name} ({self.why[name]})" if name in self.why else name for name in self.missing)
        )

    def __str__(self) -> str:
        read = [f"{self.matched} tensors as they are"]
        read += [f"{count} after conversion ({what})" for what, count in self.converted.items()]
        lines = [f"  read: {', '.join(read)}" + (f"; all under {self.tower!r}" if self.tower else "")]
        if self.missing:
            lines.append(f"  missing: {', '.join(self.missing_and_why)}")
        if self.ignored:
            names = ", ".join(shown_names(self.ignored, 5))
            lines.append(f"  not used: {len(self.ignored)} tensors ({names})")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The fit as JSON types; of long lists the first 20 names and how many more there are."""
        return {
            "tower": self.tower[:_LONGEST_NAME],
            "matched": self.matched,
            "converted": self.converted,
            "missing": self.missing_and_why,
            "ignored": shown_names(self.ignored),
            "odd": shown_names(self.odd),
            "doubts": shown_names(self.doubts),
        }


def shown_names(names: tuple[str, ...], most: int = _SHOWN_NAMES) -> list[str]:
    """The first names, none of them endless or with control characters, and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ["".join(c if c.isprintable() else "?" for c in n[:_LONGEST_NAME]) for n in names[:most]] + more


@dataclass(frozen=True)
class _Part:
    """A tensor of the checkpoint with what is merged into it: names of A, B and magnitude, factor."""

    source: Source
    lora: tuple[str, str, str | None, float] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        if _core(self.shape) == _core(shape):
            return True
        return (len(self.shape) == 1 or len(_core(shape)) == 1) and math.prod(self.shape) == math.prod(shape)

    def names(self) -> Iterator[str]:
        yield from self.source.names.values()
        yield from (name for name in (self.lora or ())[:3] if isinstance(name, str))

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        value = self.source.value(tensors)
        if self.lora is not None:
            a, b, magnitude, factor = self.lora
            value = value.float() + factor * (tensors[b].float() @ tensors[a].float())
            if magnitude is not None:  # DoRA (Liu et al. 2024): each row's length is learned apart
                value = value * (tensors[magnitude].float().reshape(-1, 1) / value.norm(dim=1, keepdim=True))
        return value


@dataclass(frozen=True)
class _Zeros:
    """Rows that the checkpoint leaves out because they are zero."""

    shape: tuple[int, ...]

    def names(self) -> Iterator[str]:
        yield from ()

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        like = next(iter(tensors.values()))
        return torch.zeros(self.shape, device=like.device)


@dataclass(frozen=True)
class _Step:
    """How one tensor of the model is made, and, in words, what that does to the checkpoint's."""

    target: str
    shape: tuple[int, ...]
    parts: tuple[_Part | _Zeros, ...]
    how: tuple[str, ...] = ()
    slice: tuple[int, int] | None = None  # (which, of how many) equal shares of the rows
    heads: int | None = None  # rows are sorted by head, then by query, key and value
    resize: tuple[int, int, tuple[int, int]] | None = None  # leading rows there are, wanted; grid wanted
    patch: str | None = None  # how a patch embedding of another kind is unfolded
    first_row_of: _Part | None = None  # added

    def names(self) -> Iterator[str]:
        for part in (*self.parts, *([self.first_row_of] if self.first_row_of is not None else [])):
            yield from part.names()

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = [part.value(tensors) for part in self.parts]
        value = values[0] if len(values) == 1 else torch.cat([value.float() for value in values])
        if self.heads is not None:
            value = value.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        if self.slice is not None:
            value = value.chunk(self.slice[1])[self.slice[0]]
        if self.resize is not None:
            value = _resized_positions(value.flatten(0, -2), *self.resize)
        if self.patch is not None:
            value = _unfolded_patch(value.float(), self.patch, self.shape)
        if self.first_row_of is not None:
            value = value.flatten() + self.first_row_of.value(tensors).flatten(0, -2)[0]
        return value.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Plan:
    """What to read of a checkpoint and what to make of it.

    Attributes:
        root: what stands before the names of the checkpoint's whole model.
        names: the tensors to read.
        steps: how each of the model's tensors is made.
        neutral: own name → value of what the checkpoint does not have but can be done without.
        depth: how many blocks, from the first, are complete.
        blocks: how many blocks the checkpoint's tower seems to have.
        fit: for the report.
        narrowing: makes the model's tensors of what the steps make, where that has other widths.
    """

    root: str
    names: tuple[str, ...]
    steps: tuple[_Step, ...]
    neutral: dict[str, float]
    depth: int
    blocks: int
    fit: Fit
    narrowing: Callable[[dict[str, Tensor]], Iterator[tuple[str, Tensor]]] | None = None

    def tensors(self, read: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors, in the dtypes of the checkpoint or float32."""
        made = ((step.target, step.value(read)) for step in self.steps)
        if self.narrowing is None:
            yield from made
        else:
            yield from self.narrowing(dict(made))


def plans(
    wanted: Wanted,
    stored: Mapping[str, Stored],
    lora_config: Mapping[str, Any] | None = None,
    unread: Mapping[str, str] | None = None,
    read: Callable[[Iterable[str]], Mapping[str, Tensor]] | None = None,
) -> list[Plan]:
    """Plans the loading of a checkpoint: one plan for every image tower it holds, the best first.

    Args:
        wanted: what the model needs.
        stored: the checkpoint's tensors.
        lora_config: the content of adapter_config.json, where there is one.
        unread: name → what stands there in place of a tensor.
        read: gives tensors by their stored names. Asked where a tower has more blocks than the model: those
            that change nothing are left out.

    Returns:
        At least one plan; of depth 0 where no tower fits.

    Raises:
        UnreadFormError: the tensors are kept in a form that is not read.
    """
    base, adapters = sorted_out([*stored, *(unread or {})])
    anchors = [name for name, common in wanted.own.items() if common == PATCH] or list(wanted.own)[:1]
    found = towers(base, anchors)
    if any(clean.endswith("_flat_param") for clean in base):
        raise UnreadFormError("flat parameters of FSDP: gather a full state dict first")
    made = [
        plan
        for tower in (found or [""])[:_MOST_TOWERS]
        for plan in _Planner(
            wanted, stored, tower, base, adapters, lora_config or {}, unread or {}, read
        ).plans()
    ]
    if len(found) > _MOST_TOWERS:
        raise UnreadFormError(f"{len(found)} image towers, of which at most {_MOST_TOWERS} are read")
    return sorted(made, key=lambda plan: (-plan.depth, -len(plan.steps)))


class _Planner:
    """Makes the plans for one tower."""

    def __init__(
        self,
        wanted: Wanted,
        stored: Mapping[str, Stored],
        tower: str,
        base: Mapping[str, Mapping[str, str]],
        adapters: Adapters,
        lora_config: Mapping[str, Any],
        unread: Mapping[str, str],
        read: Callable[[Iterable[str]], Mapping[str, Tensor]] | None,
    ) -> None:
        self.wanted = wanted
        self.doubts: list[str] = []
        self.stored = stored
        self.tower = tower
        self.base = base
        self.adapters = adapters
        self.lora_config = lora_config
        self.unread = unread
        self.root = tower.removesuffix(wanted.tower)
        self.found: dict[str, str] = {}  # common name → clean name
        for clean in base:
            if clean.startswith(tower):
                relative = clean.removeprefix(tower)
                self.found[wanted.own.get(relative) or common_name(relative)] = clean
            elif clean.startswith(self.root) and tower.endswith(wanted.tower):
                self.found[_ELSEWHERE + clean.removeprefix(self.root)] = clean
        if wanted.tower == "":
            self.found |= {name: f"{tower}{name}" for name in wanted.own if f"{tower}{name}" in base}
        self._tell_three_matrices_apart()
        self.left_out = self._leave_out_identities(read) if read is not None else 0
        self.narrowing = self._other_widths()
        if self.narrowing is not None:
            self.wanted = replace(wanted, stem=self.narrowing.stem, blocks=self.narrowing.blocks)

    def plans(self) -> list[Plan]:
        """One plan, or one for each order in which a linear patch embedding may take its pixels."""
        parts = self.base.get(self.found.get(PATCH, ""), {})
        source = source_of("", parts, self.stored) if parts and not self._unread(parts) else ""
        linear = isinstance(source, Source) and len(source.shape) == 2
        orders = ("channels first", "channels last") if linear and len(self._wanted_patch()) == 4 else ("",)
        return [self._plan(order) for order in orders]

    def _wanted_patch(self) -> tuple[int, ...]:
        return self.wanted.stem.get(PATCH, ("", ()))[1]

    def _plan(self, order: str) -> Plan:
        self.order = order
        self.converted: dict[str, int] = {}
        if self.left_out:
            self.converted["blocks that change nothing, left out"] = self.left_out
        self.why: dict[str, str] = {}
        self.missing: list[str] = []
        self.neutral: dict[str, float] = {}
        self.doubts = list(self.narrowing.doubts) if self.narrowing is not None else []
        self.plain = 0
        exact = self.wanted.grid is None  # then all that is missing has to be told
        steps, complete = self._steps(self.wanted.stem)
        depth = 0
        for block in self.wanted.blocks:
            if not complete and not exact:
                break
            more, complete = self._steps(block)
            if complete or exact:
                steps += more
                depth += complete
        narrowing, neutral = None, self.neutral
        if self.narrowing is not None:
            self.converted |= dict.fromkeys(self.narrowing.told, len(steps))
            narrowing = partial(self.narrowing.tensors, neutral=neutral, depth=depth)
            neutral = {}
        used = {name for step in steps for name in step.names()}
        odd = tuple(name for name in self._computed(depth) if name not in used)
        blocks = len(self._indices())
        if blocks != self.wanted.depth:
            self.doubts.append(f"it has {blocks} blocks, the marked model {self.wanted.depth}")
        return Plan(
            self.root,
            tuple(sorted(used)),
            tuple(steps),
            neutral,
            depth,
            blocks,
            Fit(
                self.tower,
                self.plain,
                self.converted,
                tuple(self.missing),
                self.why,
                tuple(name for name in (*self.stored, *self.unread) if name not in used),
                odd,
                (*self.doubts, *odd),
            ),
            narrowing,
        )

    def _other_widths(self) -> Narrowing | None:
        """What brings residual stream and attention to the model's widths, where they have others."""
        if self.wanted.grid is None:
            return None

        def sizes(common: str) -> tuple[int, ...]:
            part = self._part(common) if common in self.found else ""
            return part.shape if isinstance(part, _Part) else ()

        width, *_ = (*sizes(PATCH), 0)
        outs = [sizes(f"blocks.{index}.attn.proj.weight") for index in range(len(self.wanted.blocks))]
        inner = {index: out[1] for index, out in enumerate(outs) if len(out) == 2}
        return Narrowing.of(self.wanted.stem, self.wanted.blocks, self.wanted.heads, width, inner)

    def _indices(self) -> list[int]:
        """The indices of the tower's blocks."""
        return sorted({index for index in map(block_of, self.found) if index is not None})

    def _leave_out_identities(self, read: Callable[[Iterable[str]], Mapping[str, Tensor]]) -> int:
        """Takes out blocks that add nothing to the residual stream, where there are more than wanted."""
        indices = self._indices()
        if len(indices) <= self.wanted.depth:
            return 0

        def zero(common: str) -> bool | None:
            part = self._part(common) if common in self.found else None
            if not isinstance(part, _Part):
                return None
            return not bool(part.value(read(part.names())).any())

        def adds_nothing(index: int) -> bool:
            return all(
                zero(f"blocks.{index}.{scale}") is True
                or (
                    zero(f"blocks.{index}.{module}.weight") is True
                    and zero(f"blocks.{index}.{module}.bias") is not False
                )
                for module, scale in (("attn.proj", "ls1"), ("mlp.fc2", "ls2"))
            )

        kept = [index for index in indices if not adds_nothing(index)]
        place = {index: new for new, index in enumerate(kept)}
        found = {}
        for common, clean in self.found.items():
            index = block_of(common)
            if index is None:
                found[common] = clean
            elif index in place:
                found[common.replace(f"blocks.{index}.", f"blocks.{place[index]}.", 1)] = clean
        self.found = found
        return len(indices) - len(kept)

    def _tell_three_matrices_apart(self) -> None:
        """mlp.w1, w2, w3: the last is the way back in DINOv2's naming, the second in Llama's."""
        for clean in [name for name in self.found.values() if name.endswith(".mlp.w3.weight")]:
            module = clean.removesuffix("w3.weight")
            prefix = next(common for common, name in self.found.items() if name == clean)
            prefix = prefix.removesuffix("w3.weight")
            rows = [self._rows(f"{module}{matrix}.weight") for matrix in ("w1", "w2", "w3")]
            back, up = ("w2", "w3") if rows[0] == rows[2] else ("w3", "w2")
            if rows[0] is None:
                back, up = "w3", ""  # DINOv2's w12 and w3
            for spelled, common in ((back, "fc2"), (up, "up"), ("w1", "gate")):
                for kind in ("weight", "bias"):
                    if spelled and f"{module}{spelled}.{kind}" in self.base:
                        self.found[f"{prefix}{common}.{kind}"] = f"{module}{spelled}.{kind}"
                        self.found.pop(f"{prefix}{spelled}.{kind}", None)

    def _rows(self, clean: str) -> int | None:
        name = self.base.get(clean, {}).get("", "")
        return self.stored[name].shape[0] if name in self.stored and self.stored[name].shape else None

    def _unread(self, parts: Mapping[str, str]) -> str | None:
        return next((self.unread[name] for name in parts.values() if name in self.unread), None)

    def _computed(self, depth: int) -> list[str]:
        """The floating tensors that the suspect's own tower must use in its stem and first `depth` blocks."""
        names: list[str] = []
        for common, clean in self.found.items():
            block = block_of(common)
            inside = block < depth if block is not None else common in STEM
            if inside and not (common.endswith(".attn.k.bias") and self._keys_need_no_bias):
                names += [
                    name
                    for name in self.base[clean].values()
                    if name in self.unread or self.stored[name].dtype.is_floating_point
                ]
        for module, sets in self.adapters.items():
            block = block_of(common_name(f"{module.removeprefix(self.tower)}.weight"))
            if module.startswith(self.tower) and block is not None and block < depth:
                names += [name for pair in sets.values() for name in pair.values()]
        return names

    @property
    def _keys_need_no_bias(self) -> bool:
        """A bias of the keys adds the same to all scores of a query, which softmax takes out again."""
        return not any(common.endswith(".k_norm.weight") for common in self.found)

    def _steps(self, group: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[list[_Step], bool]:
        """The steps for one block or the stem, and whether it can do without what is missing."""
        steps: list[_Step] = []
        complete = True
        for common, (own, shape) in group.items():
            step = self._step(common, own, shape)
            if isinstance(step, _Step):
                steps.append(step)
                self.plain += not step.how
                for what in step.how:
                    self.converted[what] = self.converted.get(what, 0) + 1
                continue
            if common.endswith(".attn.k.bias") and not step and self._keys_need_no_bias:
                self.neutral[own] = 0.0
                continue
            self.missing.append(own)
            if step:
                self.why[own] = step
            if common.endswith(".bias") or common.endswith(_LAYER_SCALES):
                self.neutral[own] = 1.0 if common.endswith(_LAYER_SCALES) else 0.0
                self.doubts.append(own)
            else:
                complete = False
        return steps, complete

    def _step(self, common: str, own: str, shape: tuple[int, ...]) -> _Step | str:
        """How a tensor is made; or why it cannot be, "" where nothing of it is there."""
        if common not in self.found:
            return self._of_several(common, own, shape)
        part = self._part(common)
        if isinstance(part, str):
            return part
        how = self._how(part)
        if common == "pos" and not part.fits(shape):
            return self._positions(own, shape, part, how)
        if common == PATCH and not part.fits(shape):
            return self._patch(own, shape, part, how)
        if not part.fits(shape):
            if self._other_units(common, part.shape, shape):
                units = part.shape[1 if ".fc2." in common else 0]
                return _Step(own, part.shape, (part,), (*how, f"MLP of {units} units"))
            return f"{_kind(part.source)}, wanted {shape}"
        row = None
        if common == "cls" and "pos" in self.found and "pos" in self.wanted.stem and self.wanted.grid:
            positions = self._part("pos")
            leading = self._leading_rows(self.wanted.stem["pos"][1])
            if leading == (1, 0) and isinstance(positions, _Part):
                row = positions  # the model adds no position to the class token
                how = (*how, "class token plus its position")
        return _Step(own, shape, (part,), how, first_row_of=row)

    def _other_units(self, common: str, there: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        """Whether a tensor of an MLP differs only in how many units that has, and all others do, too.

        The model's MLP is then made as wide: what it adds to the residual stream is all that counts.
        """
        match = re.fullmatch(r"(blocks\.\d+\.mlp)\.(fc1|gate|up|fc2)\.(weight|bias)", common)
        if match is None or self.wanted.grid is None or len(there) != len(wanted) or 0 in there:
            return False
        axis = 1 if match[2] == "fc2" else 0
        if len(there) <= axis or there[:axis] + there[axis + 1 :] != wanted[:axis] + wanted[axis + 1 :]:
            return False
        sizes = {}
        for name, at in (
            ("fc1.weight", 0),
            ("fc1.bias", 0),
            ("fc2.weight", 1),
            ("gate.weight", 0),
            ("up.weight", 0),
        ):
            part = self._part(f"{match[1]}.{name}") if f"{match[1]}.{name}" in self.found else None
            if isinstance(part, _Part):
                sizes[name] = part.shape[at] if len(part.shape) > at else 0
        return "fc2.weight" in sizes and len(set(sizes.values())) == 1 and len(sizes) > 1

    def _of_several(self, common: str, own: str, shape: tuple[int, ...]) -> _Step | str:
        """A tensor that the checkpoint keeps in other pieces than the model does."""
        module, _, kind = common.rpartition(".")
        index = block_of(common)
        if index is None:
            return ""
        prefix = f"blocks.{index}."
        name = module.removeprefix(prefix)

        def there(*pieces: str) -> bool:
            return all(f"{prefix}{piece}.{kind}" in self.found for piece in pieces)

        for pieces in FUSED.get(name, ()):
            if there(*pieces):
                return self._joined(common, own, shape, [f"{prefix}{piece}.{kind}" for piece in pieces])
        if name == "attn.qkv" and kind == "bias" and there("attn.q", "attn.v") and len(shape) == 1:
            q, v = (f"{prefix}{piece}.bias" for piece in ("attn.q", "attn.v"))
            return self._joined(common, own, shape, [q, None, v])
        if name == "attn.qkv" and there("attn.qkv_by_head"):
            if self.wanted.heads is None or shape[0] % (3 * self.wanted.heads):
                return "queries, keys and values sorted by head, of which the number is not known"
            return self._share(f"{prefix}attn.qkv_by_head.{kind}", common, own, shape, None)
        for whole, choices in FUSED.items():
            for pieces in choices:
                if name in pieces and there(whole) and len(pieces) == len(choices[0]):
                    at = (pieces.index(name), len(pieces))
                    return self._share(f"{prefix}{whole}.{kind}", common, own, shape, at)
        if name in ("attn.k", "attn.v") and there("attn.kv"):
            return self._share(f"{prefix}attn.kv.{kind}", common, own, shape, (int(name == "attn.v"), 2))
        return ""

    def _joined(
        self, common: str, own: str, shape: tuple[int, ...], commons: list[str | None]
    ) -> _Step | str:
        made = [None if piece is None else self._part(piece) for piece in commons]
        for part in made:
            if isinstance(part, str):
                return part
        rows = [part.shape for part in made if isinstance(part, _Part)]
        # The rows that are left out are as many as those of each other piece.
        parts = tuple(_Zeros(rows[0]) if part is None else part for part in made if not isinstance(part, str))
        misfit = f"pieces of shapes {', '.join(map(str, rows))}, wanted {shape}"
        if any(not part.shape or part.shape[1:] != shape[1:] for part in parts):
            return misfit
        whats = {what for part in parts if isinstance(part, _Part) for what in self._how(part)} | {"fused"}
        whole = (sum(part.shape[0] for part in parts), *shape[1:])
        if whole == shape:
            return _Step(own, shape, parts, tuple(sorted(whats)))
        return misfit

    def _share(
        self, stored: str, common: str, own: str, shape: tuple[int, ...], at: tuple[int, int] | None
    ) -> _Step | str:
        part = self._part(stored)
        if isinstance(part, str):
            return part
        shares = at[1] if at else 1
        if part.shape == (shares * shape[0], *shape[1:]):
            if at is None:
                how = (*self._how(part), "sorted by head")
                return _Step(own, shape, (part,), how, heads=self.wanted.heads)
            return _Step(own, shape, (part,), (*self._how(part), "split"), slice=at)
        return f"{_kind(part.source)}, wanted {shares} of {shape}"

    def _part(self, common: str) -> _Part | str:
        """A tensor of the checkpoint as numbers; or why it is none."""
        clean = self.found[common]
        unread = self._unread(self.base[clean])
        if unread is not None:
            return f"a {unread[:100]}, which is not read"
        source = source_of(clean, self.base[clean], self.stored)
        if isinstance(source, str):
            return source
        if source.doubtful and clean not in self.doubts:
            self.doubts.append(clean)
        if not math.prod(source.shape) and clean.endswith(".weight"):
            return "empty, as DeepSpeed ZeRO leaves it: gather the weights with its zero_to_fp32.py"
        module, _, kind = clean.rpartition(".")
        return _Part(source, self._lora(module, source.shape) if kind == "weight" else None)

    def _how(self, part: _Part) -> tuple[str, ...]:
        how = [part.source.how] if part.source.how else []
        if not how and part.source.dtype != self.wanted.dtype:
            how.append(str(part.source.dtype).removeprefix("torch."))
        if part.lora is not None:
            kind = "LoRA" if part.lora[2] is None else "DoRA"
            how.append(f"{kind} merged with the factor {part.lora[3]:g}")
        return tuple(how)

    def _lora(self, module: str, whole: tuple[int, ...]) -> tuple[str, str, str | None, float] | None:
        sets = self.adapters.get(module)
        if not sets:
            return None
        parts = sets["default" if "default" in sets else min(sets)]
        if not {"lora_A", "lora_B"} <= parts.keys():
            return None
        magnitude = parts.get("lora_magnitude_vector")
        a, b = (tuple(self.stored[parts[part]].shape) for part in ("lora_A", "lora_B"))
        if not (len(a) == len(b) == len(whole) == 2) or (b[0], a[1]) != whole or a[0] != b[1] or not a[0]:
            return None
        if magnitude is not None and math.prod(self.stored[magnitude].shape) != whole[0]:
            return None
        rank = a[0]
        alpha = self.lora_config.get("lora_alpha", rank)
        patterns = self.lora_config.get("alpha_pattern")
        for ending, value in patterns.items() if isinstance(patterns, dict) else ():
            if module == ending or module.endswith(f".{ending}"):
                alpha = value
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            return None
        factor = alpha / (math.sqrt(rank) if self.lora_config.get("use_rslora") is True else rank)
        return parts["lora_A"], parts["lora_B"], magnitude, factor

    def _leading_rows(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """How many rows of the positions, there and wanted, are no patch's; None where it cannot be told."""
        positions = self._part("pos")
        if self.wanted.grid is None or isinstance(positions, str):
            return None
        patches = self.wanted.grid[0] * self.wanted.grid[1]
        wanted = math.prod(shape[:-1]) - patches
        rows = math.prod(positions.shape[:-1])
        if rows == patches + wanted:
            return wanted, wanted
        if wanted < rows - patches <= _MOST_REGISTERS:
            return rows - patches, wanted  # rows of registers, which follow those of the class token
        for leading in (wanted, 1, 0):
            if rows > leading and math.isqrt(rows - leading) ** 2 == rows - leading:
                return leading, wanted
        return None

    def _positions(self, own: str, shape: tuple[int, ...], part: _Part, how: tuple[str, ...]) -> _Step | str:
        leading = self._leading_rows(shape)
        width = part.shape[-1] if part.shape else None
        if leading is None or width != shape[-1] or not (min(leading) == 0 or leading[0] >= leading[1]):
            return f"{_kind(part.source)}, wanted {shape}"
        assert self.wanted.grid is not None  # else there were no leading rows
        resize = (*leading, self.wanted.grid)
        return _Step(own, shape, (part,), (*how, "positions resized"), resize=resize)

    def _patch(self, own: str, shape: tuple[int, ...], part: _Part, how: tuple[str, ...]) -> _Step | str:
        """A patch embedding that is linear, of videos, of grey images, or of other patches."""
        there = part.shape
        misfit = f"{_kind(part.source)}, wanted {shape}"
        if self.wanted.grid is None or len(shape) != 4 or not there or there[0] != shape[0]:
            return misfit
        if len(there) == 2 and there[1] == math.prod(shape[1:]):
            kind = self.order
        elif len(there) == 5 and (there[1], *there[3:]) == shape[1:]:
            kind = "of videos"
        elif len(there) == 4 and there[2:] == shape[2:] and there[1] == 1:
            kind = "of grey images"
        elif len(there) == 4 and there[2:] == shape[2:] and there[1] > shape[1]:
            kind = "of more channels"
        elif len(there) == 4 and there[1] == shape[1] and there[2] == there[3] <= 64:
            kind = "of other patches"
        else:
            return misfit
        if kind in ("of grey images", "of more channels", "of other patches"):
            self.doubts.append(f"a patch embedding {kind}")
        what = f"patch embedding {'linear, ' if len(there) == 2 else ''}{kind}"
        return _Step(own, shape, (part,), (*how, what), patch=kind)


def _kind(source: Source) -> str:
    return f"{str(source.dtype).removeprefix('torch.')} {source.shape}"


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without leading ones: libraries keep tokens as (D), (1, D) or (1, 1, D)."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return tuple(shape)


def _resized_positions(rows: Tensor, leading: int, wanted: int, grid: tuple[int, int]) -> Tensor:
    """(n, D) positions for another grid, float32; leading rows are dropped, or zero where there are none."""
    rows = rows.float()
    patches = rows[leading:]
    side = math.isqrt(len(patches))
    image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if (side, side) != grid:
        image = interpolate(image, grid, mode="bicubic", antialias=True, align_corners=False)
    first = rows[:leading] if leading else rows.new_zeros(wanted, rows.shape[1])
    return torch.cat([first[:wanted], image.flatten(2).transpose(1, 2)[0]])


def _unfolded_patch(weight: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """A patch embedding of `kind` as a (D, channels, rows, columns) convolution of single colour images."""
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
