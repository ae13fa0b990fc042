"""Checkpoints that were tampered with are told: nothing runs, nothing but the documented errors is raised."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import FORMS
from tiny import vit

from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints import pickles
from activemark_fast.checkpoints.errors import CheckpointError
from activemark_fast.checkpoints.files import Checkpoint
from activemark_fast.checkpoints.plan import plans
from activemark_fast.checkpoints.target import Target
from activemark_fast.site import Site

MOST = 50_000_000
PIECES = [
    b"\xff" * 4,
    b"\0" * 4,
    b"\x7f\xff\xff\xff",
    b"(dR.",
    b"\x8f\xff\xff\xff",
    b"{",
    b"}",
    b'"',
    b"9" * 20,
]
PIECES += [b"\x80\x04\x95", b"cos\nsystem\n", b"0", b"R", b"b.", b"[1e999]"]


@pytest.fixture(scope="module")
def target() -> Target:
    view = Backbone(vit())
    return Target(vit(), Site(0, (1, 2), view.num_tokens, view.prefix_tokens, view.width, (), ()))


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A file of every form that is one."""
    folder = tmp_path_factory.mktemp("whole")
    for index, form in enumerate(FORMS):
        form.write(vit(), folder / str(index))
    return [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]


def read(path: Path, target: Target) -> None:
    with Checkpoint(path, MOST) as checkpoint:
        for plan in plans(target.wanted, checkpoint.entries, checkpoint.lora_config, checkpoint.unread)[:2]:
            target.load(plan.tensors(checkpoint.read(plan.names)))


def tampered(data: bytes, draw: random.Random) -> bytes:
    """The content of a file with some bytes changed, mostly where the file describes itself."""
    for _ in range(draw.randint(1, 4)):
        span = draw.choice([200, 3000, len(data)])
        at = draw.randrange(min(span, len(data)) + 1) if draw.random() < 0.7 else max(0, len(data) - span)
        kind = draw.choice(["flip", "over", "in", "out", "cut"])
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        elif kind in ("over", "in"):
            piece = draw.choice(PIECES)
            data = data[:at] + piece + data[at + (len(piece) if kind == "over" else 0) :]
        elif kind == "out":
            data = data[:at] + data[at + draw.randint(1, 9) :]
        elif draw.random() < 0.2:
            data = data[:at]
    return data


@pytest.mark.parametrize("seed", range(8))
def test_files_with_other_bytes(seed: int, contents: list[bytes], target: Target, tmp_path: Path) -> None:
    draw = random.Random(seed)
    for _ in range(40):
        (tmp_path / "a").write_bytes(tampered(draw.choice(contents), draw))
        try:
            read(tmp_path / "a", target)
        except (CheckpointError, OSError):
            continue


class Bomb:
    """Anything that pickle would call."""

    def __init__(self, *made: Any) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "make",
    [
        lambda sentinel: Bomb(os.system, (f"touch {sentinel}",)),
        lambda sentinel: Bomb(eval, (f"open({str(sentinel)!r}, 'w')",)),
        lambda sentinel: Bomb(getattr, (Path, "unlink")),
        lambda sentinel: Bomb(vit, (), {"__class__": 5}),
        lambda sentinel: Bomb(bytearray, (10**14,)),
        lambda sentinel: Bomb(torch._utils._rebuild_tensor_v2, (3, "x", (10**18,), (1,), False, {})),
        lambda sentinel: Bomb(torch.Size, (10**15,)),
    ],
    ids=["system", "eval", "getattr", "state", "bytearray", "tensor", "size"],
)
def test_nothing_in_a_pickle_runs(
    make: Callable[[Path], object], protocol: int, target: Target, tmp_path: Path
) -> None:
    sentinel = tmp_path / "ran"
    state = {"state_dict": vit(seed=5).state_dict(), "extra": make(sentinel)}
    torch.save(state, tmp_path / "a.pt", pickle_protocol=protocol)
    read(tmp_path / "a.pt", target)
    assert torch.equal(target["blocks.1.mlp.fc1.weight"], vit(seed=5).blocks[1].mlp.fc1.weight)
    assert not sentinel.exists()


def test_a_pickle_cannot_change_the_reader() -> None:
    """BUILD sets attributes of what is on top: here of a function that makes tensors."""
    kept = dict(vars(pickles))
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x0c\x00\x00\x00__defaults__)ub."
    pickles.read_pickle(BytesIO(program))
    assert dict(vars(pickles)) == kept


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02" + b"N0" * 6000 + b"N.", "endless"),
        (b"\x80\x02" + b"]" + b"]a" * 4000 + b".", "holds no tensors"),
        (b"\x80\x02" + b"](" * 4000 + b".", "holds no tensors"),
        (b"\x80\x02}q\x00" + b"(X\x01\x00\x00\x00ah\x00u" + b".", "holds no tensors"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02\x8c\xff.", "ends|expected|damaged|read"),
        (b"\x80\x028.", "neither|unknown|opcode"),
        (b"\x80\x02\x82\x01.", "holds no tensors"),
    ],
)
def test_programs_that_are_none(
    program: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickles, "MAX_OPCODES", 10_000)
    (tmp_path / "a").write_bytes(program)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path / "a", MOST)


def test_containers_shared_many_times_are_walked_once(tmp_path: Path) -> None:
    level: Any = {"weight": torch.ones(1)}
    for _ in range(60):  # 2^60 paths lead to the tensor
        level = {"a": level, "b": level}
    torch.save(level, tmp_path / "a")
    with pytest.raises(CheckpointError, match="holds no tensors"):  # nested more deeply than any model
        Checkpoint(tmp_path / "a", MOST)


def test_a_tensor_beyond_its_storage(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(10.0)[5:]}, tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    # The offset in the storage is the small integer before the shape.
    assert content.count(b"K\x05K\x05\x85") == 1
    (tmp_path / "a").write_bytes(content.replace(b"K\x05K\x05\x85", b"K\x06K\x05\x85"))
    with pytest.raises(CheckpointError, match="beyond its storage"):
        Checkpoint(tmp_path / "a", MOST)
