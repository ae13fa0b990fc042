"""Artefacts that were tampered with raise what their readers document; benchmarks/fuzz.py does more."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_watermark import KEY, VERSION_1, sealed

from activemark_fast.commitment import Commitment, CommitmentError
from activemark_fast.watermark import Watermark, WatermarkError

FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED, RESPONSE = FIXTURES / "commitment_v1.json", FIXTURES / "commitment_v1.tsr"
SLOW = settings(max_examples=500, suppress_health_check=list(HealthCheck))

BYTES = st.binary(max_size=8) | st.sampled_from(
    [b"\0", b"\xff" * 8, b'"', b"{", b"]", b"\\", b"NaN", b"1e999"]
)
EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 12), BYTES, st.booleans()), min_size=1, max_size=4
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("0" * 64),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def edited(data: bytes, edits: list[tuple[int, int, bytes, bool]]) -> bytes:
    """`data` with bytes replaced by others, and cut off behind them where so drawn."""
    for position, length, replacement, truncate in edits:
        at = position % (len(data) + 1)
        data = data[:at] + replacement + (b"" if truncate and position % 3 == 0 else data[at + length :])
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    sealed().save(folder / "watermark.safetensors")
    return folder


def read_watermark(data: bytes, folder: Path) -> Watermark | None:
    path = folder / "mutated.safetensors"
    path.write_bytes(data)
    try:
        watermark = Watermark.load(path)
        watermark.check(KEY)
    except WatermarkError:
        return None
    return watermark


@SLOW
@given(st.booleans(), EDITS)
def test_watermarks_with_other_bytes(
    folder: Path, old: bool, edits: list[tuple[int, int, bytes, bool]]
) -> None:
    content = (VERSION_1 if old else folder / "watermark.safetensors").read_bytes()
    changed = edited(content, edits)
    assert (read_watermark(changed, folder) is not None) == (changed == content)


def resealed(data: bytes, change: dict[str, Any], tensors: dict[str, Any]) -> bytes:
    """The watermark with other entries in its headers and a checksum that fits, as anybody can write it."""
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["activemark_watermark"]) | change | {"checksum": "0" * 64}
    outer["__metadata__"]["activemark_watermark"] = json.dumps(header, sort_keys=True)
    text = json.dumps(outer | tensors).encode()
    unsealed = struct.pack("<Q", len(text)) + text + data[8 + length :]
    entry = r"\"checksum\": \"{}\""
    digest = hashlib.sha256(unsealed).hexdigest()
    return unsealed.replace(entry.format("0" * 64).encode(), entry.format(digest).encode(), 1)


FIELDS = "version codec bits axis site preprocess image_source fingerprint architecture mac"
NAMES = st.sampled_from(FIELDS.split())
TENSORS = st.sampled_from(["digests", "alignment", "codec.scale", "codec.other"])
SHAPES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F32", "BF16", "I64", "BOOL", "F8_E4M3", "X"]) | VALUES,
        "shape": st.lists(st.integers(-2, 600), max_size=4) | VALUES,
        "data_offsets": st.lists(st.integers(-2, 2000), min_size=2, max_size=2) | VALUES,
    }
)


@SLOW
@given(
    st.dictionaries(NAMES, VALUES, max_size=3), st.dictionaries(TENSORS, SHAPES | VALUES, max_size=2), EDITS
)
def test_watermarks_with_other_content_and_a_fitting_checksum(
    folder: Path,
    change: dict[str, Any],
    tensors: dict[str, Any],
    edits: list[tuple[int, int, bytes, bool]],
) -> None:
    content = (folder / "watermark.safetensors").read_bytes()
    read_watermark(resealed(content, change, tensors), folder)
    read_watermark(resealed(content, change, {}), folder)


@SLOW
@given(EDITS)
def test_commitments_with_other_bytes(folder: Path, edits: list[tuple[int, int, bytes, bool]]) -> None:
    content = PUBLISHED.read_bytes()
    changed = edited(content, edits)
    (folder / "mutated.json").write_bytes(changed)
    if changed == content:
        return
    with pytest.raises(CommitmentError):
        Commitment.load(folder / "mutated.json")


@SLOW
@given(st.dictionaries(st.sampled_from(sorted(json.loads(PUBLISHED.read_text()))), VALUES), EDITS)
def test_commitments_and_timestamps_with_other_content(
    folder: Path, change: dict[str, Any], edits: list[tuple[int, int, bytes, bool]]
) -> None:
    record = json.loads(PUBLISHED.read_text())
    (folder / "mutated.json").write_text(json.dumps(record | change, indent=1, sort_keys=True) + "\n")
    (folder / "mutated.tsr").write_bytes(edited(RESPONSE.read_bytes(), edits))
    for path in (folder / "mutated.json", PUBLISHED):
        for roots in (None, FIXTURES / "authority.pem"):
            try:
                read = Commitment.load(path, folder / "mutated.tsr", roots)
            except CommitmentError:
                continue
            assert read == Commitment.load(PUBLISHED)
