"""A list of recipients as one hash, of which each name can be opened alone.

A Merkle tree as in RFC 6962, section 2.1. A leaf is a name with a *salt*, 32 bytes that follow from key,
model and name: without the salt nobody can tell by the hash whose it is. The salts of others stay secret when
one name is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from activemark_fast.files import write_whole
from activemark_fast.key import Key
from activemark_fast.tracing.register import Register

PROOF_VERSION = 1
MAX_BYTES = 100_000
_FORMAT = "activemark recipient"
_FIELDS = frozenset({"format", "version", "name", "salt", "index", "size", "path"})
_CONTEXT = b"activemark_fast/v1/recipients/"


class ProofError(ValueError):
    """A file that does not open a recipient."""


@dataclass(frozen=True)
class RecipientProof:
    """What opens one name in a commitment to a list of recipients.

    Attributes:
        name: of the recipient.
        salt: 32 bytes.
        index: where the name is in the list, from 0.
        size: how many recipients there are.
        path: the hashes beside the way to the root, from the leaf on, 32 bytes each.
    """

    name: str
    salt: bytes
    index: int
    size: int
    path: tuple[bytes, ...]

    @classmethod
    def of(cls, register: Register, key: Key, name: str) -> RecipientProof:
        """The proof for a recipient.

        Raises:
            RegisterError: `key` is not the register's.
            ValueError: `name` is no recipient.
        """
        register.check(key)
        if name not in register.names:
            raise ValueError("name: wanted a recipient of this register, got another name")
        index = register.names.index(name)
        leaves = _leaves(register, key)
        path = tuple(reversed(_path(leaves, index)))
        return cls(name, _salt(register, key, name), index, len(leaves), path)

    def root(self) -> bytes:
        """The hash of the list that the name is in, 32 bytes (RFC 9162, section 2.1.3.2).

        Raises ProofError where the path does not fit.
        """
        node = _leaf(self.salt, self.name)
        index, last = self.index, self.size - 1
        for beside in self.path:
            if last == 0:
                raise ProofError("path: wanted no more hashes than the list has levels")
            if index % 2 == 1 or index == last:
                node = _node(beside, node)
                while index % 2 == 0 and index > 0:
                    index, last = index // 2, last // 2
            else:
                node = _node(node, beside)
            index, last = index // 2, last // 2
        if last != 0:
            raise ProofError("path: wanted a hash for each level of the list")
        return node

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, JSON, whole or not at all."""
        record = asdict(self) | {
            "format": _FORMAT,
            "version": PROOF_VERSION,
            "salt": self.salt.hex(),
            "path": [part.hex() for part in self.path],
        }
        write_whole(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode(), mode=0o644)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RecipientProof:
        """Reads a file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ProofError: it is something else, damaged, or of a newer format.
        """
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        try:
            record = json.loads(data)
            if record["format"] == _FORMAT and record["version"] != PROOF_VERSION:
                raise ProofError(f"{path}: wanted format {PROOF_VERSION}: update activemark_fast")
            hashes = tuple(bytes.fromhex(part) for part in record["path"])
            salt, name, index, size = (
                bytes.fromhex(record["salt"]),
                record["name"],
                record["index"],
                record["size"],
            )
            well_formed = (
                record.keys() == _FIELDS
                and record["format"] == _FORMAT
                and all(len(part) == 32 for part in (salt, *hashes))
                and isinstance(name, str)
                and type(index) is type(size) is int
                and 0 <= index < size
            )
        except ProofError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ProofError(f"{path}: opens no recipient, or is damaged") from error
        if not well_formed:
            raise ProofError(f"{path}: opens no recipient, or is damaged")
        return cls(name, salt, index, size, hashes)


def recipients_root(register: Register, key: Key) -> bytes:
    """The hash of the register's list of recipients, 32 bytes. Raises RegisterError for another key."""
    register.check(key)
    return _root(_leaves(register, key))


def _salt(register: Register, key: Key, name: str) -> bytes:
    return key.derive(f"tracing/salt/{register.fingerprint}/{name}")


def _leaves(register: Register, key: Key) -> list[bytes]:
    return [_leaf(_salt(register, key, name), name) for name in register.names]


def _leaf(salt: bytes, name: str) -> bytes:
    return hashlib.sha256(b"\x00" + _CONTEXT + salt + name.encode("utf-8", "surrogatepass")).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(size: int) -> int:
    """The largest power of two below `size`, which is at least 2."""
    return 1 << ((size - 1).bit_length() - 1)


def _root(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    middle = _split(len(leaves))
    return _node(_root(leaves[:middle]), _root(leaves[middle:]))


def _path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes beside the way from the root to a leaf."""
    if len(leaves) == 1:
        return []
    middle = _split(len(leaves))
    if index < middle:
        return [_root(leaves[middle:]), *_path(leaves[:middle], index)]
    return [_root(leaves[:middle]), *_path(leaves[middle:], index - middle)]
