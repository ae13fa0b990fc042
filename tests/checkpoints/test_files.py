from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from activemark_fast.checkpoints import CheckpointError
from activemark_fast.checkpoints.entries import HostBuffer
from activemark_fast.checkpoints.files import Checkpoint

MOST = 1_000_000


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = {
        str(dtype).removeprefix("torch."): torch.randn(3, 5, generator=generator).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    }
    whole = {
        "int8": torch.tensor([-3, 7], dtype=torch.int8),
        "scalar": torch.tensor(4),
        "empty": torch.zeros(0, 3),
    }
    return real | whole | {"bool": torch.tensor([True, False, True])}


def read(path: Path, names: list[str] | None = None, most: int = MOST) -> dict[str, Tensor]:
    with Checkpoint(path, most) as checkpoint:
        chosen = checkpoint.entries if names is None else names
        return {name: tensor.clone() for name, tensor in checkpoint.read(chosen, HostBuffer(False)).items()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name].double(), tensor.double())
        assert got[name].shape == tensor.shape


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(zipped: bool, tmp_path: Path) -> None:
    wanted = tensors()
    if not zipped:
        del wanted["float8_e4m3fn"]  # torch cannot read what it writes
    for content, path in (
        (wanted, ""),
        ({"state_dict": wanted, "epoch": 3}, "state_dict."),
        ({"ema": {"model": wanted}, "args": {"lr": 0.1}}, "ema.model."),
    ):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert_same(read(tmp_path / "a.pt"), {f"{path}{name}": tensor for name, tensor in wanted.items()})


