"""The register: who the recipients are, and what makes and tells apart their copies."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from activemark_fast.codec.codebooks import SiteMeasure
from activemark_fast.dress import copied
from activemark_fast.files import write_whole
from activemark_fast.key import Key
from activemark_fast.tracing.codewords import draw_biases, draw_codewords
from activemark_fast.watermark import fingerprint

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESSIV

REGISTER_VERSION = 1
LONGEST_NAME = 60
_MAGIC = b"activemark register "
_METADATA_KEY = "activemark_register"
_ALLOWED = frozenset(" ._@+-")


class RegisterError(ValueError):
    """A register file that cannot be used, or not with this key or watermark."""


@dataclass(frozen=True, eq=False)
class Change:
    """How one matrix of a copy differs from the marked model's: by (c left)^T right, with c of +1 and -1.

    Attributes:
        start: which part of a codeword c is: `len(left)` positions from this one on.
        left: (k, out) float32.
        right: (k, in) float32.
    """

    start: int
    left: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class Register:
    """What `embed` leaves behind for copies and for `trace`, besides the watermark.

    It holds names, and what shows where the traced rows lie, but no key and no codeword. Whoever has it can
    take the traced rows out of a copy, so its file is encrypted.

    Attributes:
        names: of all recipients so far.
        fingerprint: `fingerprint` of the marked model, before it is anybody's copy.
        tag: MAC of the fingerprint under the key.
        changes: of each matrix that differs from copy to copy, by its name in the state dict.
        measured: how the original's tokens vary at the site; traced directions follow from it and the key.
        reference: (taps, books, bits) float64, what the traced rows of the marked model answer by themselves.
    """

    names: tuple[str, ...]
    fingerprint: str
    tag: bytes = field(repr=False)
    changes: Mapping[str, Change] = field(repr=False)
    measured: SiteMeasure = field(repr=False)
    reference: Tensor = field(repr=False)

    @classmethod
    def make(
        cls,
        key: Key,
        names: Sequence[str],
        marked: nn.Module,
        changes: Mapping[str, Change],
        measured: SiteMeasure,
        reference: Tensor,
    ) -> Register:
        """The register of `marked`, as the attributes say. Raises what `check_names` does."""
        print_ = fingerprint(marked)
        return cls(check_names(names), print_, _tag(key, print_), changes, measured, reference)

    @property
    def positions(self) -> int:
        """Length of a codeword."""
        return self.reference.numel()

    def digest(self) -> bytes:
        """SHA-256 over the marked model's fingerprint and all names."""
        told = json.dumps([self.fingerprint, *self.names]).encode()
        return hashlib.sha256(told).digest()

    def check(self, key: Key) -> None:
        """Raises RegisterError unless the register was made with `key`."""
        if not hmac.compare_digest(self.tag, _tag(key, self.fingerprint)):
            raise RegisterError("key: wanted the key this register was made with, got another one")

    def added(self, names: Sequence[str]) -> Register:
        """With further recipients; the copies of those before stay what they are, and so do their names.

        Raises:
            TypeError, ValueError: `check_names` says so of these names, or of all together.
        """
        known = set(self.names)
        further = [name for name in check_names(names) if name not in known]
        return replace(self, names=check_names([*self.names, *further]))

    def weights(self, key: Key, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The matrices of a recipient's copy that differ from the marked model's, by their names.

        Args:
            key: the mark's.
            model: the marked model, as `embed` returned it.
            name: a recipient.

        Raises:
            ValueError: `name` is no recipient.
            RegisterError: `key` is another one.
        """
        self.check(key)
        if name not in self.names:
            raise ValueError("name: wanted a recipient of this register, got another name")
        word = draw_codewords(key, [name], draw_biases(key, self.positions))[0]
        return changed(model, self.changes, torch.from_numpy(word))

    def copy(self, key: Key, model: nn.Module, name: str) -> nn.Module:
        """The copy of a recipient; `model` stays as it is.

        Args:
            key: the mark's.
            model: the marked model, as `embed` returned it.
            name: a recipient.

        Raises:
            ValueError: `name` is no recipient, or `model` is not the marked model.
            RegisterError: `key` is another one.
        """
        self.check_model(model)
        weights = self.weights(key, model, name)
        made = copied(model)
        made.load_state_dict(weights, strict=False)
        return made

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError unless `model` is the marked model, bit for bit."""
        if fingerprint(model) != self.fingerprint:
            raise ValueError("model: wanted the marked model that this register was made for, got another")

    def save(self, path: str | os.PathLike[str], key: Key) -> None:
        """Writes one file, whole or not at all: AES-SIV (RFC 5297) under a key derived from `key`.

        The encryption takes no random number, so the same register gives the same file, and two registers
        under one key tell nothing but their lengths.

        Raises:
            RegisterError: `key` is another one.
            OSError: the file cannot be written.
        """
        self.check(key)
        header = {
            "names": list(self.names),
            "fingerprint": self.fingerprint,
            "tag": self.tag.hex(),
            "starts": {name: change.start for name, change in self.changes.items()},
            "spread": self.measured.spread,
        }
        tensors = {"covariance": self.measured.covariance, "reference": self.reference}
        for name, change in self.changes.items():
            tensors |= {f"left/{name}": change.left, f"right/{name}": change.right}
        plain = save(tensors, metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)})
        head = _MAGIC + f"{REGISTER_VERSION}\n".encode()
        write_whole(path, head + _cipher(key).encrypt(plain, [head]))

    @classmethod
    def load(cls, path: str | os.PathLike[str], key: Key) -> Register:
        """Reads a file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            RegisterError: it is no register, of a newer format, damaged, or of another key.
        """
        from cryptography.exceptions import InvalidTag

        data = Path(path).read_bytes()
        head, _, sealed = data.partition(b"\n")
        version = head.removeprefix(_MAGIC)
        if not head.startswith(_MAGIC) or not version.isdigit() or len(version) > 9:
            raise RegisterError(f"{path}: not a register")
        if int(version) > REGISTER_VERSION:
            raise RegisterError(
                f"{path}: register of format {int(version)}, this release reads format {REGISTER_VERSION}: "
                "update activemark_fast"
            )
        try:
            plain = _cipher(key).decrypt(sealed, [head + b"\n"])
        except (InvalidTag, ValueError) as error:
            raise RegisterError(
                f"{path}: wanted a whole register and the key it was made with; it is damaged, or the key is "
                "another one"
            ) from error
        try:  # only the owner can have written it
            length = int.from_bytes(plain[:8], "little")
            header = json.loads(json.loads(plain[8 : 8 + length])["__metadata__"][_METADATA_KEY])
            tensors = load(plain)
            changes = {
                name: Change(start, tensors[f"left/{name}"], tensors[f"right/{name}"])
                for name, start in header["starts"].items()
            }
            measured = SiteMeasure(tensors["covariance"], header["spread"])
            names, tag = tuple(header["names"]), bytes.fromhex(header["tag"])
            return cls(names, header["fingerprint"], tag, changes, measured, tensors["reference"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RegisterError(f"{path}: not a register: {type(error).__name__} in its content") from error


def changed(model: nn.Module, changes: Mapping[str, Change], word: Tensor) -> dict[str, Tensor]:
    """The matrices of `model` that differ in a copy with the codeword `word`, (positions,) of booleans."""
    signs = 2 * word.float() - 1
    weights = {}
    for name, change in changes.items():
        weight = model.get_parameter(name).detach()
        c = signs[change.start : change.start + len(change.left), None]
        added = ((c * change.left).T @ change.right).to(weight.device).view_as(weight)
        weights[name] = (weight.float() + added).to(weight.dtype)
    return weights


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Recipients' names, in Unicode's composed form.

    A name names its copy's file: up to 60 letters, digits, spaces and . _ @ + -, no full stop or space at
    either end, and no two names that a file system takes for one.

    Raises:
        TypeError: `names` is no sequence of strings.
        ValueError: there are none, or one is not as described.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"recipients: wanted a sequence of names, got {type(names).__name__}")
    seen: dict[str, int] = {}
    checked = []
    for number, name in enumerate(names, 1):
        if not isinstance(name, str):
            raise TypeError(f"recipients: wanted strings, got {type(name).__name__} as name {number}")
        composed = unicodedata.normalize("NFC", name)
        if not 1 <= len(composed) <= LONGEST_NAME:
            raise ValueError(
                f"recipients: wanted names of 1 to {LONGEST_NAME} characters, got {len(composed)} in name "
                f"{number}"
            )
        if not all(c.isalnum() or c in _ALLOWED for c in composed) or composed.strip(" .") != composed:
            raise ValueError(
                "recipients: wanted letters, digits, spaces and . _ @ + -, none but letters, digits and "
                f"_ @ + - at either end, got another character in name {number}"
            )
        folded = composed.casefold()
        if folded in seen:
            raise ValueError(
                f"recipients: wanted each name once, got name {number} as number {seen[folded]}, too"
            )
        seen[folded] = number
        checked.append(composed)
    if not checked:
        raise ValueError("recipients: wanted at least one name, got none")
    return tuple(checked)


def _tag(key: Key, fingerprint_: str) -> bytes:
    return key.mac("tracing/register", fingerprint_.encode())


def _cipher(key: Key) -> AESSIV:
    from cryptography.hazmat.primitives.ciphers.aead import AESSIV

    return AESSIV(key.derive("tracing/file", 64))
