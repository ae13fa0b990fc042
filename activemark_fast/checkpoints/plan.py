"""Which tensor of a checkpoint is which of a model's, and what the result does not know.

Nothing is read here: plans are made from names, dtypes and shapes, one for every image tower that a file
holds, and carried out once the tensors they ask for are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from activemark_fast.checkpoints.errors import UnreadFormError
from activemark_fast.checkpoints.fit import Fit
from activemark_fast.checkpoints.image_tower import Held, ImageTower, Read
from activemark_fast.checkpoints.matching import Matcher
from activemark_fast.checkpoints.names import (
    PATCH,
    STEM,
    block_of,
    sorted_out,
    stray_stacks,
    towers,
    within,
    without_wrappers,
)
from activemark_fast.checkpoints.steps import Step
from activemark_fast.checkpoints.stored import Stored
from activemark_fast.checkpoints.wanted import Group, Wanted
from activemark_fast.checkpoints.width import Narrowing

_MAX_TOWERS = 16
_LAYER_SCALES = (".ls1", ".ls2")


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
    steps: tuple[Step, ...]
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
    read: Read | None = None,
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
        At least one plan; of depth 0 where no tower fits. More than one for a tower where its tensors do not
        tell how they are to be read.

    Raises:
        UnreadFormError: the tensors are kept in a form that is not read.
    """
    base, adapters = sorted_out([*stored, *(unread or {})])
    held = Held(stored, unread or {}, lora_config or {}, base, adapters)
    anchors = [name for name, common in wanted.own.items() if common == PATCH] or list(wanted.own)[:1]
    found = towers(base, anchors)
    if any(clean.endswith("_flat_param") for clean in base):
        raise UnreadFormError("flat parameters of FSDP: gather a full state dict first")
    if len(found) > _MAX_TOWERS:
        raise UnreadFormError(f"{len(found)} image towers, of which at most {_MAX_TOWERS} are read")
    every = [ImageTower(prefix, held, wanted) for prefix in found or [""]]
    doubts = [*_stray_stacks(every, held, wanted), *_twins(every, held, wanted)]
    made = [plan for tower in every for plan in _of_tower(tower, wanted, read, doubts)]
    return sorted(made, key=lambda plan: (-plan.depth, -len(plan.steps)))


def _stray_stacks(every: list[ImageTower], held: Held, wanted: Wanted) -> list[str]:
    """Stacks of blocks like the model's that are in none of the towers: they may hide one."""
    if wanted.grid is None or not wanted.blocks:
        return []
    shapes = {within(common): shape for common, (_, shape) in wanted.blocks[0].items()}
    placed = [name for tower in every for common, name in tower.found.items() if block_of(common) is not None]

    def alike(common: str, clean: str) -> bool:
        name = held.base[clean].get("", "")
        return name in held.stored and shapes.get(common) == tuple(held.stored[name].shape)

    return [
        f"blocks under {before!r} without a patch embedding of a name that is known"
        for before, stack in stray_stacks(placed, held.base).items()
        if 2 * sum(any(alike(*named) for named in block) for block in stack.values()) >= wanted.depth
    ]


def _twins(every: list[ImageTower], held: Held, wanted: Wanted) -> list[str]:
    """Tensors that play a part which another was chosen for: a suspect may compute with either."""
    if wanted.grid is None:
        return []
    parts = [(tower, common, clean) for tower in every for common, clean in tower.found.items()]
    placed = {clean for _, common, clean in parts if block_of(common) is not None or common in STEM}
    return [
        f"{clean.rpartition(' ')[2]!r} beside {chosen!r}"
        for clean in held.base
        if clean not in placed and "decoder." not in clean
        for tower in every
        if clean.startswith(tower.prefix)
        if (chosen := tower.found.get(tower.common(without_wrappers(clean.removeprefix(tower.prefix)))))
        if chosen in placed and chosen != clean
    ]


def _of_tower(tower: ImageTower, wanted: Wanted, read: Read | None, doubts: list[str]) -> Iterator[Plan]:
    """One plan; or one for each order in which its tensors may be sorted, where they do not tell.

    doubts: of the whole checkpoint.
    """
    left_out = tower.count_blocks(wanted.depth, read) if read is not None else 0
    choices = _heads(tower, wanted)
    narrowing = _other_widths(tower, wanted)
    if narrowing is not None:
        wanted = replace(wanted, stem=narrowing.stem, blocks=narrowing.blocks)
    linear = len(tower.shape(PATCH)) == 2 and len(wanted.stem.get(PATCH, ("", ()))[1]) == 4
    for order in ("channels first", "channels last") if linear else ("",):
        for heads in choices:
            yield _planned(Matcher(tower, wanted, order, heads), narrowing, left_out, doubts)


