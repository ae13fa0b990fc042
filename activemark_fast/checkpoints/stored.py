"""How one tensor may be stored: as it is, in parts, or as integers with what makes numbers of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from activemark_fast.checkpoints.errors import CheckpointError

_NARROW = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("SCB", "weight_scale", "weight_scale_inv", "scale_weight", "scale", "q_scale")
_ZEROS = ("weight_zero_point", "zero_point", "q_zero_point")
_MAX_STATE = 4096
_SCB_STEPS = 127
"""bitsandbytes' int8: a weight is its integer times its row's SCB over 127."""
_WORD = 32
"""Bits of the integers that GPTQ and AWQ pack several weights into."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of the 8 numbers in a word of AWQ each column is."""
_PACKED = {
    "weight_packed": "quantised with compressed-tensors",
    "biases": "quantised with MLX",
}
"""Parts that tell a form which is not read."""

Decode = Callable[[Mapping[str, Tensor]], Tensor]


class Stored(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class Source:
    """What one tensor of the model is made from.

    Attributes:
        names: part → stored name.
        shape: of what is made; (count,) where only the number of elements is known before it is read.
        dtype: of the main part.
        decode: makes it, from part → tensor.
        how: what that does to what is stored, in words; "" for nothing.
        doubtful: it may not be what the suspect computes with.
    """

    names: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    decode: Decode
    how: str = ""
    doubtful: bool = False

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """It, from the tensors by their stored names."""
        return self.decode({part: tensors[name] for part, name in self.names.items()})


def source_of(clean: str, parts: Mapping[str, str], stored: Mapping[str, Stored]) -> Source | str:
    """How the tensor called `clean` is made from its stored parts, or why it cannot be."""
    source = _source_of(clean, parts, stored)
    if isinstance(source, str) or len(source.names) == 1 or "absmax" in source.names:
        return source
    # Tried without numbers, so that parts which do not go together are told before any is read.
    empty = {name: (tuple(stored[name].shape), stored[name].dtype) for name in source.names.values()}
    try:
        made = source.value({n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in empty.items()})
    except (RuntimeError, IndexError, ValueError, TypeError):
        made = None
    if made is None or tuple(made.shape) != source.shape:
        return f"parts that do not go together: {', '.join(str(shape) for shape, _ in empty.values())}"
    return source


def _source_of(clean: str, parts: Mapping[str, str], stored: Mapping[str, Stored]) -> Source | str:
    for part, what in _PACKED.items():
        if part in parts:
            return what
    if "qweight" in parts:
        return _packed_words(parts, stored)
    main = next((one for one in ("", "kernel", "original", "orig", "original1", "v") if one in parts), None)
    if main is None:
        if set(parts) != {"scale"}:
            return f"only its {', '.join(sorted(parts))}"
        main = "scale"  # a layer norm of Flax
    at = stored[parts[main]]
    shape, dtype = tuple(at.shape), at.dtype

    def source(decode: Decode, how: str, *more: str, doubtful: bool = False) -> Source:
        names = {part: parts[part] for part in (main, *more)}
        return Source(names, shape, dtype, decode, how, doubtful)

    if "absmax" in parts:
        return _four_bit(parts, stored)
    if not dtype.is_floating_point or dtype in _NARROW:
        return _scaled(main, parts, stored)
    if main == "kernel":
        made = _flax_kernel(torch.empty(shape, device="meta"), clean)
        return Source(
            {"kernel": parts["kernel"]},
            tuple(made.shape),
            dtype,
            lambda t: _flax_kernel(t["kernel"], clean),
            "transposed",
        )
    if main == "orig" and "mask" in parts:
        return source(lambda t: t["orig"].float() * t["mask"].float(), "pruning mask applied", "mask")
    if main == "orig" and {"u", "v"} <= parts.keys():
        return source(_spectral, "spectral norm applied", "u", "v")
    for size, direction in (("original0", "original1"), ("g", "v")):
        if main == direction and size in parts:
            return source(
                lambda t, g=size, v=direction: _weight_norm(t[g], t[v]),  # type: ignore[misc]
                "weight norm applied",
                size,
            )
    return source(
        lambda t: t[main],
        "as it was before its parametrisation" if main in ("original", "orig", "original1", "v") else "",
        doubtful=main in ("original", "orig", "original1", "v"),
    )


def _flax_kernel(kernel: Tensor, clean: str) -> Tensor:
    """A kernel as torch has it: (out, in) or (out, in, height, width); heads are no axis of their own."""
    if kernel.ndim == 4:
        return kernel.permute(3, 2, 0, 1)
    if kernel.ndim == 3:
        heads_first = clean.rpartition(".")[0].endswith("out")
        kernel = kernel.flatten(0, 1) if heads_first else kernel.flatten(1)
    return kernel.T if kernel.ndim == 2 else kernel


def _weight_norm(size: Tensor, direction: Tensor) -> Tensor:
    axes = [axis for axis in range(direction.ndim) if size.ndim != direction.ndim or size.shape[axis] == 1]
    length = direction.float().square().sum(axes or None, keepdim=bool(axes)).sqrt()
    return direction.float() * (size.float() / length)


def _spectral(tensors: Mapping[str, Tensor]) -> Tensor:
    weight = tensors["orig"].float()
    return weight / (tensors["u"].float() @ weight.flatten(1) @ tensors["v"].float())


def _scaled(main: str, parts: Mapping[str, str], stored: Mapping[str, Stored]) -> Source | str:
    """Integers or 8-bit floats with scales: one, one for each row, or one for each tile."""
    at = stored[parts[main]]
    shape, kind = tuple(at.shape), str(at.dtype).removeprefix("torch.")
    scale = next((part for part in _SCALES if part in parts), None)
    zero = next((part for part in _ZEROS if part in parts), None)
    if at.dtype not in _NARROW and (scale is None or at.dtype != torch.int32 or "q_scale" not in parts):
        return f"{kind}, which are no weights"
    if scale is None:
        if at.dtype.is_floating_point:
            return Source({main: parts[main]}, shape, at.dtype, lambda t: t[main], kind)
        return f"{kind} without its scales"
    used = [part for part in (main, scale, zero) if part is not None]
    for part in used[1:]:
        there = tuple(stored[parts[part]].shape)
        if not _spreads(there, shape):
            return f"{kind} with scales of shape {there}"
    steps = _SCB_STEPS if scale == "SCB" else 1

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        value = tensors[main].float()
        if zero is not None:
            value = value - _spread(tensors[zero].float(), shape)
        return value * (_spread(tensors[scale].float(), shape) / steps)

    return Source({part: parts[part] for part in used}, shape, at.dtype, decode, kind)


def _spreads(scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether there is a scale for all, for each row, or for each tile of a tensor of `shape`."""
    if math.prod(scale) in (1, *shape[:1]):
        return True
    return len(scale) == len(shape) == 2 and all(
        parts and -(-size // -(-size // parts)) == parts for size, parts in zip(shape, scale, strict=True)
    )


def _spread(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale as it multiplies a tensor of `shape`; see `_spreads`."""
    if scale.numel() in (1, shape[0]):
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    for axis, size in enumerate(shape):
        scale = scale.repeat_interleave(-(-size // scale.shape[axis]), axis)
    return scale[: shape[0], : shape[1]]


def _four_bit(parts: Mapping[str, str], stored: Mapping[str, Stored]) -> Source | str:
    """Bitsandbytes' NF4 and FP4: two numbers a byte, a table of 16, a scale for each run of numbers.

    Its quantisation of the scales themselves is undone, too (Dettmers et al. 2023).
    """
    nested = "nested_absmax" in parts
    used = ["", "absmax", "quant_map"]
    used += ["nested_absmax", "nested_quant_map", "quant_state"] if nested else []
    if any(part not in parts for part in used):
        return "4 bits of bitsandbytes without what makes numbers of them"
    at = {part: stored[parts[part]] for part in used}
    count = {part: math.prod(tensor.shape) for part, tensor in at.items()}
    bytes_of = [at[part].dtype for part in ("", *(["absmax", "quant_state"] if nested else []))]
    packed = count[""]
    if (
        set(bytes_of) != {torch.uint8}
        or (count["quant_map"], count.get("nested_quant_map", 256)) != (16, 256)
        or not 0 < count["absmax"] <= 2 * packed
        or not 0 < count.get("nested_absmax", 1) <= count["absmax"]
        or count.get("quant_state", 0) > _MAX_STATE
    ):
        return "4 bits of bitsandbytes of which the parts do not go together"

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        absmax = tensors["absmax"].flatten()
        if nested:
            try:
                facts = json.loads(tensors["quant_state"].cpu().contiguous().numpy().tobytes())
                offset = float(facts["nested_offset"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError("4 bits of bitsandbytes with a quant_state that is none") from error
            absmax = tensors["nested_quant_map"].float().flatten()[absmax.long()]
            absmax = _runs(absmax, tensors["nested_absmax"].float().flatten()) + offset
        codes = tensors[""].flatten()
        table = tensors["quant_map"].float().flatten()
        values = table[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
        return _runs(values, absmax.float())

    return Source({p: parts[p] for p in used}, (2 * packed,), torch.uint8, decode, "4 bits of bitsandbytes")


def _runs(values: Tensor, scales: Tensor) -> Tensor:
    """Each run of values, equally long, times its scale."""
    run = -(-len(values) // len(scales))
    # bitsandbytes' runs are powers of two; the last one may be cut short.
    run = 1 << (run - 1).bit_length()
    return values * scales.repeat_interleave(run)[: len(values)]


def _packed_words(parts: Mapping[str, str], stored: Mapping[str, Stored]) -> Source | str:
    """GPTQ (Frantar et al. 2022) and AWQ (Lin et al. 2023): several weights in a word, scales for groups.

    Both keep (in, out). GPTQ packs along the inputs and its zero points along the outputs, AWQ both along the
    outputs and 4 bits only. GPTQ's first form, which is common, stores zero points less one; a later one does
    not, and nothing in the tensors tells which it is.
    """
    odd = "quantised with GPTQ or AWQ, in words that are not read"
    if not {"qzeros", "scales"} <= parts.keys():
        return odd
    at = {part: stored[name] for part, name in parts.items()}
    shapes = [tuple(at[part].shape) for part in ("qweight", "qzeros", "scales")]
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        return odd
    (rows, columns), zeros, (groups, outputs) = shapes
    awq = outputs != columns
    count = outputs // (columns if awq else zeros[1])
    inputs = rows if awq else rows * count
    if (
        {at["qweight"].dtype, at["qzeros"].dtype} != {torch.int32}
        or not at["scales"].dtype.is_floating_point
        or count not in ((8,) if awq else (4, 8, 16))
        or zeros != (groups, outputs // count)
        or outputs % count
        or (awq and columns * count != outputs)
        or not 0 < groups <= inputs
        or inputs % groups
        or ("g_idx" in parts and tuple(at["g_idx"].shape) != (inputs,))
    ):
        return odd
    bits = _WORD // count

    def apart(words: Tensor, axis: int) -> Tensor:
        """The numbers of words, each word's in a row along `axis`."""
        order = torch.tensor(_AWQ_ORDER) if awq else torch.arange(count)
        shifts = (order * bits).to(words.device)
        numbers = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return numbers.movedim(-1, axis + 1).flatten(axis, axis + 1)

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        if "g_idx" in tensors:
            group = tensors["g_idx"].long().clamp(0, groups - 1)
        else:
            group = torch.arange(inputs, device=tensors["qweight"].device) // (inputs // groups)
        zero = apart(tensors["qzeros"], 1) + (0 if awq else 1)
        numbers = apart(tensors["qweight"], 1 if awq else 0)
        return ((numbers - zero[group]) * tensors["scales"].float()[group]).T

    used = ["qweight", "qzeros", "scales", *(["g_idx"] if "g_idx" in parts and not awq else [])]
    names = {part: parts[part] for part in used}
    how = f"{bits} bits of {'AWQ' if awq else 'GPTQ'}"
    return Source(names, (outputs, inputs), torch.int32, decode, how, doubtful=not awq)
