from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from activemark_fast.key import Key
from activemark_fast.normalisation import Preprocess
from activemark_fast.site import Site
from activemark_fast.watermark import Watermark, WatermarkError, fingerprint

MATERIAL = bytes(range(7, 39))
KEY, OTHER = Key(MATERIAL), Key(b"o" * 32)
FIELDS: dict[str, Any] = {
    "codec": "keyed",
    "bits": 32,
    "axis": "token",
    "site": Site(5, (8, 10), 65, 1, 128, depth=12),
    "preprocess": Preprocess((32, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    "digests": tuple(bytes([i]) * 32 for i in range(16)),
    "image_source": "folder",
    "state": {},
    "fingerprint": "ab" * 32,
    "architecture": "timm:vit_tiny_patch16_224",
    "alignment": torch.arange(256.0).view(2, 128).half(),
}
OLD_SITE = Site(5, (8, 10), 65, 1, 128, (0,), (93, 94))
VERSION_1, VERSION_2 = (
    Path(__file__).parent / "fixtures" / f"watermark_v{version}.safetensors" for version in (1, 2)
)


def sealed(**changes: Any) -> Watermark:
    return Watermark.seal(KEY, **(FIELDS | changes))


def saved(watermark: Watermark, folder: Path) -> bytes:
    path = folder / "watermark.safetensors"
    watermark.save(path)
    return path.read_bytes()


def loaded(data: bytes, folder: Path) -> Watermark:
    path = folder / "other.safetensors"
    path.write_bytes(data)
    return Watermark.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watermarks")


@pytest.fixture(scope="module")
def data(folder: Path) -> bytes:
    return saved(sealed(), folder)


LEARNED_STATE = {"encoder.0.weight": torch.randn(3, 4), "decoder.0.bias": torch.randn(2).to(torch.bfloat16)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": None, "image_source": "key", "digests": ()},
        {"architecture": "0" * 64},
        {"architecture": 'hf:/päth/\U0001f511 with "quotes" and \\ and \\"checksum\\": \\"' + "0" * 64},
        {"codec": "learned", "axis": "channel", "state": LEARNED_STATE},
        {"site": Site(0, (1,), 17, 0, 32, depth=3), "bits": 8},
        {"alignment": None},
    ],
    ids=["keyed", "unknown_architecture", "zeros", "odd_text", "learned", "bare_site", "no_alignment"],
)
def test_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    watermark = sealed(**changes)
    again = loaded(saved(watermark, tmp_path), tmp_path)
    for name in FIELDS.keys() - {"state", "alignment"}:
        assert getattr(again, name) == getattr(watermark, name), name
        assert type(getattr(again, name)) is type(getattr(watermark, name))
    assert again.state.keys() == watermark.state.keys()
    for name, tensor in watermark.state.items():
        assert torch.equal(again.state[name], tensor)
        assert again.state[name].dtype == tensor.dtype
    if watermark.alignment is None:
        assert again.alignment is None
    else:
        assert again.alignment is not None
        assert torch.equal(again.alignment, watermark.alignment)
    assert (again.mac, again.version) == (watermark.mac, 3)
    assert again.digest() == watermark.digest()
    again.check(KEY)
    assert saved(again, tmp_path) == saved(watermark, tmp_path)


def test_a_file_of_format_1_is_read_checked_and_written_again(tmp_path: Path) -> None:
    read = Watermark.load(VERSION_1)
    read.check(KEY)
    assert (read.version, read.alignment, read.in_bands) == (1, None, False)
    assert read.site == OLD_SITE
    assert read.digest() != sealed(alignment=None).digest()
    assert saved(read, tmp_path) == VERSION_1.read_bytes()
    with pytest.raises(WatermarkError):
        replace(read, version=2).check(KEY)


def test_a_file_of_format_2_is_read_checked_and_written_again(tmp_path: Path) -> None:
    read = Watermark.load(VERSION_2)
    read.check(KEY)
    assert (read.version, read.site, read.in_bands) == (2, OLD_SITE, False)
    assert read.alignment is not None
    assert len(read.digests) == read.images == 16
    assert saved(read, tmp_path) == VERSION_2.read_bytes()
    with pytest.raises(WatermarkError):
        replace(read, version=3).check(KEY)


def test_another_key() -> None:
    with pytest.raises(WatermarkError, match=r"^key: wanted the key this watermark was made with") as caught:
        sealed().check(OTHER)
    assert MATERIAL.hex() not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "learned"},
        {"bits": 24},
        {"axis": "channel"},
        {"site": replace(FIELDS["site"], block=4)},
        {"site": replace(FIELDS["site"], massive_channels=(93,))},
        {"preprocess": Preprocess((32, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.61))},
        {"digests": FIELDS["digests"][1:]},
        {"digests": FIELDS["digests"][::-1]},
        {"image_source": "tensor"},
        {"state": {"scale": torch.tensor(0.3)}},
        {"fingerprint": "ac" * 32},
        {"architecture": None},
        {"alignment": FIELDS["alignment"] + 1},
        {"alignment": None},
        {"version": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_mac_covers_every_field(changes: dict[str, Any]) -> None:
    changed = replace(sealed(), **changes)
    changed_back = replace(changed, **{name: getattr(sealed(), name) for name in changes})
    changed_back.check(KEY)
    with pytest.raises(WatermarkError):
        changed.check(KEY)


def test_the_mac_tells_apart_what_stands_side_by_side() -> None:
    whole = sealed(codec="learned", state={"a": torch.zeros(4)})
    with pytest.raises(WatermarkError):
        replace(whole, state={"a": torch.zeros(2), "b": torch.zeros(2)}).check(KEY)
    with pytest.raises(WatermarkError):
        replace(whole, state={"a": torch.zeros(2, 2)}).check(KEY)
    with pytest.raises(WatermarkError):
        replace(whole, state={"a": torch.zeros(4, dtype=torch.int32)}).check(KEY)


def test_the_file_holds_no_secret(data: bytes) -> None:
    message = KEY.stream("messages/verify").bits((16, 32))
    secrets = {
        "key": MATERIAL,
        "key, hexadecimal": MATERIAL.hex().encode(),
        "sub-key": KEY.derive("directions"),
        "mac key": KEY.derive("mac/watermark"),
        "message": message[0].tobytes(),
        "message, packed": KEY.stream("messages/verify").bytes(8),
        "directions": KEY.stream("directions").bytes(16),
        "images": KEY.stream("triggers/synthetic").bytes(16),
    }
    for name, secret in secrets.items():
        assert secret not in data, name
    assert MATERIAL.hex() not in repr(sealed())
    assert str(MATERIAL) not in repr(sealed())


@settings(max_examples=300)
@given(st.data())
def test_every_changed_byte_is_found_out(data: bytes, folder: Path, draw: st.DataObject) -> None:
    position = draw.draw(st.integers(0, len(data) - 1))
    # Bytes which mean the same in JSON or hexadecimal are the ones a check of the content would miss.
    value = draw.draw(st.sampled_from(b'\t\n\r 019AFaf"\x00\xff') | st.integers(0, 255))
    changed = data[:position] + bytes([value]) + data[position + 1 :]
    if changed != data:
        with pytest.raises(WatermarkError):
            loaded(changed, folder)


def test_every_changed_byte_of_the_header_is_found_out(data: bytes, folder: Path) -> None:
    header = 8 + int.from_bytes(data[:8], "little")
    for position in range(header):
        old = data[position : position + 1]
        for new in {old.swapcase(), b"\n" if old == b" " else b" "} - {old}:
            with pytest.raises(WatermarkError):
                loaded(data[:position] + new + data[position + 1 :], folder)


def test_truncation(data: bytes, folder: Path) -> None:
    header = 8 + int.from_bytes(data[:8], "little")
    for length in [*range(0, len(data), 7), *range(12), *range(header - 4, header + 5), len(data) - 1]:
        with pytest.raises(WatermarkError):
            loaded(data[:length], folder)
    with pytest.raises(WatermarkError):
        loaded(data + b"\0", folder)
    with pytest.raises(WatermarkError, match="truncated"):
        loaded(data[:-1], folder)


def with_header(data: bytes, **changes: Any) -> bytes:
    """The same file, its checksum made anew, with other entries in the header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["activemark_watermark"])
    tensors = {"digests": torch.zeros(16, 32, dtype=torch.uint8)}
    return forged(header | changes, tensors)


def forged(header: Any, tensors: dict[str, Tensor]) -> bytes:
    """What anybody can write without the key: a file whose checksum fits."""
    if isinstance(header, dict):
        header = header | {"checksum": "0" * 64}
    data = save(tensors, metadata={"activemark_watermark": json.dumps(header, sort_keys=True)})
    entry = r"\"checksum\": \"{}\""
    digest = hashlib.sha256(data).hexdigest()
    return data.replace(entry.format("0" * 64).encode(), entry.format(digest).encode(), 1)


def test_a_forged_file_loads_but_does_not_check(data: bytes, folder: Path) -> None:
    with pytest.raises(WatermarkError, match=r"^key: "):
        loaded(with_header(data), folder).check(KEY)


@pytest.mark.parametrize("version", [4, 10**30])
def test_a_newer_format(version: int, data: bytes, folder: Path) -> None:
    with pytest.raises(WatermarkError, match=f"format {version}, this release reads formats up to 3: update"):
        loaded(with_header(data, version=version), folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"site": []},
        {"site": {}},
        {"site": {"block": 1}},
        {"site": "x"},
        {"preprocess": {"size": 3, "mean": [0, 0, 0], "std": [1, 1, 1]}},
        {"preprocess": {"size": [32, 32], "mean": ["a", 0, 0], "std": [1, 1, 1]}},
        {"preprocess": None},
        {"mac": 5},
        {"mac": "xyz"},
        {"codec": "other"},
        {"codec": ["keyed"]},
        {"codec": {}},
    ],
)
def test_hostile_headers(changes: dict[str, Any], data: bytes, folder: Path) -> None:
    with pytest.raises(WatermarkError, match=r"other.safetensors: not a watermark"):
        loaded(with_header(data, **changes), folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": "x"},
        {"bits": 10**9},
        {"bits": None},
        {"axis": 5},
        {"version": None},
        {"version": True},
        {"version": -1},
        {"version": 2.5},
        {"version": float("nan")},
        {"fingerprint": []},
        {"architecture": {"a": "\ud800"}},
        {"image_source": float("nan")},
    ],
)
def test_hostile_values_do_not_pass_for_the_owners(
    changes: dict[str, Any], data: bytes, folder: Path
) -> None:
    with pytest.raises(WatermarkError):
        loaded(with_header(data, **changes), folder).check(KEY)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"digests": torch.zeros(16, 32)},
        {"digests": torch.zeros(16, 32, dtype=torch.bfloat16)},
        {"digests": torch.tensor(5, dtype=torch.int64)},
        {"digests": torch.full((16,), 2**40, dtype=torch.int64)},
        {"digests": torch.zeros(0, 32, dtype=torch.uint8)},
    ],
)
def test_hostile_tensors(tensors: dict[str, Tensor], data: bytes, folder: Path) -> None:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["activemark_watermark"])
    with pytest.raises(WatermarkError):
        loaded(forged(header, tensors), folder).check(KEY)


def raw(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 16,
        b"not a safetensors file, but long enough to hold a length",
        raw(b"{}"),
        raw(b"[]"),
        raw(b'"text"'),
        raw(b"null"),
        raw(b"\xff\xfe"),
        raw(b'{"__metadata__": 5}'),
        raw(b'{"__metadata__": {}}'),
        raw(b'{"__metadata__": {"activemark_watermark": 5}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{}"}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "[1]"}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{\\"checksum\\": \\"\\"}"}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{\\"checksum\\": \\"\\ud800\\"}"}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{}"}, "digests": 5}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{}"}, "digests": {}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{}"}, "digests": {"data_offsets": []}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{}"}, "digests": {"data_offsets": [0, "x"]}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{}"}, "digests": {"data_offsets": [0, 1e999]}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{}"}, "digests": {"data_offsets": [0, NaN]}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{}"}, "digests": {"data_offsets": [0, -5]}}'),
        raw(b"[" * 100_000),
        raw(b'{"__metadata__": {"activemark_watermark": "' + b"[" * 100_000 + b'"}}'),
        raw(b'{"__metadata__": {"activemark_watermark": "{\\"version\\": ' + b"9" * 5000 + b'}"}}'),
        save({"weight": torch.zeros(3)}),
        save({"weight": torch.zeros(3)}, metadata={"architecture": "timm:x"}),
    ],
)
def test_files_that_are_no_watermark(content: bytes, folder: Path) -> None:
    with pytest.raises(WatermarkError, match=r"other\.safetensors: "):
        loaded(content, folder)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Watermark.load(tmp_path / "none.safetensors")
    with pytest.raises(OSError, match="no_folder"):
        sealed().save(tmp_path / "no_folder" / "watermark.safetensors")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_a_failing_save_leaves_what_was_there(
    failing: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "watermark.safetensors"
    sealed().save(path)
    before = path.read_bytes()

    def fail(*_args: object) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        sealed(bits=16).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    sealed(bits=16).save(path)
    assert Watermark.load(path).bits == 16
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_fingerprint_sees_names_dtypes_shapes_and_values() -> None:
    def model(**changes: Tensor) -> nn.Module:
        module = nn.Module()
        tensors = {
            "a": torch.arange(6.0),
            "b": torch.ones(()),
            "e": torch.zeros(0),
            "h": torch.ones(2).half(),
        }
        for name, tensor in (tensors | changes).items():
            module.register_buffer(name, tensor)
        return module

    plain = fingerprint(model())
    assert len(plain) == 64
    assert fingerprint(model()) == plain
    negative_zero = torch.arange(6.0)
    negative_zero[0] = -0.0
    for changed in (
        {"a": torch.arange(6.0).reshape(2, 3)},
        {"a": negative_zero},
        {"a": torch.arange(6.0).double()},
        {"b": torch.ones(1)},
        {"h": torch.ones(2).bfloat16()},
        {"extra": torch.ones(1)},
        {"e": torch.zeros(0, 3)},
    ):
        assert fingerprint(model(**changed)) != plain
    strided = torch.arange(6.0).repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    assert fingerprint(model(a=strided)) == plain
    assert fingerprint(model(flag=torch.tensor(True))) != fingerprint(model(flag=torch.tensor(False)))
