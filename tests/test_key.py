from __future__ import annotations

import copy
import hashlib
import hmac
import os
import pickle
import stat
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activemark_fast.key import Key, KeyStream

MATERIAL = b"sixteen bytes, a secret for the tests"
SHAPES = st.one_of(st.integers(0, 40), st.tuples(st.integers(0, 6), st.integers(0, 6)))


@pytest.fixture
def key() -> Key:
    return Key.of(MATERIAL)


# --- what a key is made of ---


def test_of_returns_a_key_itself(key: Key) -> None:
    assert Key.of(key) is key


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_bytes_like_material_is_the_same_key(kind: type, key: Key) -> None:
    assert Key.of(kind(MATERIAL)) == key


def test_equality(key: Key) -> None:
    assert key == Key.of(MATERIAL)
    assert key != Key.of(MATERIAL + b"!")
    assert key != MATERIAL


@pytest.mark.parametrize("length", [0, 15])
def test_short_material_is_refused_with_its_length(length: int) -> None:
    with pytest.raises(ValueError, match=rf"key: .*at least 16 .*got {length}"):
        Key.of(b"\xab" * length)


@pytest.mark.parametrize("value", [None, 7, ["passphrase"], 1.5])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match=f"key: .*got {type(value).__name__}"):
        Key.of(value)  # type: ignore[arg-type]


def test_constructor_takes_bytes_only() -> None:
    with pytest.raises(TypeError, match="material"):
        Key("a text of more than sixteen characters")  # type: ignore[arg-type]


# --- passphrases ---


def test_passphrase_is_stretched_by_scrypt() -> None:
    expected = hashlib.scrypt(
        b"correct horse",
        salt=b"activemark_fast/v1/passphrase",
        n=2**17,
        r=8,
        p=1,
        maxmem=2**28,
        dklen=32,
    )
    assert Key.of("correct horse") == Key.of(expected)


def test_keys_share_no_stretched_key() -> None:
    # As a password of HMAC, material is filled up with zeros to 64 bytes, and hashed where it is longer.
    long = bytes(range(80))
    materials = [bytes([5]) * 32 + bytes(n) for n in range(4)] + [long, hashlib.sha256(long).digest()]
    stretched = [Key(material).stretched().derive("test") for material in materials]
    assert len(set(stretched)) == len(materials)


def test_passphrase_is_nfkc_normalised() -> None:
    composed, decomposed, wide = "café au lait", "cafe\u0301 au lait", "ｃａｆé au lait"
    assert len({composed, decomposed, wide}) == 3
    assert Key.of(composed) == Key.of(decomposed) == Key.of(wide)


@pytest.mark.parametrize("passphrase", ["", "7 chars"])
def test_short_passphrase_is_refused(passphrase: str) -> None:
    with pytest.raises(ValueError, match=f"at least 8 characters, got {len(passphrase)}"):
        Key.of(passphrase)


def test_path_given_as_str_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "owner.key"
    Key.write_new(path)
    with pytest.raises(ValueError, match=r"pathlib\.Path") as caught:
        Key.of(str(path))
    assert str(path) not in str(caught.value)


# --- key files ---


def test_key_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "owner.key"
    key = Key.write_new(path)
    assert Key.of(path) == key
    assert Key.write_new(str(tmp_path / "other.key")) != key
    content = path.read_text()
    assert len(content) == 65
    assert content.endswith("\n")
    assert Key.of(bytes.fromhex(content)) == key


def test_key_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "owner.key"
    Key.write_new(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_that_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, *_: object, **__: object) -> None:
        os.close(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*owner.key'"):
        Key.write_new(tmp_path / "owner.key")
    assert list(tmp_path.iterdir()) == []


def test_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "owner.key"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        Key.write_new(path)
    dangling = tmp_path / "link.key"
    dangling.symlink_to(tmp_path / "elsewhere.key")
    with pytest.raises(FileExistsError):
        Key.write_new(dangling)
    assert path.read_text() == "precious"
    assert not (tmp_path / "elsewhere.key").exists()


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_key_file_newline_is_optional(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "owner.key"
    path.write_bytes(("AB" * 32 + ending).encode())
    assert Key.of(path) == Key.of(b"\xab" * 32)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"ab" * 31,
        b"ab" * 33,
        b"ab" * 32 + b"\n\n",
        b"xy" * 32,
        b"\xff" * 32,
        b"\xff" * 64,
        b" " + b"ab" * 32,
    ],
)
def test_malformed_key_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "owner.key"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"64 hexadecimal characters.*owner\.key.*other content") as caught:
        Key.of(path)
    assert str(path) in str(caught.value)
    if content.strip():
        assert content.decode("latin-1").strip() not in str(caught.value)
    assert caught.value.__context__ is None


