"""The weights of a plain ViT, block by block, in a form that what a thief can do for nothing does not change.

Norms and LayerScales are folded into the matrices beside them, and what a layer norm does not see, the mean
over the channels, is taken off. What is left of an MLP is a list of units, each with what it reads from the
residual stream and what it writes to it; of an attention layer, a list of heads.

This is the only place of `descent` that opens checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from activemark_fast.checkpoints import CheckpointError, architecture_of, load_model
from activemark_fast.checkpoints.entries import HostBuffer
from activemark_fast.checkpoints.files import Checkpoint
from activemark_fast.checkpoints.names import common_name

Source = nn.Module | str | os.PathLike[str]

MAX_BYTES = 16_000_000_000
"""Of tensors that are read together: one block, or a whole torch file."""
USUAL_HEAD = 64
"""Channels of a head where a file does not say how many heads there are: so most published ViTs have it."""
_STEM = frozenset({"patch.weight", "patch.bias", "cls", "pos", "reg"})


@dataclass(frozen=True, eq=False)
class Block:
    """One block. All float32; D channels, n units, H heads of d channels, G = 2 for gated MLPs, else 1.

    Attributes:
        reads: (n, G, D) what each unit reads.
        writes: (n, D) what each unit writes.
        heads: queries, keys, values and outputs, each (H, d, D); None where the attention is of another make.
        vectors: (4, D), which do not depend on the order of units and heads: the biases of MLP and attention,
            and the means of `reads` and `writes`.
        raw: the matrices as they are stored, by common name; valid until the next block is read.
    """

    reads: Tensor
    writes: Tensor
    heads: tuple[Tensor, Tensor, Tensor, Tensor] | None
    vectors: Tensor
    raw: dict[str, Tensor]


class Weights:
    """The weights of one model, read block by block; a context manager.

    Attributes:
        name: for messages.
        depth, width: number of blocks and of channels.
        heads_known: whether the number of heads is known, not assumed.
        stem: by common name, (rows, D) float32 each: the patch embedding's filters, the tokens, the
            positions.

    Raises:
        TypeError: the model is neither a module nor a string nor a path.
        CheckpointError: it cannot be read, or is no plain ViT with MLPs.
    """

    def __init__(self, model: Source) -> None:
        self.name = "module" if isinstance(model, nn.Module) else str(model)
        self._open: Checkpoint | None = None
        shapes: dict[str, tuple[int, ...]]
        if isinstance(model, nn.Module) or not Path(model).exists():
            module = model if isinstance(model, nn.Module) else load_model(model)
            state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            self._read: Callable[[Iterable[str]], Mapping[str, Tensor]] = lambda names: {
                name: state[name] for name in names
            }
            heads = _heads_of(module)
        else:
            opened = Checkpoint(Path(model), MAX_BYTES)
            buffer = HostBuffer(pinned=False)
            shapes = {name: entry.shape for name, entry in opened.entries.items()}
            self._open = opened
            self._read = lambda names: opened.read(names, buffer)
            heads = _stated_heads(Path(model))
        self._names = _image_tower(shapes, self.name)
        last = [f"blocks.{index}.mlp.fc2.weight" for index in range(len(self._names))]
        self.depth = next(index for index, name in enumerate([*last, ""]) if name not in self._names)
        if self.depth == 0:
            raise CheckpointError(f"{self.name}: wanted a plain ViT, found no block with an MLP in it")
        self.width = shapes[self._names[last[0]]][0]
        self._heads = heads
        self.heads_known = heads is not None
        try:
            self.stem = {name: self._rows(name, t) for name, t in self._tensors(_STEM & self._names.keys())}
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.__exit__(kind, error, trace)

    def block(self, index: int) -> Block:
        """Reads block `index`, 0 to depth - 1.

        Raises:
            CheckpointError: a matrix is missing, has an odd shape, is not floating-point or not finite.
        """
        prefix = f"blocks.{index}."
        stored = dict(self._tensors(name for name in self._names if name.startswith(prefix)))
        found = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        if "mlp.gate.weight" in found and "mlp.up.weight" in found:
            found["mlp.fc1.weight"] = torch.cat([found.pop("mlp.gate.weight"), found.pop("mlp.up.weight")])
        if "attn.q.weight" in found and {"attn.k.weight", "attn.v.weight"} <= found.keys():
            found["attn.qkv.weight"] = torch.cat([found.pop(f"attn.{part}.weight") for part in "qkv"])
        ones, zeros = torch.ones(self.width), torch.zeros(self.width)
        raw = {}
        for name in ("mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj"):
            if f"{name}.weight" in found:
                raw[name] = found[f"{name}.weight"]
                if raw[name].ndim != 2:
                    raise self._odd(f"{prefix}{name}.weight", raw[name])
        first, second = raw.get("mlp.fc1"), raw["mlp.fc2"]
        units = second.shape[1]
        if first is None:
            raise CheckpointError(f"{self.name}: {prefix}mlp.fc1.weight is missing")
        if second.shape[0] != self.width or first.shape not in ((units, self.width), (2 * units, self.width)):
            raise self._odd(f"{prefix}mlp.fc1.weight", first)
        scale_1, scale_2 = (found.get(f"ls{i}", ones).float().flatten() for i in (1, 2))
        norm_1, norm_2 = (found.get(f"norm{i}.weight", ones).float() for i in (1, 2))
        reads = _centred((first.float() * norm_2).unflatten(0, (-1, units)).transpose(0, 1))
        writes = _centred(second.float().T * scale_2)
        biases = [
            found.get("mlp.fc2.bias", zeros).float() * scale_2,
            found.get("attn.proj.bias", zeros).float() * scale_1,
        ]
        vectors = _centred(torch.stack([*biases, reads.mean(dim=(0, 1)), writes.mean(dim=0)]))
        heads = self._split_heads(raw, norm_1, scale_1)
        if not all(bool(torch.isfinite(t).all()) for t in (reads, writes, vectors, *(heads or ()))):
            raise CheckpointError(f"{self.name}: block {index} holds values that are not finite")
        return Block(reads, writes, heads, vectors, raw)

    def _split_heads(
        self, raw: Mapping[str, Tensor], norm: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        inside, out = raw.get("attn.qkv"), raw.get("attn.proj")
        if inside is None or out is None:
            return None
        channels = out.shape[1]
        count = self._heads or channels // USUAL_HEAD
        if (
            inside.shape != (3 * channels, self.width)
            or len(out) != self.width
            or not count
            or channels % count
        ):
            return None
        q, k, v = _centred(inside.float() * norm).unflatten(0, (3, count, -1))
        return q, k, v, _centred(out.float().T * scale).unflatten(0, (count, -1))

    def _tensors(self, names: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
        stored = {name: self._names[name] for name in names}
        read = self._read(stored.values())
        for name, own in stored.items():
            if not read[own].is_floating_point():
                raise self._odd(name, read[own])
            yield name, read[own]

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        """(rows, D), centred; of the patch embedding a row for each pixel and colour."""
        wide = tensor.float()
        if name.startswith("patch") and wide.shape[0] == self.width:
            wide = wide.reshape(self.width, -1).T
        elif wide.shape[-1] == self.width:
            wide = wide.reshape(-1, self.width)
        else:
            raise self._odd(name, tensor)
        if not bool(torch.isfinite(wide).all()):
            raise CheckpointError(f"{self.name}: {name} holds values that are not finite")
        return _centred(wide)

    def _odd(self, name: str, tensor: Tensor) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: {name} is {str(tensor.dtype).removeprefix('torch.')} of shape "
            f"{tuple(tensor.shape)}"
            f", wanted floating-point weights of a plain ViT of width {getattr(self, 'width', '?')}"
        )


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=-1, keepdim=True)


def _image_tower(names: Iterable[str], model: str) -> dict[str, str]:
    """Common name → stored name, of the image tower: the largest one with a patch embedding, if any has."""
    towers: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            common = common_name(".".join(parts[start:]))
            if common.startswith("blocks.") or common in _STEM:
                towers[".".join(parts[:start])][common] = name
                break
    whole = [tower for tower in towers.values() if any(name.endswith("mlp.fc2.weight") for name in tower)]
    if not whole:
        raise CheckpointError(f"{model}: wanted a plain ViT, found no block with an MLP in it")
    return max(whole, key=lambda tower: ("patch.weight" in tower, len(tower)))


def _heads_of(module: nn.Module) -> int | None:
    """How many heads the modules of the blocks say they have, where they agree."""
    counts = {
        count
        for name, part in module.named_modules()
        if re.search(r"\.\d+\.|_\d+\.", f"{name}.") and not re.search(r"text|^transformer\.", name)
        for attribute in ("num_heads", "num_attention_heads")
        if isinstance(count := getattr(part, attribute, None), int)
    }
    return counts.pop() if len(counts) == 1 else None


def _stated_heads(path: Path) -> int | None:
    """How many heads the architecture in a file's metadata has, where it is written out."""
    try:
        _, _, arguments = architecture_of(path).partition("?")
        stated: Any = json.loads(arguments).get("num_heads") if arguments else None
    except CheckpointError:
        return None
    return stated if isinstance(stated, int) and 0 < stated < math.inf else None
