"""Which tensor of a checkpoint is which of the marked model's, whatever library or wrapper wrote it.

Names are brought to one vocabulary (timm's, roughly): those of timm, DINOv2, open_clip, transformers (old and
new) and torchvision are known, others are compared as they are. The image tower is found by its patch
embedding, so any prefix may stand before it. Nothing is read here: a plan is made from names, dtypes and
shapes, and carried out once the tensors it asks for are there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_SHOWN_NAMES = 20
_LONGEST_NAME = 120
_MOST_TOWERS = 16
_QUANTISED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_TORCH_QUANTISED = ("torch.qint8", "torch.quint8", "torch.qint32")  # by name: torch will drop them
_SCB_STEPS = 127
"""bitsandbytes' int8: a weight is its integer times its row's SCB over 127."""

_PATCH = "patch.weight"
_STEM = {
    "patch": (
        "patch_embed.proj",
        "conv1",
        "conv_proj",
        "embeddings.patch_embedding",
        "embeddings.patch_embeddings.projection",
    ),
    "norm_pre": ("norm_pre", "ln_pre", "pre_layrnorm", "pre_layernorm"),
}
_STEM_TENSORS = {
    "cls": (
        "cls_token",
        "class_token",
        "class_embedding",
        "embeddings.class_embedding",
        "embeddings.cls_token",
    ),
    "pos": (
        "pos_embed",
        "positional_embedding",
        "encoder.pos_embedding",
        "embeddings.position_embedding.weight",
        "embeddings.position_embeddings",
    ),
    "reg": ("reg_token", "register_tokens", "embeddings.register_tokens"),
}
_BLOCK = {
    "norm1": ("norm1", "ln_1", "layer_norm1", "layernorm_before"),
    "norm2": ("norm2", "ln_2", "layer_norm2", "layernorm_after"),
    "attn.qkv": ("attn.qkv",),
    "attn.q": ("attn.q_proj", "self_attn.q_proj", "attention.q_proj", "attention.attention.query"),
    "attn.k": ("attn.k_proj", "self_attn.k_proj", "attention.k_proj", "attention.attention.key"),
    "attn.v": ("attn.v_proj", "self_attn.v_proj", "attention.v_proj", "attention.attention.value"),
    "attn.q_norm": ("attn.q_norm",),
    "attn.k_norm": ("attn.k_norm",),
    "attn.proj": (
        "attn.proj",
        "attn.out_proj",
        "self_attn.out_proj",
        "self_attention.out_proj",
        "attention.o_proj",
        "attention.output.dense",
    ),
    "mlp.fc1": (
        "mlp.fc1",
        "mlp.c_fc",
        "mlp.0",
        "mlp.linear_1",
        "intermediate.dense",
        "mlp.w12",
        "mlp.weights_in",
    ),
    "mlp.gate": ("mlp.fc1_g", "mlp.gate_proj"),
    "mlp.up": ("mlp.fc1_x", "mlp.up_proj"),
    "mlp.fc2": (
        "mlp.fc2",
        "mlp.c_proj",
        "mlp.3",
        "mlp.linear_2",
        "output.dense",
        "mlp.w3",
        "mlp.weights_out",
        "mlp.down_proj",
    ),
}
_BLOCK_TENSORS = {
    "attn.qkv.weight": ("attn.in_proj_weight", "self_attention.in_proj_weight"),
    "attn.qkv.bias": ("attn.in_proj_bias", "self_attention.in_proj_bias"),
    "ls1": ("ls1.gamma", "ls_1.gamma", "layer_scale1.lambda1"),
    "ls2": ("ls2.gamma", "ls_2.gamma", "layer_scale2.lambda1"),
}
_FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate", "mlp.up")}
"""Matrices that some libraries keep as one, stacked in this order, and others apart."""

_BLOCK_NAME = re.compile(
    # DINOv2 may keep its blocks in chunks, blocks.CHUNK.INDEX.
    r"(?:blocks(?:\.\d{1,4}(?=\.\d))?\.|transformer\.resblocks\.|(?:encoder\.)?layers?\.|"
    r"encoder\.layers\.encoder_layer_)(\d{1,4})\.(.+)"
)
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")


def _table(modules: Mapping[str, tuple[str, ...]], tensors: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    table = {
        f"{alias}.{kind}": f"{name}.{kind}"
        for name, aliases in modules.items()
        for alias in aliases
        for kind in ("weight", "bias")
    }
    return table | {alias: name for name, aliases in tensors.items() for alias in aliases}


_STEM_NAMES, _BLOCK_NAMES = _table(_STEM, _STEM_TENSORS), _table(_BLOCK, _BLOCK_TENSORS)


def common_name(name: str) -> str:
    """The name of a tensor of an image tower in the one vocabulary; unchanged where it is not known."""
    block = _BLOCK_NAME.fullmatch(name)
    return block_name(int(block[1]), block[2]) if block else _STEM_NAMES.get(name, name)


def block_name(index: int, name: str) -> str:
    """The common name of the tensor that block `index` calls `name`."""
    return f"blocks.{index}.{_BLOCK_NAMES.get(name, name)}"


class Stored(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Wanted:
    """What the marked model needs, up to the last tap.

    Attributes:
        stem: common name → (own name, shape) of what comes before the blocks.
        blocks: the same for each block.
        own: tower-relative own name → common name.
        grid: (rows, columns) of patches.
        dtype: of the model.
    """

    stem: dict[str, tuple[str, tuple[int, ...]]]
    blocks: list[dict[str, tuple[str, tuple[int, ...]]]]
    own: dict[str, str]
    grid: tuple[int, int]
    dtype: torch.dtype


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits the marked model, up to the last tap.

    Attributes:
        matched: tensors of the model that were loaded as they are.
        converted: what was done to others → to how many.
        missing: names of the model's tensors that the checkpoint does not have, or not in the right shape.
        ignored: names of the checkpoint's tensors that were not used.
        odd: those of `ignored` which the suspect's own image tower seems to compute with.
    """

    matched: int = 0
    converted: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The fit as JSON types; of long lists the first 20 names and how many more there are."""
        return {
            "matched": self.matched,
            "converted": self.converted,
            "missing": shown_names(self.missing),
            "ignored": shown_names(self.ignored),
            "odd": shown_names(self.odd),
        }


def shown_names(names: tuple[str, ...]) -> list[str]:
    """The first names, none of them endless, and how many more there are."""
    more = [f"and {len(names) - _SHOWN_NAMES} more"] if len(names) > _SHOWN_NAMES else []
    return [name[:_LONGEST_NAME] for name in names[:_SHOWN_NAMES]] + more


@dataclass(frozen=True)
class _Part:
    """One tensor of the checkpoint, with what makes numbers of its integers and what is merged into it."""

    name: str
    scale: str | None = None
    zero: str | None = None
    steps: float = 1.0
    lora: tuple[str, str, float] | None = None  # names of A and B, factor

    def names(self) -> Iterator[str]:
        yield self.name
        yield from (name for name in (self.scale, self.zero) if name is not None)
        yield from self.lora[:2] if self.lora is not None else ()

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        value = tensors[self.name]
        if value.is_quantized:
            value = value.dequantize()
        if self.scale is not None:
            value = value.float()
            column = (-1, *[1] * (value.ndim - 1))
            if self.zero is not None:
                value = value - tensors[self.zero].float().reshape(column)
            value = value * (tensors[self.scale].float().reshape(column) / self.steps)
        if self.lora is not None:
            a, b, factor = self.lora
            value = value.float() + factor * (tensors[b].float() @ tensors[a].float())
        return value


@dataclass(frozen=True)
class _Step:
    """How one tensor of the model is made."""

    target: str
    shape: tuple[int, ...]
    parts: tuple[_Part, ...]
    slice: tuple[int, int] | None = None  # (which, of how many) equal shares of the rows
    resize: tuple[int, int, tuple[int, int]] | None = None  # leading rows there are, wanted; grid wanted
    first_row_of: _Part | None = None  # added

    def names(self) -> Iterator[str]:
        for part in (*self.parts, *([self.first_row_of] if self.first_row_of is not None else [])):
            yield from part.names()

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = [part.value(tensors) for part in self.parts]
        value = values[0] if len(values) == 1 else torch.cat(values)
        if self.slice is not None:
            value = value.chunk(self.slice[1])[self.slice[0]]
        if self.resize is not None:
            value = _resized_positions(value.flatten(0, -2), *self.resize)
        if self.first_row_of is not None:
            value = value.flatten() + self.first_row_of.value(tensors).flatten(0, -2)[0]
        return value.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Plan:
    """What to read of a checkpoint and what to make of it.

    Attributes:
        names: the tensors to read.
        steps: how each of the model's tensors is made.
        neutral: own name → value of what the checkpoint does not have but can be done without.
        depth: how many blocks, from the first, are complete.
        fit: for the report.
    """

    names: tuple[str, ...]
    steps: tuple[_Step, ...]
    neutral: dict[str, float]
    depth: int
    fit: Fit

    def tensors(self, read: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors, in the dtypes of the checkpoint or float32."""
        for step in self.steps:
            yield step.target, step.value(read)


