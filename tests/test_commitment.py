from __future__ import annotations

import contextlib
import hashlib
import json
import stat
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from test_watermark import FIELDS, KEY, MATERIAL, OTHER, VERSION_1, sealed

from activemark_fast.commitment import Commitment, CommitmentError, Opening, timestamp_request
from activemark_fast.key import Key
from activemark_fast.watermark import Watermark, WatermarkError

FIXTURES = Path(__file__).parent / "fixtures"
# Made with `openssl ts -reply` from the commitment's `timestamp_request`, by an authority made for this.
PUBLISHED = FIXTURES / "commitment_v1.json"
RESPONSE, AUTHORITY = FIXTURES / "commitment_v1.tsr", FIXTURES / "authority.pem"
SUBKEYS = [KEY.subkey("first court"), KEY.subkey("second court")]
MARKS = [(key, Watermark.seal(key, **FIELDS)) for key in SUBKEYS]


@pytest.fixture(scope="module")
def commitment() -> Commitment:
    return Commitment.make(KEY, [(KEY, sealed()), *MARKS])


def test_what_was_committed_is_held_and_nothing_else(commitment: Commitment) -> None:
    assert commitment.holds(KEY, sealed())
    assert all(commitment.holds(key, watermark) for key, watermark in MARKS)
    assert not commitment.holds(KEY, sealed(bits=24))
    assert not commitment.holds(OTHER, sealed())
    assert not commitment.holds(SUBKEYS[0], MARKS[1][1])
    assert not commitment.holds(KEY, replace(sealed(), mac=bytes(32)))
    assert not Commitment.make(KEY, MARKS).holds(KEY, sealed())


def test_one_claim_is_opened_without_the_other_keys(commitment: Commitment, tmp_path: Path) -> None:
    commitment.save(tmp_path / "c.json")
    SUBKEYS[0].write(tmp_path / "first.key")
    shown = Key.of(tmp_path / "first.key")
    opening = Opening.of(Commitment.load(tmp_path / "c.json"), shown, MARKS[0][1])
    assert opening.committed
    assert shown != KEY
    for _, watermark in MARKS[1:]:
        with pytest.raises(WatermarkError):
            watermark.check(shown)


def test_the_file_shows_nothing(commitment: Commitment) -> None:
    content = commitment.to_bytes().decode()
    for secret in (MATERIAL, KEY.derive("commitment/key"), KEY.derive("commitment/signature"), sealed().mac):
        assert secret.hex() not in content
    assert sealed().fingerprint not in content
    # The same watermark under two keys, or two watermarks under one, show no likeness.
    claims = [*commitment.claims, *Commitment.make(OTHER, [(KEY, sealed(bits=24))]).claims]
    assert len(set(claims)) == len(claims) == 4


def test_round_trip(commitment: Commitment, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    commitment.save(path)
    assert Commitment.load(path) == commitment
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    age = datetime.now(timezone.utc) - datetime.fromisoformat(commitment.created.replace("Z", "+00:00"))
    assert timedelta(seconds=-2) < age < timedelta(minutes=10)
    with pytest.raises(OSError, match="none"):
        Commitment.load(tmp_path / "none.json")


def test_marks_must_be_the_keys(commitment: Commitment) -> None:
    with pytest.raises(WatermarkError, match=r"^key: "):
        Commitment.make(KEY, [(OTHER, sealed())])
    with pytest.raises(ValueError, match="marks, models, recipients: wanted at least one of any, got none"):
        Commitment.make(KEY, [])


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.sampled_from(b'\t\n\r 019AFaf"{}[]\x00\xff') | st.integers(0, 255))
def test_every_changed_byte_is_found_out(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    content = PUBLISHED.read_bytes()
    position %= len(content)
    changed = content[:position] + bytes([value]) + content[position + 1 :]
    path = tmp_path_factory.getbasetemp() / "changed.json"
    path.write_bytes(changed)
    if changed != content:
        with pytest.raises(CommitmentError, match=r"changed\.json: "):
            Commitment.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 5, "version": 1}',
        b'{"format": "activemark commitment", "version": {}}',
        b'{"format": "activemark commitment", "version": ' + b"9" * 5000 + b"}",
    ],
)
def test_files_that_are_no_commitment(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(CommitmentError, match="no commitment, or damaged"):
        Commitment.load(tmp_path / "c.json")


def test_a_newer_format_and_a_huge_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(json.loads(PUBLISHED.read_text()) | {"version": 2}))
    with pytest.raises(CommitmentError, match="format 2, this release reads format 1: update"):
        Commitment.load(path)
    path.write_bytes(b" " * 1_000_001)
    with pytest.raises(CommitmentError, match="wanted at most 1000000 bytes"):
        Commitment.load(path)


