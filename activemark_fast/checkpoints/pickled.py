"""What pickles of checkpoints hold: notes of where tensors lie, and stubs for all that is not made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

_MAX_DEPTH = 40
_MODULE_PARTS = ("_parameters", "_buffers", "_modules")
_NUMPY = ("numpy.core", "numpy._core")
_REPLACING = frozenset({"data", "real", "imag"})
"""Attributes of a tensor which, when set, change its numbers."""


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:100]


@dataclass(eq=False)
class Stub:
    """What a pickle would have made by a call that is not made."""

    made_by: object
    args: object
    state: object = None
    items: list[tuple[object, object]] = field(default_factory=list)


@dataclass(frozen=True)
class Storage:
    """Numbers that a torch file keeps beside its pickle, or that are in the pickle itself.

    dtype: None for bytes that the tensors type.
    content: the numbers, where they are in the pickle.
    """

    key: str
    dtype: torch.dtype | None
    content: bytes | None = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as a torch file describes it: strided numbers in a storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """torch's own: integers, with a scale and a zero point each or for each row."""

    whole: StoredTensor
    scale: object
    zero_point: object


@dataclass(frozen=True, eq=False)
class Array:
    """A numpy array that is in the pickle itself. dtype: as numpy writes it, "<f4"."""

    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    content: bytes


def named_values(root: object) -> Iterator[tuple[str, object]]:
    """The tensors in what a pickle holds, each under the dotted path that leads to it, in order.

    A module that was pickled whole looks like its state dict. Besides `StoredTensor`, `QuantisedTensor` and
    `Array` there are the stubs that stand for tensors of a kind that is not known.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, object, int]] = [("", root, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        value = _array(value) or value
        if isinstance(value, StoredTensor | QuantisedTensor | Array):
            yield name, value
            continue
        if id(value) in seen or depth > _MAX_DEPTH:
            continue
        inside = _inside(value)
        if inside:
            seen.add(id(value))
        if isinstance(value, Stub) and _stands_for_a_tensor(value):
            yield name, value
            continue
        waiting += [
            (f"{name}.{key}" if name and key != "" else name or str(key), child, depth + 1)
            for key, child in reversed(inside)
        ]


def stub_names(root: object) -> list[str]:
    """What a pickle asks for that was not made, sorted."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Stub):
            found.add(str(value.made_by)[:100])
            waiting += [value.args, value.state, *(one for pair in value.items for one in pair)]
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return sorted(found)


def _inside(value: object) -> list[tuple[object, object]]:
    """The parts of a container, with their names; "" for parts that add none to a path."""
    if isinstance(value, dict):
        return [
            (key.decode("latin-1") if isinstance(key, bytes) else key, part)
            for key, part in value.items()
            if isinstance(key, str | int | bytes)
        ]
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if not isinstance(value, Stub):
        return []
    states = value.state if isinstance(value.state, tuple) else (value.state,)
    attributes = [pair for state in states if isinstance(state, dict) for pair in state.items()]
    return [
        ("" if key in _MODULE_PARTS else key, part)
        for key, part in (*attributes, *value.items)
        if isinstance(key, str | int)
    ]


def _stands_for_a_tensor(stub: Stub) -> bool:
    return isinstance(stub.made_by, Global) and (
        stub.made_by.name.startswith("_rebuild") or stub.made_by.name.endswith(("Tensor", "Params4bit"))
    )


def storage_of(pid: Any) -> object:
    """Torch's persistent ids: ("storage", type, key, location, count, view); no view is made."""
    if (
        isinstance(pid, tuple)
        and len(pid) >= 5
        and pid[0] == "storage"
        and isinstance(pid[1], Global)
        and not any(pid[5:])
    ):
        dtype = _STORAGES.get(pid[1].name)
        if (dtype is not None or pid[1].name == "UntypedStorage") and _counts(pid[4:5]):
            return Storage(str(pid[2]), dtype)
    return Stub("a persistent id", pid)


def _counts(values: object) -> bool:
    return isinstance(values, tuple) and all(type(n) is int and 0 <= n < 1 << 62 for n in values)


