"""The owner's secret, and the random streams which are drawn from it.

Whatever must look random to everybody but the owner (directions, messages, trigger images) is read from a
`KeyStream`. Each stream belongs to one *purpose*, a short text; streams of two purposes, or of two keys,
have nothing in common. The mapping from key and purpose to numbers is written out here and rests on
standards only (HKDF-SHA256, ChaCha20), because a mark made today must be read with the same numbers years
later.
"""

from __future__ import annotations

import builtins
import hmac
import os
import re
import secrets
import stat
import unicodedata
import warnings
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from activemark_fast.files import naming

MIN_MATERIAL_BYTES = 16
MIN_PASSPHRASE_CHARACTERS = 8
PASSPHRASE_N, GRINDING_N = 2**17, 2**15
"""Cost of scrypt (RFC 7914) for a passphrase, 128 MiB, and for a key that a mark is drawn from, 32 MiB."""
SECONDS_A_KEY = 0.05
"""What stretching one key takes at least, on a core of today (`activemark forge` measures it)."""
KEYS_A_SECOND = 100_000
"""More keys than a GPU can stretch in a second: reading what scrypt writes, once, is 32 MiB of traffic for
each key, and an H100's memory moves 3.35 TB/s. An estimate that leaves out all else, for the forger."""
MAX_DERIVED_BYTES = 255 * 32  # HKDF-SHA256 gives no more
_CONTEXT = b"activemark_fast/v1/"
_FILE_FORMAT = "64 hexadecimal characters and at most one newline"


