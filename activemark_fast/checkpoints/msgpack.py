"""The part of msgpack in which Flax writes parameters: maps of maps of arrays."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

_ARRAY = 1
"""Flax' extension type of arrays: (shape, name of the dtype, numbers) as msgpack again."""
_DEEPEST = 40
_MOST_VALUES = 1_000_000
# First byte → bytes of the length that follows.
_LENGTHS = {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_LENGTHS |= {0xC7: 1, 0xC8: 2, 0xC9: 4}
# First byte → bytes of a number.
_NUMBERS = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}


def flax_arrays(
    read: Callable[[int, int], bytes], size: int
) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Dotted name, numpy's name of the dtype, shape and offset of the numbers of every array.

    Args:
        read: gives the bytes from an offset on, a number of them.
        size: of the file, bytes.

    Raises:
        ValueError: it is something else.
    """
    scanner = _Scanner(read)
    end = yield from scanner.arrays(0, "", 0)
    if end != size:
        raise ValueError(f"ends after {end} of {size} bytes")


class _Scanner:
    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self.read = read
        self.seen = 0

    def head(self, at: int) -> tuple[str, int, int]:
        """Kind and length of the value at `at`, and where its content starts."""
        self.seen += 1
        if self.seen > _MOST_VALUES:
            raise ValueError("endless")
        first = self.read(at, 1)[0]
        for low, high, kind in ((0x80, 0x8F, "map"), (0x90, 0x9F, "list"), (0xA0, 0xBF, "text")):
            if low <= first <= high:
                return kind, first - low, at + 1
        if first in _LENGTHS:
            bytes_of_length = _LENGTHS[first]
            length = int.from_bytes(self.read(at + 1, bytes_of_length), "big")
            for highest, kind in ((0xC6, "bytes"), (0xC9, "extension"), (0xDB, "text"), (0xDD, "list")):
                if first <= highest:
                    return kind, length, at + 1 + bytes_of_length
            return "map", length, at + 1 + bytes_of_length
        if 0xD4 <= first <= 0xD8:
            return "extension", 1 << (first - 0xD4), at + 1
        if first in _NUMBERS:
            return "number", _NUMBERS[first], at + 1
        if first <= 0x7F or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3):
            return "number", 0, at + 1
        raise ValueError(f"a byte {first:#x} that means nothing")

    def arrays(
        self, at: int, name: str, depth: int
    ) -> Generator[tuple[str, str, tuple[int, ...], int], None, int]:
        """Yields the arrays in the value at `at`, and returns where it ends."""
        kind, length, at = self.head(at)
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        if kind in ("map", "list"):
            for index in range(length):
                key = str(index)
                if kind == "map":
                    key, at = self.text(at)
                at = yield from self.arrays(at, f"{name}.{key}" if name else key, depth + 1)
            return at
        if kind == "extension":
            if self.read(at, 1)[0] == _ARRAY:
                yield name, *self.array(at + 1)
            return at + 1 + length
        return at + length

    def array(self, at: int) -> tuple[str, tuple[int, ...], int]:
        kind, parts, at = self.head(at)
        if (kind, parts) != ("list", 3):
            raise ValueError("an array without shape, type and numbers")
        kind, axes, at = self.head(at)
        if kind != "list" or axes > 8:
            raise ValueError("a shape that is none")
        shape = []
        for _ in range(axes):
            first = self.read(at, 1)[0]
            _, length, start = self.head(at)
            shape.append(int.from_bytes(self.read(start, length), "big") if length else first)
            at = start + length
        dtype, at = self.text(at)
        kind, length, at = self.head(at)
        if kind != "bytes":
            raise ValueError("an array without numbers")
        self.read(at + length, 0)  # is all there
        return dtype, tuple(shape), at

    def text(self, at: int) -> tuple[str, int]:
        kind, length, at = self.head(at)
        if kind not in ("text", "bytes") or length > 1000:
            raise ValueError("a name that is none")
        return self.read(at, length).decode("utf-8", "replace"), at + length