def made_by_call(callee: object, args: object) -> object:
    """What the call would make, where it is one of the known ones; else a stub."""
    maker = _MAKERS.get(str(callee)) if isinstance(callee, Global) else None
    if maker is not None and isinstance(args, tuple):
        try:
            return maker(*args)
        except (TypeError, ValueError, IndexError):
            pass  # not called as torch does
    return Stub(callee, args)


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: object = False,
    hooks: object = None,
    bits: object = None,
    *,
    dtype: torch.dtype | None = None,
) -> object:
    """bits: of negated or conjugate tensors, whose numbers are not those stored."""
    if not isinstance(storage, Storage) or bits:
        raise ValueError
    numbers = (tuple(shape), tuple(strides), (offset,))
    kind = dtype or storage.dtype
    if kind is None or not all(map(_counts, numbers)) or len(shape) != len(strides) or len(shape) > 8:
        raise ValueError
    return StoredTensor(storage, kind, offset, *numbers[:2])


def _typed_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: object,
    hooks: object,
    kind: Any,
    bits: object = None,
) -> object:
    return _tensor(storage, offset, shape, strides, grad, hooks, bits, dtype=_dtype(kind))


def _quantised(storage: Any, offset: Any, shape: Any, strides: Any, quantiser: Any, *_: object) -> object:
    whole = _tensor(storage, offset, shape, strides)
    assert isinstance(whole, StoredTensor)
    scheme, scale, zero = quantiser[:3]
    if scheme.name not in ("per_tensor_affine", "per_channel_affine") or quantiser[3:4] not in ((), (0,)):
        raise ValueError
    return QuantisedTensor(whole, scale, zero)


def _of_type(function: object, kind: object, args: object, state: object) -> object:
    """A subclass of Tensor, saved as what makes its numbers."""
    made = made_by_call(function, args)
    return Stub(kind, args, state) if isinstance(made, Stub) else _with_state(made, state)


def _with_state(tensor: object, state: object) -> object:
    """A tensor that is given attributes; one called "data" would be its numbers."""
    parts = state if isinstance(state, tuple) else (state,)
    if any(isinstance(part, dict) and _REPLACING & part.keys() for part in parts):
        raise ValueError
    return tensor


def _dict(items: Any = ()) -> object:
    return {key: value for key, value in items if isinstance(key, str | int | bytes)}


def _bytes(text: Any, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError
    return bytes(text.encode("latin-1"))


def _dtype(kind: object) -> torch.dtype:
    dtype = getattr(torch, kind.name, None) if isinstance(kind, Global) and kind.module == "torch" else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError
    return dtype


def _array(stub: object) -> Array | None:
    """What a numpy array's stub stands for; its state is (version, shape, dtype, fortran, content)."""
    if not isinstance(stub, Stub) or str(stub.made_by) not in {
        f"{package}.multiarray._reconstruct" for package in _NUMPY
    }:
        return None
    state = stub.state
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    return _filled(state[4], state[2], state[1], "F" if state[3] is True else "C")


def _filled(content: object, dtype: object, shape: Any, order: object) -> Array | None:
    kind = dtype.args[0] if isinstance(dtype, Stub) and isinstance(dtype.args, tuple) and dtype.args else None
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, str) or not _counts(shape):
        return None
    state = dtype.state if isinstance(dtype, Stub) and isinstance(dtype.state, tuple) else ("", "<")
    return Array(f"{'>' if state[1:2] == ('>',) else '<'}{kind}", shape, order == "F", bytes(content))


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "Float8_e4m3fnStorage": torch.float8_e4m3fn,
    "Float8_e5m2Storage": torch.float8_e5m2,
}
_MAKERS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _dict,
    "builtins.dict": _dict,
    "torch.Size": tuple,
    "_codecs.encode": _bytes,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, grad, hooks, state: _with_state(data, state),
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "numpy.core.numeric._frombuffer": _filled,
    "numpy._core.numeric._frombuffer": _filled,
}
