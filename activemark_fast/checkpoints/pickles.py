"""Pickles, read without running them.

A pickle is a program for a stack machine. This machine knows the opcodes, but it imports nothing and calls
nothing: a class or function is only ever its name, and what a pickle would make by calling one is a `Stub`
that remembers the call. The few calls that tensors and dicts are made of are known by name and become notes
of where a tensor lies. So a hostile pickle can at most waste time and memory, and both are bounded.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

from activemark_fast.checkpoints.errors import CheckpointError
from activemark_fast.checkpoints.pickled import (
    Global,
    QuantisedTensor,
    Storage,
    StoredTensor,
    Stub,
    made_by_call,
    storage_of,
)

MAX_OPCODES = 3_000_000
"""A checkpoint with optimizer of 1,000 tensors has some 200,000."""
MAX_PICKLE = 64_000_000
"""Bytes; the pickle of such a model, the numbers of which lie beside it, has 200,000."""
LEGACY_PICKLES = 4
"""Of torch.save before version 1.6: magic number, version, facts about the system, and what was saved.
The keys of the storages follow."""
_STORAGE_IN_BYTES = Global("torch.storage", "_load_from_bytes")
_ARGUMENTS = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
    | {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
)
_NEW: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(stream: BytesIO, storages: dict[str, Storage] | None = None) -> object:
    """The next pickle's value, made of plain containers and the classes of `pickled`.

    Args:
        stream: where the pickle starts.
        storages: gets all storages that the pickle speaks of, by their keys.

    Raises:
        CheckpointError: it is damaged, or endless.
    """
    try:
        return _Machine({} if storages is None else storages).run(stream)
    except ValueError as error:
        what = str(error)
        raise CheckpointError(f"neither a safetensors file nor a torch file of tensors: {what}") from error
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        what = f"a damaged pickle ({type(error).__name__})"
        raise CheckpointError(f"neither a safetensors file nor a torch file of tensors: {what}") from error


class _Machine:
    """Runs one pickle."""

    def __init__(self, storages: dict[str, Storage], nested: bool = False) -> None:
        self.storages = storages
        self.nested = nested
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BytesIO) -> object:
        stack, memo = self.stack, self.memo
        argument: Any
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise ValueError("an endless pickle")
            name = opcode.name
            if name in _ARGUMENTS:
                stack.append(argument)
            elif name in _NEW:
                stack.append(_NEW[name]())
            elif name in _TUPLES:
                size = _TUPLES[name]
                stack[-size:] = [tuple(stack[-size:])]
            elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                getattr(self, f"_{name.lower()}", self._unknown)(argument)
        raise ValueError("a pickle without an end")

    def _unknown(self, argument: object) -> None:
        raise ValueError("a pickle that asks for what no checkpoint holds")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _mark(self, _: object) -> None:
        self.marks.append(len(self.stack))

    def _pop(self, _: object) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _pop_mark(self, _: object) -> None:
        self._since_mark()

    def _dup(self, _: object) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self, _: object) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _list(self, _: object) -> None:
        self.stack.append(self._since_mark())

    _frozenset = _list

    def _dict(self, _: object) -> None:
        values = self._since_mark()
        self.stack.append({})
        self._set(values)

    def _setitem(self, _: object) -> None:
        values = self.stack[-2:]
        del self.stack[-2:]
        self._set(values)

    def _setitems(self, _: object) -> None:
        self._set(self._since_mark())

    def _set(self, values: list[Any]) -> None:
        """Adds keys and values, alternating, to what is on top. What cannot be a key is left out."""
        into = self.stack[-1]
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(into, dict) and isinstance(key, str | int | float | bytes | None):
                into[key] = value
            elif isinstance(into, Stub):
                into.items.append((key, value))

    def _append(self, _: object) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _appends(self, _: object) -> None:
        self._extend(self._since_mark())

    _additems = _appends

    def _extend(self, values: list[Any]) -> None:
        into = self.stack[-1]
        if isinstance(into, list):
            into += values
        elif isinstance(into, Stub):
            into.items += enumerate(values, start=len(into.items))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Global(module, name))

    def _stack_global(self, _: object) -> None:
        module, name = self.stack[-2:]
        self.stack[-2:] = [Global(str(module), str(name))]

    def _ext1(self, argument: int) -> None:
        self.stack.append(Global("copyreg", f"extension {argument}"))

    _ext2 = _ext4 = _ext1

    def _reduce(self, _: object) -> None:
        args = self.stack.pop()
        callee = self.stack[-1]
        if callee == _STORAGE_IN_BYTES and isinstance(args, tuple) and isinstance(args[0], bytes):
            self.stack[-1] = self._storage_in(args[0])
        else:
            self.stack[-1] = made_by_call(callee, args)

    def _storage_in(self, content: bytes) -> object:
        """The storage of a tensor that was pickled without torch.save: a small torch file of old form."""
        if self.nested:
            raise ValueError("a pickle within a pickle within a pickle")
        stream = BytesIO(content)
        *_, storage, _ = (_Machine({}, nested=True).run(stream) for _ in range(LEGACY_PICKLES + 1))
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without its numbers")
        return replace(storage, content=content[stream.tell() + 8 :])

    _newobj = _reduce

    def _newobj_ex(self, _: object) -> None:
        del self.stack[-1]  # the keywords
        self._reduce(None)

    def _inst(self, argument: str) -> None:
        args = tuple(self._since_mark())
        self._global(argument)
        self.stack[-1] = made_by_call(self.stack[-1], args)

    def _obj(self, _: object) -> None:
        cls, *args = self._since_mark()
        self.stack.append(made_by_call(cls, tuple(args)))

    def _build(self, _: object) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Stub):
            made.state = state
        elif isinstance(made, StoredTensor | QuantisedTensor):
            raise ValueError("a pickle that gives a tensor other numbers afterwards")

    def _binpersid(self, _: object) -> None:
        found = self.stack[-1] = storage_of(self.stack[-1])
        if isinstance(found, Storage) and self.storages.setdefault(found.key, found).dtype != found.dtype:
            raise ValueError("a pickle that takes the same numbers for two types")

    def _persid(self, argument: str) -> None:
        self.stack.append(Stub("a persistent id", argument))