def test_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Key.of(tmp_path / "none.key")


# --- secrecy ---


@pytest.mark.parametrize("show", [repr, str, "{}".format, lambda key: repr([key]), lambda key: f"{key!r}"])
def test_key_is_not_shown(show: object, key: Key) -> None:
    shown = show(key)  # type: ignore[operator]
    assert "Key(...)" in shown
    assert "secret" not in shown
    assert MATERIAL.hex() not in shown


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_key_is_not_pickled(protocol: int, key: Key) -> None:
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key, protocol)


def test_key_is_not_copied(key: Key) -> None:
    with pytest.raises(TypeError):
        copy.deepcopy(key)


def test_stream_is_neither_shown_nor_pickled(key: Key) -> None:
    stream = key.stream("a")
    assert key.derive("a").hex() not in repr(stream)
    with pytest.raises(TypeError):
        pickle.dumps(stream)


@pytest.mark.parametrize("secret", [b"hunter2", "hunter2", "hunter2 \ud800 and more"])
def test_errors_do_not_quote_the_secret(secret: bytes | str) -> None:
    with pytest.raises(ValueError, match=r"^key: ") as caught:
        Key.of(secret)
    chain = "".join(traceback.format_exception_only(caught.type, caught.value))
    assert "hunter2" not in chain
    assert caught.value.__context__ is None


# --- derived keys ---