def test_claims_cannot_be_moved_under_another_signature(commitment: Commitment, tmp_path: Path) -> None:
    stranger = Commitment.make(OTHER, [(KEY, sealed())])
    for forged in (
        replace(commitment, claims=stranger.claims),
        replace(commitment, public_key=stranger.public_key),
        replace(commitment, signature=stranger.signature),
        replace(commitment, created="2020-01-01T00:00:00Z"),
    ):
        forged.save(tmp_path / "c.json")
        with pytest.raises(CommitmentError, match="signature is not its owner's"):
            Commitment.load(tmp_path / "c.json")


def test_a_commitment_of_format_1_with_its_timestamp() -> None:
    watermark = Watermark.load(VERSION_1)
    plain = Commitment.load(PUBLISHED)
    assert plain.holds(KEY, watermark)
    undated = Opening.of(plain, KEY, watermark)
    assert (undated.committed, undated.timestamp, undated.proven_since) == (True, None, None)
    assert "by the owner's own word" in str(undated)
    unchecked = Opening.of(Commitment.load(PUBLISHED, RESPONSE), KEY, watermark)
    assert unchecked.timestamp is not None
    assert unchecked.proven_since is None
    assert "unchecked" in str(unchecked)
    checked = Opening.of(Commitment.load(PUBLISHED, RESPONSE, AUTHORITY), KEY, watermark)
    assert checked.proven_since == unchecked.timestamp.time
    assert checked.proven_since.year == 2026
    assert "(timestamp checked)" in str(checked)
    assert json.loads(json.dumps(checked.to_dict()))["timestamp_trusted"] is True
    other = Opening.of(Commitment.load(PUBLISHED, RESPONSE, AUTHORITY), KEY, sealed())
    assert (other.committed, other.proven_since) == (False, None)
    assert "not committed" in str(other)


def test_the_request_is_for_the_file(commitment: Commitment) -> None:
    request = timestamp_request(commitment.to_bytes())
    assert hashlib.sha512(commitment.to_bytes()).digest() in request
    assert request == timestamp_request(commitment.to_bytes())


def another_root() -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "another root")])
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=36500))
    return builder.sign(key, None).public_bytes(Encoding.PEM)


def test_timestamps_that_prove_nothing(commitment: Commitment, tmp_path: Path) -> None:
    path, response, root = tmp_path / "c.json", tmp_path / "r.tsr", tmp_path / "root.pem"
    commitment.save(path)
    for roots in (None, AUTHORITY):
        with pytest.raises(CommitmentError, match="timestamp: it is for another file"):
            Commitment.load(path, RESPONSE, roots)
    root.write_bytes(another_root())
    with pytest.raises(CommitmentError, match="timestamp: not signed under the root certificates"):
        Commitment.load(PUBLISHED, RESPONSE, root)
    root.write_bytes(b"no certificate")
    with pytest.raises(CommitmentError, match=r"root\.pem: wanted certificates as PEM"):
        Commitment.load(PUBLISHED, RESPONSE, root)
    for content in (b"", b"\x30", RESPONSE.read_bytes()[:-1], b"\x30\x05\x30\x03\x02\x01\x02"):
        response.write_bytes(content)
        with pytest.raises(CommitmentError, match="timestamp: "):
            Commitment.load(PUBLISHED, response, AUTHORITY)
    with pytest.raises(ValueError, match="certificates: wanted a timestamp"):
        Commitment.load(PUBLISHED, None, AUTHORITY)


@settings(max_examples=300)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_response_never_changes_the_time(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    content = bytearray(RESPONSE.read_bytes())
    content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "changed.tsr"
    path.write_bytes(content)
    genuine = Commitment.load(PUBLISHED, RESPONSE, AUTHORITY).timestamp
    with contextlib.suppress(CommitmentError):
        # Where it is read at all, what was changed is neither signed nor used.
        assert Commitment.load(PUBLISHED, path, AUTHORITY).timestamp == genuine


def test_subkeys() -> None:
    assert SUBKEYS[0] == KEY.subkey("first court") != SUBKEYS[1]
    assert OTHER.subkey("first court") != SUBKEYS[0]
    assert SUBKEYS[0].derive("directions") != KEY.derive("directions")
    with pytest.raises(ValueError, match="label: wanted a text which is not empty"):
        KEY.subkey("")
    with pytest.raises(TypeError, match="label: wanted str, got int"):
        KEY.subkey(5)  # type: ignore[arg-type]
