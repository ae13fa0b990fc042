"""The weights of an ONNX model: its initializers, and the names that exporters do not give them.

Exporters of torch store what multiplies from the right transposed and without its name, "onnx::MatMul_534" or
"val_12"; what is added to the product afterwards is still called "blocks.0.attn.qkv.bias". Only as much of
protobuf is read as that takes: keys, lengths and small fields, never the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from activemark_fast.checkpoints.entries import Contents, Entry, Opened, c_strides
from activemark_fast.checkpoints.errors import CheckpointError

_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
_MAX_FIELDS = 1_000_000
_MAX_NODE = 65_536
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_CLS = "cls_token"


@dataclass(frozen=True)
class _Initializer:
    """Where a tensor lies.

    Attributes:
        dtype: None where its numbers are not stored as such.
        shape: as it is stored.
        offset, size: of its numbers, bytes; `size` is None where nothing says it.
        location: the file beside the model in which they lie; None for the model itself.
        transposed: whether torch has it the other way round.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int
    size: int | None
    location: str | None
    transposed: bool = False


@dataclass(frozen=True)
class _Node:
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_onnx(file: Opened, open_beside: Callable[[str], Opened]) -> Contents:
    """The tensors by the names that torch has for them, as far as they can be told.

    open_beside: opens another file of the model's folder, by its name.

    Raises:
        OSError: there is no such file.
        ValueError: it is something else, or damaged.
    """
    files: dict[str | None, Opened] = {None: file}
    found = Contents()
    for name, tensor in _named(*_parsed(file)).items():
        if tensor.dtype is None:
            found.unread[name] = "tensor of another type"
            continue
        if tensor.location not in files:
            files[tensor.location] = open_beside(str(tensor.location))
        at, shape, strides = files[tensor.location], tensor.shape, None
        if tensor.transposed:
            shape, strides = shape[::-1], c_strides(shape)[::-1]
        if tensor.size not in (None, math.prod(shape) * tensor.dtype.itemsize):
            raise CheckpointError(f"{name[:100]!r} is truncated or of another shape")
        found.entries[name] = Entry.within(at.size, tensor.dtype, shape, at, tensor.offset, strides)
    return found


def _parsed(file: Opened) -> tuple[dict[str, _Initializer], list[_Node]]:
    """The initializers by their names, and what computes."""
    scanner = _Scanner(file.read)
    found: dict[str, _Initializer] = {}
    nodes: list[_Node] = []
    for number, at, length in scanner.fields(0, file.size):
        if number != 7 or length is None:  # ModelProto.graph
            continue
        for inner, start, count in scanner.fields(at, at + length):
            if inner == 5 and count is not None:  # GraphProto.initializer
                name, tensor = scanner.tensor(start, start + count)
                found[name] = tensor
            elif inner == 1 and count is not None and count <= _MAX_NODE:  # GraphProto.node
                nodes.append(scanner.node(start, start + count))
    return found, nodes


def _named(found: dict[str, _Initializer], nodes: list[_Node]) -> dict[str, _Initializer]:
    names: dict[str, str] = {}
    products: dict[str, str] = {}  # what a product is called → the matrix in it
    for node in nodes:
        if node.kind == "Identity" and node.inputs[:1] and node.inputs[0] in found:
            found |= dict.fromkeys(node.outputs, found[node.inputs[0]])
    for node in nodes:
        held = [name for name in node.inputs if name in found]
        axes = len(found[held[0]].shape) if len(held) == 1 else 0
        if node.kind == "MatMul" and node.inputs[1:] == tuple(held) and axes == 2:
            found[held[0]] = replace(found[held[0]], transposed=True)
            products |= dict.fromkeys(node.outputs, held[0])
        elif node.kind == "Add" and axes and held[0].endswith(".bias"):
            for name in node.inputs:
                if name in products:
                    names[products[name]] = f"{held[0].removesuffix('bias')}weight"
        elif node.kind == "Concat" and node.inputs[:1] == tuple(held) and axes == 3:
            names.setdefault(held[0], held[0] if held[0].endswith(_CLS) else _CLS)
    return {names.get(name, name): tensor for name, tensor in found.items()}


class _Scanner:
    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self.read = read
        self.seen = 0

    def fields(self, at: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        """Number, value and None of the numbers in a message; number, start and length of all else."""
        while at < stop:
            self.seen += 1
            if self.seen > _MAX_FIELDS:
                raise ValueError("endless")
            head = self.read(at, min(20, stop - at))
            key, used = _varint(head, 0)
            wire = key & 7
            if wire in (_VARINT, _BYTES):
                value, used = _varint(head, used)
            at += used
            if wire == _VARINT:
                yield key >> 3, value, None
                continue
            length = {_BYTES: value if wire == _BYTES else 0, _FIXED_64: 8, _FIXED_32: 4}.get(wire)
            if length is None or at + length > stop:
                raise ValueError("a field that reaches beyond its message")
            yield key >> 3, at, length
            at += length

    def text(self, at: int, length: int | None) -> str:
        if length is None or length > _MAX_NODE:
            raise ValueError("a name that is none")
        return self.read(at, length).decode("utf-8", "replace")

    def node(self, at: int, stop: int) -> _Node:
        """A NodeProto."""
        parts: dict[int, list[str]] = {1: [], 2: [], 4: []}  # input, output, op_type
        for number, start, length in self.fields(at, stop):
            if number in parts:
                parts[number].append(self.text(start, length))
        return _Node("".join(parts[4]), tuple(parts[1]), tuple(parts[2]))

    def tensor(self, at: int, stop: int) -> tuple[str, _Initializer]:
        """A TensorProto and its name."""
        name, kind, shape = "", 0, []
        place: tuple[int, int | None] | None = None
        beside: dict[str, str] = {}
        for number, start, length in self.fields(at, stop):
            if number == 1 and length is None:  # dims
                shape.append(start)
            elif number == 1 and length is not None:  # dims, packed
                shape += _varints(self.read(start, min(length, 100)))
            elif number == 2:  # data_type
                kind = start
            elif number == 8:  # name
                name = self.text(start, length)
            elif number in (4, 9, 10) and length is not None:  # float_data, raw_data, double_data
                place = start, length
            elif number == 13 and length is not None:  # external_data
                entry = {n: self.text(s, c) for n, s, c in self.fields(start, start + length)}
                beside[entry.get(1, "")] = entry.get(2, "")
        if "location" in beside:
            count = beside.get("length")
            place = int(beside.get("offset", "0")), None if count is None else int(count)
        offset, size = place or (0, 0)
        dtype = _DTYPES.get(kind) if place is not None else None
        return name, _Initializer(dtype, tuple(shape), offset, size, beside.get("location"))


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = 0
    for index in range(at, min(at + 10, len(content))):
        value |= (content[index] & 127) << 7 * (index - at)
        if content[index] < 128:
            return value, index + 1
    raise ValueError("a number that does not end")


def _varints(content: bytes) -> list[int]:
    found, at = [], 0
    while at < len(content):
        value, at = _varint(content, at)
        found.append(value)
    return found