def hkdf_sha256(material: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 without salt, written down a second time."""
    extracted = hmac.digest(bytes(32), material, "sha256")
    blocks, block = b"", b""
    for counter in range(1, 256):
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        blocks += block
    return blocks[:length]


@given(st.binary(min_size=16, max_size=80), st.text("abc/é", min_size=1), st.sampled_from([1, 32, 33, 8160]))
@settings(deadline=None)
def test_derive_is_hkdf(material: bytes, purpose: str, length: int) -> None:
    expected = hkdf_sha256(material, b"activemark_fast/v1/" + purpose.encode(), length)
    assert Key.of(material).derive(purpose, length) == expected


def test_mac_is_hmac_under_a_key_of_its_own(key: Key) -> None:
    assert key.mac("a", b"data") == hmac.digest(key.derive("mac/a"), b"data", "sha256")
    assert len({key.mac("a", b"data"), key.mac("b", b"data"), key.mac("a", b"date")}) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        (("",), ValueError, "purpose"),
        ((b"a",), TypeError, "purpose"),
        (("a", 0), ValueError, "length"),
        (("a", 8161), ValueError, "length"),
        (("a", 2.0), TypeError, "length"),
        (("a", True), TypeError, "length"),
    ],
)
def test_derive_refuses(arguments: tuple[object, ...], error: type[Exception], name: str, key: Key) -> None:
    with pytest.raises(error, match=name):
        key.derive(*arguments)  # type: ignore[arg-type]


def test_mac_refuses_text(key: Key) -> None:
    with pytest.raises(TypeError, match="data"):
        key.mac("a", "text")  # type: ignore[arg-type]


# --- streams: known answers; a change here means that marks made before cannot be read any more ---


def test_keystream_is_chacha20() -> None:
    # RFC 8439, appendix A.1, test vectors 1 and 2 (key, nonce zero; counter 0, then 1).
    expected = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert KeyStream(bytes(32)).bytes(128) == expected
    words = KeyStream(bytes(32)).uint64(2)
    assert words.tolist() == [0x903DF1A0ADE0B876, 0x28BD8653E56A5D40]


def test_mappings_from_the_keystream() -> None:
    first = 0x903DF1A0ADE0B876
    assert KeyStream(bytes(32)).uniform(1)[0] == (first >> 11) / 2**53
    assert KeyStream(bytes(32)).bits(10).tolist() == [0, 1, 1, 0, 1, 1, 1, 0, 0, 0]  # 0x76, then 0xb8
    assert KeyStream(bytes(32)).integers(-5, 95, 1)[0] == first % 100 - 5
    words = KeyStream(bytes(32)).uint64(6).tolist()
    assert KeyStream(bytes(32)).permutation(6).tolist() == sorted(range(6), key=words.__getitem__)


def test_known_answers(key: Key) -> None:
    stream = key.stream("known answers")
    assert stream.bytes(8).hex() == "0226f641f50e12ec"
    assert stream.uint64(1)[0] == 7662286480303929794
    assert stream.uniform(2).tolist() == [0.8604469026601375, 0.33067512670821053]
    np.testing.assert_allclose(
        stream.normal(3), [0.15889377590238074, -1.611048214982783, -1.135899489647705], rtol=1e-14
    )
    assert stream.bits((2, 8)).tolist() == [[1, 0, 0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 0, 1, 1]]
    assert stream.integers(-10, 1000, 4).tolist() == [368, 558, 52, 675]
    assert stream.permutation(8).tolist() == [6, 2, 4, 5, 1, 0, 3, 7]


# --- streams: properties ---


@given(st.lists(st.integers(0, 100), max_size=8))
@settings(deadline=None)
def test_reading_in_pieces_equals_reading_at_once(pieces: list[int]) -> None:
    key = Key.of(MATERIAL)
    stream = key.stream("a")
    assert b"".join(stream.bytes(n) for n in pieces) == key.stream("a").bytes(sum(pieces))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 2**63))
@settings(deadline=None)
def test_integers_in_pieces_equal_integers_at_once(first: int, second: int, span: int) -> None:
    key = Key.of(MATERIAL)
    stream = key.stream("a")
    pieces = [*stream.integers(0, span, first).tolist(), *stream.integers(0, span, second).tolist()]
    assert pieces == key.stream("a").integers(0, span, first + second).tolist()


@given(SHAPES, st.text(min_size=1, max_size=9).filter(lambda text: text.isascii()))
@settings(deadline=None)
def test_types_shapes_ranges_and_determinism(shape: int | tuple[int, ...], purpose: str) -> None:
    key = Key.of(MATERIAL)
    dims = shape if isinstance(shape, tuple) else (shape,)
    for dtype, draw in (
        (np.float64, lambda stream: stream.uniform(shape)),
        (np.float64, lambda stream: stream.normal(shape)),
        (np.uint8, lambda stream: stream.bits(shape)),
        (np.int64, lambda stream: stream.integers(-3, 4, shape)),
    ):
        drawn = draw(key.stream(purpose))
        assert drawn.dtype == dtype
        assert drawn.shape == dims
        assert np.array_equal(drawn, draw(key.stream(purpose)))
        assert np.isfinite(drawn).all()
    uniform = key.stream(purpose).uniform(shape)
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert set(key.stream(purpose).bits(shape).ravel().tolist()) <= {0, 1}


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 2**63))
@settings(deadline=None)
def test_integers_stay_in_range(low: int, span: int) -> None:
    high = min(low + span, 2**63)
    drawn = Key.of(MATERIAL).stream("a").integers(low, high, 50).tolist()
    assert all(low <= i < high for i in drawn)


@given(st.integers(0, 200))
@settings(deadline=None)
def test_permutation_is_one(n: int) -> None:
    assert sorted(Key.of(MATERIAL).stream("a").permutation(n).tolist()) == list(range(n))


class Replay(KeyStream):
    """A stream of chosen words."""

    def __init__(self, *words: int) -> None:
        self._rest = b"".join(word.to_bytes(8, "little") for word in words)

    def bytes(self, n: int) -> bytes:
        assert n <= len(self._rest), "read more words than were chosen"
        taken, self._rest = self._rest[:n], self._rest[n:]
        return taken


def test_ends_of_the_ranges() -> None:
    ones = 2**64 - 1
    assert Replay(0, ones).uniform(2).tolist() == [0.0, 1 - 2.0**-53]
    low, high = Replay(0, ones).normal(2)
    assert low == -high
    assert 8.2 < high < 8.3


def test_integers_pass_over_unfair_words() -> None:
    # 2^64 mod 3 is 1: the largest word alone is unfair. 2^64 mod (2^63 - 1) is 2: the two largest are.
    assert Replay(7, 2**64 - 1, 2**64 - 2, 5).integers(0, 3, 3).tolist() == [7 % 3, (2**64 - 2) % 3, 5 % 3]
    span = 2**63 - 1
    assert Replay(2**64 - 1, 2**64 - 2, 2**64 - 3, 9).integers(0, span, 2).tolist() == [span - 1, 9]
    assert Replay(2**64 - 1, 4).integers(0, 8, 2).tolist() == [7, 4]


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda s: s.bytes(-1), ValueError, "n"),
        (lambda s: s.uint64(1.0), TypeError, "n"),
        (lambda s: s.uniform([2, 2]), TypeError, "shape"),
        (lambda s: s.normal((2, -1)), ValueError, "shape"),
        (lambda s: s.bits(True), TypeError, "shape"),
        (lambda s: s.integers(3, 3, 1), ValueError, "low, high"),
        (lambda s: s.integers(0, 2**63 + 1, 1), ValueError, "low, high"),
        (lambda s: s.integers(-1, 2**63, 1), ValueError, "low, high"),
        (lambda s: s.integers(0.0, 3, 1), TypeError, "low"),
        (lambda s: s.permutation(-1), ValueError, "n"),
    ],
)
def test_streams_refuse(call: object, error: type[Exception], name: str, key: Key) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        call(key.stream("a"))  # type: ignore[operator]


# --- streams: statistics (bounds of six standard errors; the streams are fixed, so no test is flaky) ---

N = 100_000


def test_uniform_moments(key: Key) -> None:
    drawn = key.stream("statistics").uniform(N)
    assert abs(drawn.mean() - 1 / 2) < 6 * (1 / 12 / N) ** 0.5
    assert abs(drawn.var() - 1 / 12) < 6 * (1 / 180 / N) ** 0.5


def test_normal_moments(key: Key) -> None:
    drawn = key.stream("statistics").normal((N // 10, 10))
    assert abs(drawn.mean()) < 6 / N**0.5
    assert abs(drawn.var() - 1) < 6 * (2 / N) ** 0.5
    assert abs((drawn**4).mean() - 3) < 6 * (96 / N) ** 0.5


def test_bits_are_balanced(key: Key) -> None:
    drawn = key.stream("statistics").bits((N // 8, 8))
    assert abs(drawn.mean() - 1 / 2) < 6 / 2 / N**0.5
    assert (abs(drawn.mean(axis=0) - 1 / 2) < 6 / 2 / (N / 8) ** 0.5).all()


def test_integers_are_even(key: Key) -> None:
    counts = np.bincount(key.stream("statistics").integers(0, 10, N))
    assert len(counts) == 10
    assert (abs(counts - N / 10) < 6 * (N / 10) ** 0.5).all()


def test_permutation_moves_everything_everywhere(key: Key) -> None:
    stream = key.stream("statistics")
    firsts = np.bincount([int(stream.permutation(5)[0]) for _ in range(2000)], minlength=5)
    assert (abs(firsts - 400) < 6 * 400**0.5).all()


def test_keys_and_purposes_share_nothing(key: Key) -> None:
    other = Key.of(MATERIAL[:-1] + b"S")
    streams = [key.stream("a"), key.stream("b"), key.stream("a "), other.stream("a"), other.stream("b")]
    correlation = np.corrcoef([stream.normal(N) for stream in streams])
    assert (abs(correlation - np.eye(len(streams))) < 6 / N**0.5).all()


def test_the_material_is_zeroed_when_a_key_is_no_longer_used() -> None:
    key = Key(bytes(range(1, 33)))
    material = key._material
    del key
    assert bytes(material) == bytes(32)


def test_a_key_file_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    Key.write_new(tmp_path / "owner.key")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Key.of(tmp_path / "owner.key")
    (tmp_path / "owner.key").chmod(0o644)
    with pytest.warns(UserWarning, match=r"key: others can read the key file .*; wanted mode 0600"):
        Key.of(tmp_path / "owner.key")


def test_only_keys_of_32_bytes_are_written(tmp_path: Path) -> None:
    Key(b"k" * 32).write(tmp_path / "a.key")
    assert Key.of(tmp_path / "a.key") == Key(b"k" * 32)
    with pytest.raises(FileExistsError):
        Key(b"o" * 32).write(tmp_path / "a.key")
    with pytest.raises(ValueError, match="key: wanted 32 bytes of key material for a key file, got 16"):
        Key(b"k" * 16).write(tmp_path / "b.key")
    assert not (tmp_path / "b.key").exists()