def test_safetensors_and_shards(tmp_path: Path) -> None:
    wanted = tensors()
    save_file(wanted, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_same(read(tmp_path / "a.safetensors"), wanted)
    assert_same(
        read(tmp_path / "a.safetensors", ["scalar", "float16"]), {k: wanted[k] for k in ("scalar", "float16")}
    )
    folder = tmp_path / "model"
    folder.mkdir()
    names = sorted(wanted)
    shards = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: wanted[name] for name in names if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert_same(read(folder), wanted)
    with Checkpoint(folder, MOST) as checkpoint:
        assert checkpoint.size > sum(entry.nbytes for entry in checkpoint.entries.values())
        content = wanted["float16"].view(torch.uint8).numpy().tobytes()
        assert checkpoint.read_bytes("float16") == content


def test_a_buffer_is_used_again() -> None:
    buffer = HostBuffer(False)
    first = buffer.reserve(1000)
    assert buffer.reserve(10).data_ptr() == first.data_ptr()
    assert len(buffer.reserve(2000)) == 2000


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def described(dtype: Any, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/activemark-was-here",)


class Memory:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (10**12,)


def pickled(value: object, protocol: int = 2) -> Callable[[Path], None]:
    return lambda path: torch.save({"a": value}, path, pickle_protocol=protocol)


def zip_bomb(path: Path) -> None:
    """A torch file whose one tensor of 10 MB of zeros takes 10 kB."""
    torch.save({"a": torch.zeros(2_500_000)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def overlapping(path: Path) -> None:
    """Several entries of the directory share one record."""
    torch.save({"a": torch.zeros(100)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        record = next(r for r in archive.infolist() if r.filename.endswith("data/0"))
        archive.filelist += [record] * 200
        archive._didModify = True  # type: ignore[attr-defined]


def twice(path: Path) -> None:
    """Two records of one name: torch reads the first, Python the last."""
    torch.save({"a": torch.ones(100)}, path)
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    records += [(name, bytes(len(content))) for name, content in records if name.endswith("data/0")]
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name, content in records:
            archive.writestr(name, content)


def one_behind_the_other(path: Path) -> None:
    """Two archives of one layout: torch reads the first, Python the last."""
    torch.save({"a": torch.zeros(100)}, path)
    behind = path.read_bytes()
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes() + behind)


def in_the_comment(path: Path) -> None:
    """The second archive is the comment of the first."""
    one_behind_the_other(path)
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[: half - 2] + half.to_bytes(2, "little") + content[half:])


REAL, DECOY = torch.ones(3), torch.full((3,), 7.0)
OF_DECOY = DECOY.__reduce_ex__(2)[1]
OF_REAL = REAL.__reduce_ex__(2)[1]


class Reduced:
    """Pickled as it is told."""

    def __init__(self, *reduced: object) -> None:
        self.reduced = reduced

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.reduced


REBUILD, PARAMETER = torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter_with_state
SAVED = {
    "negated": {"a": torch._neg_view(-REAL)},
    "nested": {"a.b": REAL, "a": {"b": DECOY}},
    "bytes": {"a": REAL, b"a": DECOY},
    "number": {"1": REAL, 1: DECOY},
    "filled anew": {"a": Reduced(REBUILD, OF_DECOY, OF_REAL[:4])},
    "data": {"a": Reduced(PARAMETER, (DECOY, False, OrderedDict(), {"data": REAL}))},
    "data of a type": {
        "a": Reduced(torch._tensor._rebuild_from_type_v2, (REBUILD, torch.Tensor, OF_DECOY, {"data": REAL}))
    },
}


@pytest.mark.parametrize("name", SAVED)
def test_what_torch_makes_of_a_pickle_is_not_read_otherwise(name: str, tmp_path: Path) -> None:
    path, first = tmp_path / "a.pt", next(iter(SAVED[name]))
    torch.save(SAVED[name], path)
    assert torch.equal(torch.load(path, weights_only=True)[first], REAL)
    try:
        found = read(path)
    except CheckpointError:
        return
    assert found == {}


def test_attributes_of_a_tensor_change_nothing(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(REAL)
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    torch.save({"a": parameter}, tmp_path / "a.pt")
    assert torch.equal(read(tmp_path / "a.pt")["a"], REAL)


@pytest.mark.parametrize("write", [twice, one_behind_the_other, in_the_comment])
def test_what_torch_reads_otherwise_is_refused(write: Callable[[Path], None], tmp_path: Path) -> None:
    """A thief's file that torch loads as the marked model would be judged by what else is in it."""
    write(tmp_path / "a.pt")
    assert bool(torch.load(tmp_path / "a.pt", weights_only=True)["a"].all())
    with pytest.raises(CheckpointError, match=r"two records of one name|before or behind it"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "is an empty file"),
        (lambda p: p.write_bytes(b"not a checkpoint at all"), "nor a torch file but text"),
        (lambda p: p.write_bytes(b"<!DOCTYPE html><title>404</title>"), "is an HTML page"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
        (lambda p: p.write_bytes(b'{"error": "not found"}'), "is JSON text"),
        (lambda p: p.write_bytes(bytes(255 - i % 256 for i in range(5000))), "neither a safetensors"),
        (lambda p: p.write_bytes(header({}, b"")), "holds no tensors"),
        (lambda p: p.write_bytes(b"\xff" * 8 + b"{"), "neither a safetensors|truncated"),
        (lambda p: p.write_bytes((15_000_000).to_bytes(8, "little") + b"{}"), "truncated"),
        (lambda p: p.write_bytes(header(b"{" * 3000)), "wanted JSON"),
        (lambda p: p.write_bytes(header(b'{"a":' * 30000)), "wanted JSON"),
        (
            lambda p: p.write_bytes(header(described("F32", [10**12, 10**12], [0, 4]))),
            "not possible|trunc",
        ),
        (lambda p: p.write_bytes(header(described("F32", [10**9], [0, 4 * 10**9]))), "truncated"),
        (lambda p: p.write_bytes(header(described("F32", [2], [0, 8]), bytes(7))), "truncated"),
        (lambda p: p.write_bytes(header(described("F32", [-2], [0, 8]), bytes(8))), "not possible|trunc"),
        (lambda p: p.write_bytes(header(described("F32", [2], [8, 0]), bytes(8))), "not possible|trunc"),
        (lambda p: p.write_bytes(header(described("F32", [2], [-8, 0]), bytes(8))), "not possible|trunc"),
        (lambda p: p.write_bytes(header(described("F32", "ab", [0, 8]), bytes(8))), "not possible|trunc"),
        (
            lambda p: p.write_bytes(header(described("F32", [True, 2], [0, 8]), bytes(8))),
            "not possible|trunc",
        ),
        (
            lambda p: p.write_bytes(header(described(["F32"], [2], [0, 8]), bytes(8))),
            "not possible|truncated",
        ),
        (
            lambda p: p.write_bytes(header(described("COMPLEX", [2], [0, 8]), bytes(8))),
            "not possible|truncated",
        ),
        (lambda p: p.write_bytes(header({"a": 5})), "not possible|truncated"),
        (pickled(Bomb()), "holds no tensors; it asks for '.*system', which is not run"),
        (pickled(Bomb(), 4), "asks for '.*system', which is not run"),
        (pickled(Memory()), "asks for '.*bytearray'"),
        (lambda p: p.write_bytes(pickle.dumps(Bomb(), 2)), "asks for '.*system'"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 5}, 2)), "holds no tensors"),
        (lambda p: p.write_bytes(b"\x80\x02" + b"N0" * 3_500_000 + b"N."), "max_bytes is|endless"),
        (lambda p: p.write_bytes(b"\x80\x02" + b"N0" * 400_000), "exhausted before seeing STOP"),
        (lambda p: torch.save(torch.zeros(3), p), "holds no tensors"),
        (zip_bomb, "compressed records"),
        (overlapping, "more than its size"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "without a pickle"),
        (lambda p: torch.save({"a": torch.zeros(MOST)}, p), "have to be read, but max_bytes is 1000000"),
        (
            lambda p: p.write_bytes(pickle.dumps({"a": bytes(MOST)})),
            "read whole, .* but max_bytes is 1000000",
        ),
        (os.mkfifo, "not a regular file"),
        (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
        (lambda p: p.mkdir(), "wanted a file of weights"),
    ],
)
def test_hostile_files_are_refused(write: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path / "a.pt")
    assert len(str(caught.value)) < 1000
    assert not os.path.exists("/tmp/activemark-was-here")


@pytest.mark.parametrize("name", ["loop", "nowhere"])
def test_links_to_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(tmp_path / ("loop" if name == "loop" else "gone"))
    with pytest.raises(OSError, match=r"symbolic links|No such file"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{", '{"weight_map": {"a": "../x"}}']
)
def test_hostile_indexes(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError):
        read(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for number, value in ((1, 1.0), (2, 7.0)):
        save_file({"a": torch.full((4,), value)}, tmp_path / f"m-0000{number}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="'a' as another file of the model does"):
        read(tmp_path)


def test_every_truncation_of_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for write in (lambda: save_file(tensors(), path), lambda: torch.save(tensors(), path)):
        write()
        content = path.read_bytes()
        for length in range(0, len(content), 37):
            path.write_bytes(content[:length])
            with pytest.raises(CheckpointError):
                read(path)


@pytest.mark.parametrize("what", ["changed", "truncated", "replaced", "vanished"])
def test_files_that_change_while_they_are_read(what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100_000)}, path)
    with Checkpoint(path, MOST) as checkpoint:
        if what == "changed":
            with path.open("r+b") as file:
                file.write(b"x")
            os.utime(path, ns=(1, 1))
        elif what == "truncated":
            os.truncate(path, 50_000)
        else:
            path.unlink()
        if what == "replaced":
            save_file({"a": torch.ones(100_000)}, path)
        error = FileNotFoundError if what == "vanished" else CheckpointError
        with pytest.raises(error):
            checkpoint.read(["a"], HostBuffer(False))


def test_memory_is_capped_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:  # a sparse file of 4 GB
        file.write(header(described("F32", [10**9], [0, 4 * 10**9])))
        file.truncate(file.tell() + 4 * 10**9)
    buffer = HostBuffer(False)
    with Checkpoint(path, MOST) as checkpoint, pytest.raises(CheckpointError, match="max_bytes is 1000000"):
        checkpoint.read(["a"], buffer)
    assert len(buffer._bytes) == 0
