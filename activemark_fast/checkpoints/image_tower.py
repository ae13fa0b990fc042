"""An image tower of a checkpoint: which of its tensors plays which part."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from activemark_fast.checkpoints.names import STEM, Adapters, block_of, common_name
from activemark_fast.checkpoints.steps import Part
from activemark_fast.checkpoints.stored import Stored, source_of
from activemark_fast.checkpoints.wanted import ELSEWHERE, Wanted

Read = Callable[[Iterable[str]], Mapping[str, Tensor]]
"""Gives tensors by their stored names."""


@dataclass(frozen=True, eq=False)
class Held:
    """What a checkpoint holds.

    Attributes:
        stored: its tensors.
        unread: name → what stands there in place of a tensor.
        lora_config: the content of adapter_config.json.
        base: clean name → part → stored name.
        adapters: likewise of what is merged into the base.
    """

    stored: Mapping[str, Stored]
    unread: Mapping[str, str]
    lora_config: Mapping[str, Any]
    base: Mapping[str, Mapping[str, str]]
    adapters: Adapters


class ImageTower:
    """The tensors of one image tower, by their common names.

    Attributes:
        held: all that the checkpoint holds.
        prefix: what stands before the tower's names.
        root: and before those of the whole model.
        found: common name → clean name.
    """

    def __init__(self, prefix: str, held: Held, wanted: Wanted) -> None:
        self.held = held
        self._own = wanted.own
        self.prefix = prefix
        self.root = prefix.removesuffix(wanted.tower)
        self.found: dict[str, str] = {}
        for clean in sorted(held.base, key=lambda name: "decoder." in name):
            if clean.startswith(prefix):
                common = self.common(clean.removeprefix(prefix))
                self.found[common if common not in self.found else ELSEWHERE + clean] = clean
            elif clean.startswith(self.root) and prefix.endswith(wanted.tower):
                self.found[ELSEWHERE + clean.removeprefix(self.root)] = clean
        if wanted.tower == "":
            self.found |= {name: f"{prefix}{name}" for name in wanted.own if f"{prefix}{name}" in held.base}
        self._tell_three_matrices_apart()

    def common(self, relative: str) -> str:
        """The common name of what is called `relative` in the tower, by the marked model or others."""
        return self._own.get(relative) or common_name(relative)

    @property
    def indices(self) -> list[int]:
        """Of its blocks."""
        return sorted({index for index in map(block_of, self.found) if index is not None})

    @property
    def keys_need_no_bias(self) -> bool:
        """A bias of the keys adds the same to all scores of a query, which softmax takes out again."""
        return not any(common.endswith(".k_norm.weight") for common in self.found)

    def part(self, common: str) -> Part | str:
        """A tensor as numbers; or why it is none, "" where nothing is there."""
        if common not in self.found:
            return ""
        clean = self.found[common]
        parts = self.held.base[clean]
        unread = next((self.held.unread[name] for name in parts.values() if name in self.held.unread), None)
        if unread is not None:
            return f"a {unread[:100]}, which is not read"
        source = source_of(clean, parts, self.held.stored)
        if isinstance(source, str):
            return source
        if not math.prod(source.shape) and clean.endswith(".weight"):
            return "empty, as DeepSpeed ZeRO leaves it: gather the weights with its zero_to_fp32.py"
        module, _, kind = clean.rpartition(".")
        lora = self._lora(module, source.shape) if kind == "weight" else None
        of_peft = self.held.lora_config or any(
            re.search(r"^base_model\.|base_layer\.", n) for n in parts.values()
        )
        if lora is not None and not of_peft:  # what loads the model may never look at it
            source = replace(source, doubtful=True)
        return Part(clean, source, lora)

    def shape(self, common: str) -> tuple[int, ...]:
        """Of a tensor; () where there is none."""
        part = self.part(common)
        return part.shape if isinstance(part, Part) else ()

    def computed(self, depth: int) -> list[str]:
        """The floating tensors that the suspect itself must use in its stem and first `depth` blocks."""
        held = self.held
        names: list[str] = []
        for common, clean in self.found.items():
            block = block_of(common)
            inside = block < depth if block is not None else common in STEM
            if inside and not (common.endswith(".attn.k.bias") and self.keys_need_no_bias):
                names += [
                    name
                    for name in held.base[clean].values()
                    if name in held.unread or held.stored[name].dtype.is_floating_point
                ]
        for module, sets in held.adapters.items():
            block = block_of(common_name(f"{module.removeprefix(self.prefix)}.weight"))
            if module.startswith(self.prefix) and block is not None and block < depth:
                names += [name for pair in sets.values() for name in pair.values()]
        return names

    def count_blocks(self, depth: int, read: Read) -> int:
        """Numbers the blocks from 0 on, without those that add nothing, where there are more than `depth`.

        Returns:
            How many add nothing.
        """
        indices = self.indices

        def zero(common: str) -> bool | None:
            part = self.part(common)
            return None if isinstance(part, str) else not bool(part.value(read(part.names())).any())

        def adds_nothing(block: str) -> bool:
            return all(
                zero(f"{block}.{scale}") is True
                or (zero(f"{block}.{module}.weight") is True and zero(f"{block}.{module}.bias") is not False)
                for module, scale in (("attn.proj", "ls1"), ("mlp.fc2", "ls2"))
            )

        kept = indices
        if len(indices) > depth:
            kept = [index for index in indices if not adds_nothing(f"blocks.{index}")]
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
        for prefix in [
            name.removesuffix("w3.weight") for name in self.found if name.endswith(".mlp.w3.weight")
        ]:
            rows = {matrix: self._rows(f"{prefix}{matrix}.weight") for matrix in ("w1", "w2", "w3")}
            back, up = ("w2", "w3") if rows["w1"] == rows["w3"] else ("w3", "w2")
            if rows["w1"] is None:
                back, up = "w3", ""  # DINOv2's w12 and w3
            for spelled, common in ((back, "fc2"), (up, "up"), ("w1", "gate")):
                for kind in ("weight", "bias"):
                    if f"{prefix}{spelled}.{kind}" in self.found:
                        self.found[f"{prefix}{common}.{kind}"] = self.found.pop(f"{prefix}{spelled}.{kind}")

    def _rows(self, common: str) -> int | None:
        name = self.held.base.get(self.found.get(common, ""), {}).get("", "")
        return next(iter(self.held.stored[name].shape), None) if name in self.held.stored else None

    def _lora(self, module: str, whole: tuple[int, ...]) -> tuple[str, str, str | None, float] | None:
        sets = self.held.adapters.get(module)
        if not sets:
            return None
        parts = sets["default" if "default" in sets else min(sets)]
        if not {"lora_A", "lora_B"} <= parts.keys():
            return None
        magnitude = parts.get("lora_magnitude_vector")
        a, b = (tuple(self.held.stored[parts[part]].shape) for part in ("lora_A", "lora_B"))
        if not (len(a) == len(b) == len(whole) == 2) or (b[0], a[1]) != whole or a[0] != b[1] or not a[0]:
            return None
        if magnitude is not None and math.prod(self.held.stored[magnitude].shape) != whole[0]:
            return None
        rank, config = a[0], self.held.lora_config
        alpha = config.get("lora_alpha", rank)
        patterns = config.get("alpha_pattern")
        for ending, value in patterns.items() if isinstance(patterns, dict) else ():
            if module == ending or module.endswith(f".{ending}"):
                alpha = value
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            return None
        factor = alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
        return parts["lora_A"], parts["lora_B"], magnitude, factor