class Key:
    """The owner's secret; make one with `Key.of` or `Key.write_new`.

    Neither repr, str, an exception nor a pickle shows it: pickling and copying raise TypeError. Two keys
    are equal when their material is, compared in constant time. The material is overwritten with zeros when
    the key is no longer used. That is all Python allows: what a caller passed in as bytes or str stays the
    caller's, and what is derived from a key lives as long as Python pleases.
    """

    __slots__ = ("_material", "_stretched")

    def __init__(self, material: bytes | bytearray) -> None:
        """material: at least 16 secret random bytes. ValueError when there are fewer."""
        if not isinstance(material, (bytes, bytearray)):
            raise TypeError(f"material: wanted bytes, got {type(material).__name__}")
        if len(material) < MIN_MATERIAL_BYTES:
            raise ValueError(
                f"key: wanted at least {MIN_MATERIAL_BYTES} bytes of key material, got {len(material)}"
            )
        self._material = bytearray(material)
        self._stretched: Key | None = None

    def __del__(self) -> None:
        material = getattr(self, "_material", bytearray())
        material[:] = bytes(len(material))

    @classmethod
    def of(cls, key: Key | bytes | bytearray | memoryview | str | os.PathLike[str]) -> Key:
        """The key which `key` stands for.

        - a Key: itself.
        - bytes, bytearray, memoryview: raw key material, at least 16 bytes.
        - str: a passphrase of at least 8 characters, NFKC-normalised and stretched by scrypt (N = 2^17,
          r = 8, p = 1: about 128 MiB and half a second). The salt is fixed, since the mark must be
          reproducible from the passphrase alone; so equal passphrases give equal keys, and one table of
          guesses serves against all owners. Whoever guesses the passphrase can read the mark and claim
          it: take six or more words chosen by dice, or better a key file.
        - os.PathLike: a key file as `write_new` makes it, 64 hexadecimal characters and at most one
          newline.

        Raises TypeError for anything else; ValueError for too short or malformed input, and for a str which
        is the path of an existing file (a path belongs into pathlib.Path); OSError where the file cannot be
        read. Warns (UserWarning) of a key file that others can read.
        """
        if isinstance(key, Key):
            return key
        if isinstance(key, (bytes, bytearray, memoryview)):
            return cls(bytearray(key))
        if isinstance(key, str):
            return cls(_stretch(key))
        if isinstance(key, os.PathLike):
            return cls(_read_file(key))
        raise TypeError(f"key: wanted a Key, bytes, a passphrase (str) or a path, got {type(key).__name__}")

    @classmethod
    def write_new(cls, path: str | os.PathLike[str]) -> Key:
        """Makes a new random 256-bit key, writes it to `path` as hexadecimal text (mode 0600) and returns it.

        Raises FileExistsError where there is anything at `path`: a key is never overwritten.
        """
        key = cls(secrets.token_bytes(32))
        key.write(path)
        return key

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the key to `path` as `write_new` does.

        Raises FileExistsError where there is anything at `path`, ValueError for a key that was not made from
        a key file, a passphrase or as a sub-key and has more or fewer than 32 bytes.
        """
        if len(self._material) != 32:
            raise ValueError(
                f"key: wanted 32 bytes of key material for a key file, got {len(self._material)}"
            )
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with naming(path), os.fdopen(descriptor, "w", encoding="ascii", newline="\n") as file:
                file.write(self._material.hex() + "\n")
        except BaseException:  # half a key is none
            os.unlink(path)
            raise

    def subkey(self, label: str) -> Key:
        """An independent key for `label`: it tells nothing about this key, nor about other labels'."""
        if not isinstance(label, str):
            raise TypeError(f"label: wanted str, got {type(label).__name__}")
        if not label:
            raise ValueError("label: wanted a text which is not empty")
        return Key(self.derive(f"subkey/{label}"))

    def stretched(self) -> Key:
        """The key that a mark is drawn from.

        Whoever has a suspect first and looks for a key that happens to agree with it pays for every key they
        try: scrypt with N = 2^15, r = 8, p = 1, 32 MiB of memory, about a tenth of a second of one core. A
        forger can do without a reading of the suspect (its mean Jacobian tells almost as much), not without
        this.

        What is stretched is derived from the material, which scrypt itself would fill up with zeros to 64
        bytes, or hash: several keys, each with its own images, would then share one stretched key.
        """
        if self._stretched is None:
            self._stretched = Key(_scrypt(b"grinding", self.derive("stretch"), GRINDING_N))
        return self._stretched

    def derive(self, purpose: str, length: int = 32) -> bytes:
        """`length` secret bytes for `purpose`, 1 to 8160.

        HKDF-SHA256 without salt, info "activemark_fast/v1/" + purpose. A purpose serves one use only:
        `stream(purpose)` is keyed with `derive(purpose)`.
        """
        if not isinstance(purpose, str):
            raise TypeError(f"purpose: wanted str, got {type(purpose).__name__}")
        if not purpose:
            raise ValueError("purpose: wanted a text which is not empty")
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"length: wanted int, got {type(length).__name__}")
        if not 1 <= length <= MAX_DERIVED_BYTES:
            raise ValueError(f"length: wanted 1 to {MAX_DERIVED_BYTES} bytes, got {length}")
        # Here and not above: kernels are measured on machines that have PyTorch but not this library.
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = _CONTEXT + purpose.encode()
        return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(self._material)

    def stream(self, purpose: str) -> KeyStream:
        """A new stream of random numbers for `purpose`, from its beginning."""
        return KeyStream(self.derive(purpose))

    def mac(self, purpose: str, data: bytes) -> bytes:
        """HMAC-SHA256 of `data` (32 bytes) under the sub-key derived for "mac/" + purpose."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data: wanted bytes, got {type(data).__name__}")
        return hmac.digest(self.derive(f"mac/{purpose}"), data, "sha256")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return hmac.compare_digest(self._material, other._material)

    def __repr__(self) -> str:
        return "Key(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Key is not pickled or copied: hand over the Key itself or its file")


class KeyStream:
    """A deterministic stream of random numbers: the ChaCha20 keystream under a key, nonce and counter 0.

    Every method takes the next bytes of the stream, so what a call returns depends on the calls before it.
    64-bit words are little-endian. The numbers are the same on every platform and for ever; only `normal`
    goes through a library function whose last bit may differ between versions.

    A shape is an int or a tuple of ints, none negative; results are C-ordered. TypeError or ValueError
    otherwise.
    """

    def __init__(self, key: bytes) -> None:
        """key: 32 secret bytes."""
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        self._keystream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def bytes(self, n: int) -> builtins.bytes:
        """The next n bytes."""
        (n,) = _dims("n", n)
        return self._keystream.update(builtins.bytes(n))

    def uint64(self, n: int) -> npt.NDArray[np.uint64]:
        """The next n words, (n,) uint64."""
        (n,) = _dims("n", n)
        return np.frombuffer(self.bytes(8 * n), dtype="<u8").astype(np.uint64)

    def uniform(self, shape: int | tuple[int, ...]) -> npt.NDArray[np.float64]:
        """Uniform in [0, 1), float64: the upper 53 bits of a word, over 2^53."""
        dims = _dims("shape", shape)
        words = self._words(dims, 53)
        words *= 2.0**-53
        return words

    def normal(self, shape: int | tuple[int, ...]) -> npt.NDArray[np.float64]:
        """Standard normal, float64; at most 8.21, never infinite.

        The inverse normal distribution function of (k + 1/2) / 2^52, k the upper 52 bits of a word: with
        53 the half would be rounded away.
        """
        from scipy.special import ndtri  # scipy takes longer to import than all the rest

        dims = _dims("shape", shape)
        return np.asarray(ndtri((self._words(dims, 52) + 0.5) * 2.0**-52))

    def bits(self, shape: int | tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Fair coins 0 or 1, uint8: eight of a byte, lowest first; the rest of the last byte is dropped."""
        dims = _dims("shape", shape)
        count = int(np.prod(dims, dtype=np.int64))
        packed = np.frombuffer(self.bytes((count + 7) // 8), dtype=np.uint8)
        return np.unpackbits(packed, count=count, bitorder="little").reshape(dims)

    def integers(self, low: int, high: int, shape: int | tuple[int, ...]) -> npt.NDArray[np.int64]:
        """Uniform integers low <= i < high, int64, without bias.

        low + (word modulo the span), where words that would favour small remainders are passed over.
        high - low: 1 to 2^63, both ends within int64.
        """
        dims = _dims("shape", shape)
        for name, bound in (("low", low), ("high", high)):
            if not isinstance(bound, (int, np.integer)) or isinstance(bound, bool):
                raise TypeError(f"{name}: wanted int, got {type(bound).__name__}")
        low, high = int(low), int(high)
        span = high - low
        if low < -(2**63) or high > 2**63 or not 1 <= span <= 2**63:
            raise ValueError(
                f"low, high: wanted int64 bounds with 1 <= high - low <= 2^63, got {low}, {high}"
            )
        count = int(np.prod(dims, dtype=np.int64))
        largest_fair_word = np.uint64(2**64 - 2**64 % span - 1)
        words = self.uint64(count)
        words = words[words <= largest_fair_word]
        while len(words) < count:
            more = self.uint64(count - len(words))
            words = np.concatenate([words, more[more <= largest_fair_word]])
        # A remainder is below 2^63, its sum with low below high: neither the cast nor the sum overflows.
        return ((words % np.uint64(span)).astype(np.int64) + low).reshape(dims)

    def permutation(self, n: int) -> npt.NDArray[np.int64]:
        """A random order of 0 … n - 1, (n,) int64: the order that sorts n words.

        Equal words keep their order; there are any with a probability below n^2 / 2^65.
        """
        return np.argsort(self.uint64(n), kind="stable").astype(np.int64)

    def _words(self, dims: tuple[int, ...], bits: int) -> npt.NDArray[np.float64]:
        words = self.uint64(int(np.prod(dims, dtype=np.int64)))
        words >>= np.uint64(64 - bits)
        return words.astype(np.float64).reshape(dims)


def _dims(name: str, shape: int | tuple[int, ...]) -> tuple[int, ...]:
    dims = shape if isinstance(shape, tuple) else (shape,)
    for dim in dims:
        if not isinstance(dim, (int, np.integer)) or isinstance(dim, bool):
            raise TypeError(f"{name}: wanted an int or a tuple of ints, got {type(dim).__name__}")
        if dim < 0:
            raise ValueError(f"{name}: wanted no negative size, got {shape}")
    return tuple(int(dim) for dim in dims)


def _stretch(passphrase: str) -> bytes:
    # Checked here because str.encode would quote the passphrase in its error.
    if any("\ud800" <= character <= "\udfff" for character in passphrase):
        raise ValueError("key: wanted a passphrase of valid Unicode text, got lone surrogates")
    if os.path.isfile(passphrase):
        raise ValueError(
            "key: a str is a passphrase, but this one is the path of a file; wanted a pathlib.Path"
        )
    normalised = unicodedata.normalize("NFKC", passphrase)
    if len(normalised) < MIN_PASSPHRASE_CHARACTERS:
        raise ValueError(
            f"key: wanted a passphrase of at least {MIN_PASSPHRASE_CHARACTERS} characters, "
            f"got {len(normalised)}"
        )
    return _scrypt(b"passphrase", normalised.encode(), PASSPHRASE_N)


def _scrypt(purpose: bytes, secret: bytes | bytearray, n: int) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(salt=_CONTEXT + purpose, length=32, n=n, r=8, p=1).derive(secret)


def _read_file(path: os.PathLike[str]) -> bytearray:
    with open(path, "rb") as file:
        if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            warnings.warn(
                f"key: others can read the key file {os.fspath(path)!r}; wanted mode 0600", stacklevel=4
            )
        content = file.read(67)  # one byte more than the longest valid file
    if not re.fullmatch(rb"[0-9a-fA-F]{64}(\r?\n)?", content):
        raise ValueError(f"key: wanted {_FILE_FORMAT} in the key file {os.fspath(path)!r}, got other content")
    return bytearray.fromhex(content[:64].decode("ascii"))