def plan(wanted: Wanted, stored: Mapping[str, Stored], lora_config: Mapping[str, Any] | None = None) -> Plan:
    """Plans the loading of a checkpoint.

    Args:
        wanted: what the model needs.
        stored: the checkpoint's tensors.
        lora_config: the content of adapter_config.json, where there is one.

    Returns:
        The plan for the tower that fits best; with depth 0 where none does.
    """
    base: dict[str, str] = {}
    adapters: dict[str, dict[str, dict[str, str]]] = {}  # module → adapter → A, B → name
    for name in stored:
        clean = name
        while clean.startswith("base_model.model."):
            clean = clean.removeprefix("base_model.model.")
        lora = _LORA.fullmatch(clean)
        if lora:
            adapters.setdefault(lora[1], {}).setdefault(lora[3] or "default", {})[lora[2]] = name
        elif ".original_module." not in clean:
            base[re.sub(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)", "", clean)] = name
    plans = [
        _Planner(wanted, stored, tower, base, adapters, lora_config or {}).plan()
        for tower in _towers(base, wanted)
    ]
    nothing = Plan(
        (), (), {}, 0, Fit(missing=tuple(n for n, _ in wanted.stem.values()), ignored=tuple(stored))
    )
    return max(plans, key=lambda one: (one.depth, len(one.steps)), default=nothing)


def _towers(names: Mapping[str, str], wanted: Wanted) -> list[str]:
    """What stands before the names of image towers: whatever stands before a patch embedding."""
    anchors = [name for name, common in wanted.own.items() if common == _PATCH] or list(wanted.own)[:1]
    anchors += [name for name, common in _STEM_NAMES.items() if common == _PATCH]
    towers = {
        name.removesuffix(anchor)
        for name in names
        for anchor in anchors
        if name == anchor or name.endswith(f".{anchor}")
    }
    return sorted(towers)[:_MOST_TOWERS]


class _Planner:
    """Makes the plan for one tower."""

    def __init__(
        self,
        wanted: Wanted,
        stored: Mapping[str, Stored],
        tower: str,
        base: Mapping[str, str],
        adapters: Mapping[str, dict[str, dict[str, str]]],
        lora_config: Mapping[str, Any],
    ) -> None:
        self.wanted = wanted
        self.stored = stored
        self.tower = tower
        self.base = base
        self.adapters = adapters
        self.lora_config = lora_config
        relative = {name.removeprefix(tower): name for name in base if name.startswith(tower)}
        self.found = {wanted.own.get(name) or common_name(name): clean for name, clean in relative.items()}
        self.converted: dict[str, int] = {}
        self.missing: list[str] = []
        self.neutral: dict[str, float] = {}
        self.plain = 0

    def plan(self) -> Plan:
        steps = self._steps(self.wanted.stem)
        complete = steps is not None
        steps = steps or []
        depth = 0
        for block in self.wanted.blocks if complete else []:
            more = self._steps(block)
            if more is None:
                break
            steps += more
            depth += 1
        used = {name for step in steps for name in step.names()}
        computed = self._computed(depth)
        fit = Fit(
            matched=self.plain,
            converted=self.converted,
            missing=tuple(self.missing),
            ignored=tuple(name for name in self.stored if name not in used),
            odd=tuple(name for name in computed if name not in used),
        )
        return Plan(tuple(sorted(used)), tuple(steps), self.neutral, depth, fit)

    def _computed(self, depth: int) -> list[str]:
        """The floating tensors that the suspect's own tower must use in its stem and first `depth` blocks."""
        names = []
        for common, clean in self.found.items():
            block = re.match(r"blocks\.(\d+)\.", common)
            inside = int(block[1]) < depth if block else common in _STEM_NAMES.values()
            name = self.base[clean]
            if inside and self.stored[name].dtype.is_floating_point:
                names.append(name)
        for module, sets in self.adapters.items():
            common = common_name(f"{module.removeprefix(self.tower)}.weight")
            block = re.match(r"blocks\.(\d+)\.", common)
            if module.startswith(self.tower) and block and int(block[1]) < depth:
                names += [name for pair in sets.values() for name in pair.values()]
        return names

    def _steps(self, group: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[_Step] | None:
        """The steps for one block or the stem; None where it cannot do without what is missing."""
        steps, complete = [], True
        for common, (own, shape) in group.items():
            step, how = self._step(common, own, shape)
            if step is not None:
                steps.append(step)
                self.plain += not how
                for what in how:
                    self.converted[what] = self.converted.get(what, 0) + 1
                continue
            self.missing.append(own)
            if common.endswith(".bias"):
                self.neutral[own] = 0.0
            elif common.endswith((".ls1", ".ls2")):
                self.neutral[own] = 1.0
            else:
                complete = False
        return steps if complete else None

    def _step(self, common: str, own: str, shape: tuple[int, ...]) -> tuple[_Step | None, list[str]]:
        """How a tensor is made, and what that does to the checkpoint's; None if it cannot be made."""
        if common == "pos" and common in self.found:
            return self._positions(own, shape)
        if common in self.found:
            part, how = self._part(common)
            if part is None or _core(self._shape(part)) != _core(shape):
                return None, []
            row = None
            if common == "cls" and "pos" in self.found and "pos" in self.wanted.stem:
                leading = self._leading_rows(self.wanted.stem["pos"][1])
                if leading == (1, 0):  # the model adds no position to the class token
                    row, _ = self._part("pos")
                    how = [*how, "class token plus its position"]
            return _Step(own, shape, (part,), first_row_of=row), how
        module, _, kind = common.rpartition(".")
        prefix, name = re.fullmatch(r"(blocks\.\d+\.)?(.*)", module).groups(default="")  # type: ignore[union-attr]
        for fused, names in _FUSED.items():
            if name == fused and all(f"{prefix}{one}.{kind}" in self.found for one in names):
                made = [self._part(f"{prefix}{one}.{kind}") for one in names]
                parts = tuple(part for part, _ in made if part is not None)
                shapes = [self._shape(part) for part in parts]
                if len(parts) < len(names) or any(s[1:] != shape[1:] or not s for s in shapes):
                    return None, []
                if sum(s[0] for s in shapes) != shape[0]:
                    return None, []
                return _Step(own, shape, parts), sorted({h for _, how in made for h in how} | {"fused"})
            if name in names and f"{prefix}{fused}.{kind}" in self.found:
                part, how = self._part(f"{prefix}{fused}.{kind}")
                if part is None or self._shape(part) != (len(names) * shape[0], *shape[1:]):
                    return None, []
                return _Step(own, shape, (part,), slice=(names.index(name), len(names))), [*how, "split"]
        return None, []

    def _part(self, common: str) -> tuple[_Part | None, list[str]]:
        """A tensor of the checkpoint as numbers; None where it cannot be decoded."""
        clean = self.found[common]
        name = self.base[clean]
        dtype = self.stored[name].dtype
        module, _, kind = clean.rpartition(".")
        how = []
        scale = zero = None
        steps = 1.0
        if dtype in _QUANTISED:
            for ending, whole in (("SCB", _SCB_STEPS), ("weight_scale", 1.0), ("scale", 1.0)):
                if kind == "weight" and f"{module}.{ending}" in self.base:
                    scale, steps = self.base[f"{module}.{ending}"], float(whole)
                    break
            if scale is None:
                return None, []
            for ending in ("weight_zero_point", "zero_point"):
                zero = zero or self.base.get(f"{module}.{ending}")
            rows = self.stored[name].shape[:1]
            for extra in (scale, zero):
                if extra is not None and math.prod(self.stored[extra].shape) not in (1, *rows):
                    return None, []
        elif not dtype.is_floating_point and str(dtype) not in _TORCH_QUANTISED:
            return None, []
        if dtype != self.wanted.dtype:
            how.append(str(dtype).removeprefix("torch."))
        lora = self._lora(module, name) if kind == "weight" else None
        if lora is not None:
            how.append(f"LoRA merged with the factor {lora[2]:g}")
        return _Part(name, scale, zero, steps, lora), how

    def _lora(self, module: str, name: str) -> tuple[str, str, float] | None:
        sets = self.adapters.get(module)
        if not sets:
            return None
        adapter = "default" if "default" in sets else min(sets)
        pair = sets[adapter]
        if pair.keys() != {"A", "B"}:
            return None
        a, b, whole = (self.stored[n].shape for n in (pair["A"], pair["B"], name))
        if (
            not (len(a) == len(b) == len(whole) == 2)
            or (b[0], a[1]) != tuple(whole)
            or a[0] != b[1]
            or not a[0]
        ):
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
        return pair["A"], pair["B"], factor

    def _shape(self, part: _Part) -> tuple[int, ...]:
        return tuple(self.stored[part.name].shape)

    def _leading_rows(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """How many rows of the positions, there and wanted, are no patch's; None where it cannot be told."""
        patches = self.wanted.grid[0] * self.wanted.grid[1]
        wanted = math.prod(shape[:-1]) - patches
        there = self.stored[self.base[self.found["pos"]]].shape
        rows = math.prod(there[:-1])
        if rows == patches + wanted:
            return wanted, wanted
        for leading in (wanted, 1, 0):
            if rows > leading and math.isqrt(rows - leading) ** 2 == rows - leading:
                return leading, wanted
        return None

    def _positions(self, own: str, shape: tuple[int, ...]) -> tuple[_Step | None, list[str]]:
        part, how = self._part("pos")
        if part is None:
            return None, []
        there = self._shape(part)
        if _core(there) == _core(shape):
            return _Step(own, shape, (part,)), how
        leading = self._leading_rows(shape)
        if not there or there[-1] != shape[-1] or leading not in ((0, 0), (1, 1), (1, 0), (0, 1)):
            return None, []
        resize = (*leading, self.wanted.grid)
        return _Step(own, shape, (part,), resize=resize), [*how, "positions resized"]


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
