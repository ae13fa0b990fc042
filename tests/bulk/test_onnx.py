from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from forms import message, onnx_bytes
from test_hostile import tampered

from activemark_fast.checkpoints.errors import CheckpointError
from activemark_fast.checkpoints.files import Checkpoint

STATE = {
    "cls_token": torch.randn(1, 1, 6),
    "blocks.0.attn.proj.weight": torch.randn(6, 6),
    "blocks.0.attn.proj.bias": torch.randn(6),
    "blocks.0.mlp.fc1.weight": torch.randn(8, 6),
    "blocks.0.mlp.fc1.bias": torch.randn(8),
}


def read(path: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(path, 1_000_000) as checkpoint:
        assert not checkpoint.unread
        return {n: t.clone() for n, t in checkpoint.read(list(checkpoint.entries)).items()}


@pytest.mark.parametrize("beside", [False, True])
def test_names_and_directions_are_torchs(beside: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(onnx_bytes(STATE, tmp_path / "a.onnx.data" if beside else None))
    found = read(path)
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert torch.equal(found[name], tensor), name


def test_an_initializer_under_another_name(tmp_path: Path) -> None:
    graph = message(
        (5, message((1, 2), (2, 1), (8, "norm1.bias"), (9, b"\0" * 8))),
        (1, message((1, "norm1.bias"), (2, "norm2.bias"), (4, "Identity"))),
    )
    (tmp_path / "a").write_bytes(message((1, 8), (7, graph)))
    assert read(tmp_path / "a").keys() == {"norm1.bias", "norm2.bias"}


def test_numbers_that_are_stored_otherwise_are_told(tmp_path: Path) -> None:
    graph = message((5, message((1, 1), (2, 10), (8, "half"), (5, b"\x01"))))  # in int32_data
    (tmp_path / "a").write_bytes(message((1, 8), (7, graph)))
    with Checkpoint(tmp_path / "a", 1000) as checkpoint:
        assert checkpoint.unread == {"half": "tensor of another type"}


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (message((1, 3), (2, 1), (8, "a"), (9, b"\0" * 8)), "'a' is truncated or of another shape"),
        (message((1, 2), (2, 1), (8, "a"), (13, message((1, "location"), (2, "../b")))), "outside"),
        (message((1, 2), (2, 1), (8, "a"), (13, message((1, "location"), (2, "")))), "outside"),
        (message((1, 2), (2, 1), (8, "a"), (13, message((1, "offset"), (2, "x")))), "no tensors|no ONNX"),
        (message((1, 2), (2, 1), (8, b"x" * 70_000)), "a name that is none"),
        (b"\x4a\xff\xff\x03", "reaches beyond its message"),
        (b"\x80" * 20, "a number that does not end"),
        (b"\x0b", "reaches beyond its message"),
    ],
)
def test_what_cannot_be_is_told(tensor: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(message((1, 8), (7, message((5, tensor)))))
    if error.startswith("no tensors"):
        with Checkpoint(tmp_path / "a", 1000) as checkpoint:
            assert checkpoint.unread.keys() == {"a"}
        return
    with pytest.raises(CheckpointError, match=error):
        read(tmp_path / "a")


def test_every_truncation_and_other_bytes_are_noticed_or_harmless(tmp_path: Path) -> None:
    path, content, draw = tmp_path / "a", onnx_bytes(STATE), random.Random(0)
    for length in range(2, len(content), 3):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read(path)
    for _ in range(500):
        path.write_bytes(tampered(content, draw))
        try:
            with Checkpoint(path, 1_000_000) as checkpoint:
                checkpoint.read(list(checkpoint.entries))
        except (CheckpointError, OSError):
            continue
