"""The part of msgpack in which Flax writes parameters: maps of maps of arrays."""

from __future__ import annotations

from activemark_fast.checkpoints.entries import Contents, Entry, Opened, numpy_dtype

_ARRAY = b"\x01"
"""Flax' extension type of arrays: (shape, name of the dtype, numbers) as msgpack again."""
_MAX_DEPTH = 40
_MAX_VALUES = 1_000_000
# First byte → kind, and how many bytes of length follow.
_SIZED = {
    first + index: (kind, size)
    for kind, first, sizes in (
        ("bytes", 0xC4, (1, 2, 4)),
        ("extension", 0xC7, (1, 2, 4)),
        ("text", 0xD9, (1, 2, 4)),
        ("list", 0xDC, (2, 4)),
        ("map", 0xDE, (2, 4)),
    )
    for index, size in enumerate(sizes)
}
# First byte → kind and length; of numbers, bytes.
_FIXED = {0x80 + n: ("map", n) for n in range(16)} | {0x90 + n: ("list", n) for n in range(16)}
_FIXED |= {0xA0 + n: ("text", n) for n in range(32)} | {0xD4 + n: ("extension", 1 << n) for n in range(5)}
_FIXED |= dict.fromkeys([*range(0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3], ("number", 0))
_FIXED |= {first + n: ("number", 1 << n) for first in (0xCC, 0xD0) for n in range(4)}
_FIXED |= {0xCA: ("number", 4), 0xCB: ("number", 8)}


def read_flax(file: Opened) -> Contents:
    """Every array, by its dotted name. Raises ValueError for something else."""
    scanner = _Scanner(file)
    end = scanner.value(0, "", 0)
    if end != file.size:
        raise ValueError(f"msgpack that ends after {end} of {file.size} bytes")
    return Contents(scanner.found)


class _Scanner:
    """Walks through the values. found: the arrays so far."""

    def __init__(self, file: Opened) -> None:
        self._file = file
        self._seen = 0
        self.found: dict[str, Entry] = {}

    def value(self, at: int, name: str, depth: int) -> int:
        """Notes the arrays in the value at `at`, and returns where it ends."""
        kind, length, at = self._head(at)
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if kind in ("map", "list"):
            for index in range(length):
                key = str(index)
                if kind == "map":
                    key, at = self._text(at)
                at = self.value(at, f"{name}.{key}" if name else key, depth + 1)
            return at
        if kind == "extension":
            if self._file.read(at, 1) == _ARRAY:
                self.found[name] = self._array(at + 1)
            at += 1
        return at + length

    def _head(self, at: int) -> tuple[str, int, int]:
        """Kind and length of the value at `at`, and where its content starts."""
        self._seen += 1
        if self._seen > _MAX_VALUES:
            raise ValueError("endless")
        first = self._file.read(at, 1)[0]
        if first in _FIXED:
            return *_FIXED[first], at + 1
        if first not in _SIZED:
            raise ValueError(f"a byte {first:#x} that means nothing")
        kind, size = _SIZED[first]
        return kind, int.from_bytes(self._file.read(at + 1, size), "big"), at + 1 + size

    def _array(self, at: int) -> Entry:
        kind, parts, at = self._head(at)
        if (kind, parts) != ("list", 3):
            raise ValueError("an array without shape, type and numbers")
        kind, axes, at = self._head(at)
        if kind != "list" or axes > 8:
            raise ValueError("a shape that is none")
        shape = []
        for _ in range(axes):
            first = self._file.read(at, 1)[0]
            _, length, start = self._head(at)
            shape.append(int.from_bytes(self._file.read(start, length), "big") if length else first)
            at = start + length
        dtype, at = self._text(at)
        kind, length, at = self._head(at)
        if kind != "bytes":
            raise ValueError("an array without numbers")
        self._file.read(at + length, 0)  # is all there
        return Entry.within(at + length, numpy_dtype(dtype), tuple(shape), self._file, at)

    def _text(self, at: int) -> tuple[str, int]:
        kind, length, at = self._head(at)
        if kind not in ("text", "bytes") or length > 1000:
            raise ValueError("a name that is none")
        return self._file.read(at, length).decode("utf-8", "replace"), at + length