def _heads(tower: ImageTower, wanted: Wanted) -> list[int | None]:
    """How many heads there may be, longer ones or more, where queries, keys and values are sorted by them."""
    name = "blocks.0.attn.proj.weight"
    shapes = [tower.shape(name), *(block[name][1] for block in wanted.blocks[:1] if name in block)]
    by_head = "blocks.0.attn.qkv_by_head.weight" in tower.found
    if wanted.heads is None or not by_head or [len(shape) for shape in shapes] != [2, 2]:
        return [wanted.heads]
    there, inner = (shape[1] for shape in shapes)
    size = inner // wanted.heads
    return [wanted.heads, *([there // size] if there != inner and there % size == 0 else [])]


def _other_widths(tower: ImageTower, wanted: Wanted) -> Narrowing | None:
    """What brings residual stream and attention to the model's widths, where they have others."""
    if wanted.grid is None:
        return None
    width, *_ = (*tower.shape(PATCH), 0)
    outs = [tower.shape(f"blocks.{index}.attn.proj.weight") for index in range(len(wanted.blocks))]
    inner = {index: out[1] for index, out in enumerate(outs) if len(out) == 2}
    return Narrowing.of(wanted.stem, wanted.blocks, wanted.heads, width, inner)


class _Steps:
    """The steps of a plan, and what they say: see `Fit`."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self.made: list[Step] = []
        self.missing: list[str] = []
        self.why: dict[str, str] = {}
        self.neutral: dict[str, float] = {}
        self.doubts: list[str] = []

    def add(self, group: Group, whole: bool) -> bool:
        """Adds the steps for one block or the stem, with `whole` only if it is.

        Returns:
            Whether it is, or can do without what is missing.
        """
        steps: list[Step] = []
        complete = True
        for common, (own, shape) in group.items():
            step = self._matcher.step(common, own, shape)
            if isinstance(step, Step):
                steps.append(step)
                self.doubts += step.doubts
                continue
            if common.endswith(".attn.k.bias") and not step and self._matcher.tower.keys_need_no_bias:
                self.neutral[own] = 0.0
                continue
            self.missing.append(own)
            if step:
                self.why[own] = step
            if common.endswith((".bias", *_LAYER_SCALES)):
                self.neutral[own] = 1.0 if common.endswith(_LAYER_SCALES) else 0.0
                self.doubts.append(own)
            else:
                complete = False
        if complete or not whole:
            self.made += steps
        return complete


def _planned(matcher: Matcher, narrowing: Narrowing | None, left_out: int, doubts: list[str]) -> Plan:
    tower, wanted = matcher.tower, matcher.wanted
    exact = wanted.grid is None  # then all that is missing has to be told
    steps = _Steps(matcher)
    complete = steps.add(wanted.stem, whole=False)
    depth = 0
    for block in wanted.blocks:
        if complete or exact:
            complete = steps.add(block, whole=not exact)
            depth += complete
    used = {name for step in steps.made for name in step.names()}
    odd = tuple(name for name in tower.computed(depth) if name not in used)
    blocks = len(tower.indices)
    converted = Counter(what for step in steps.made for what in step.how)
    converted |= {"blocks that change nothing, left out": left_out} if left_out else {}
    doubts = [*(narrowing.doubts if narrowing is not None else ()), *steps.doubts, *doubts]
    if blocks != wanted.depth:
        doubts.append(f"it has {blocks} blocks, the marked model {wanted.depth}")
    if narrowing is not None:
        converted |= dict.fromkeys(narrowing.told, len(steps.made))
    fit = Fit(
        tower.prefix,
        sum(not step.how for step in steps.made),
        dict(converted),
        tuple(steps.missing),
        steps.why,
        tuple(name for name in (*tower.held.stored, *tower.held.unread) if name not in used),
        odd,
        tuple(dict.fromkeys([*doubts, *odd])),
    )
    neutral, narrow = steps.neutral, None
    if narrowing is not None:
        neutral, narrow = {}, partial(narrowing.tensors, neutral=steps.neutral, depth=depth)
    return Plan(tower.root, tuple(sorted(used)), tuple(steps.made), neutral, depth, blocks, fit, narrow)
