"""Run by test_following.py, in a process of their own: the device is there for the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pretend_device import pretend_device
from safetensors.torch import load_file
from test_giants import ARCHITECTURE, KEY, shards
from tiny import vit
from torch import nn
from torch.nn.functional import linear

from activemark_fast import following
from activemark_fast.following import computed_on, placed
from activemark_fast.giants import embed_stored, verify_stored
from activemark_fast.marking import engine
from activemark_fast.watermark import Watermark

CPU = torch.device("cpu")
DEVICE = pretend_device()


@pytest.fixture
def followed() -> Iterator[None]:
    with following.following(DEVICE):
        yield


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape), requires_grad=False)


def test_without_it_two_devices_do_not_meet() -> None:
    with pytest.raises(RuntimeError, match="tensors of two devices"):
        torch.ones(2, device=DEVICE) + torch.ones(2)


@pytest.mark.usefixtures("followed")
def test_weights_go_where_what_they_meet_is_and_stay_where_they_are() -> None:
    layer = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)).requires_grad_(False)
    tokens = torch.randn(3, 4)
    there = layer(tokens.to(DEVICE))
    assert there.device == DEVICE
    torch.testing.assert_close(there.cpu(), layer(tokens))
    assert {tensor.device for tensor in layer.state_dict().values()} == {CPU}


@pytest.mark.usefixtures("followed")
def test_a_weight_that_was_written_to_is_copied_again() -> None:
    weight, tokens = parameter(2, 2), torch.eye(2).to(DEVICE)
    before = linear(tokens, weight).cpu()
    weight += 1
    torch.testing.assert_close(linear(tokens, weight).cpu(), before + 1)


@pytest.mark.usefixtures("followed")
def test_what_is_written_to_stays_where_it_is() -> None:
    here, there = torch.zeros(3), torch.ones(3, device=DEVICE)
    here.copy_(there)
    assert here.tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="tensors of two devices"):
        here.add_(there)
    there.add_(here)
    assert there.cpu().tolist() == [2, 2, 2]


@pytest.mark.parametrize(("room", "kept"), [(1, 1), (3 * 64, 3), (1 << 20, 5)])
def test_no_more_is_kept_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, room: int, kept: int
) -> None:
    monkeypatch.setattr(following, "KEPT_BYTES", room)
    tokens, weights = torch.eye(4).to(DEVICE), [parameter(4, 4) for _ in range(5)]
    mode = following._Follow(DEVICE)
    with mode:
        for weight in (*weights, weights[-1]):
            torch.testing.assert_close(linear(tokens, weight).cpu(), weight.T)
    assert len(mode._kept) == kept
    assert mode._bytes == sum(copy.nbytes for _, _, copy in mode._kept.values())


def test_a_copy_is_not_taken_for_that_of_another_weight() -> None:
    tokens, mode = torch.eye(4).to(DEVICE), following._Follow(DEVICE)
    with mode:
        for value in range(20):  # one after the other in one place
            weight = nn.Parameter(torch.full((4, 4), float(value)), requires_grad=False)
            assert linear(tokens, weight).cpu().unique().tolist() == [value]
            del weight


def test_where_nothing_follows_models_are_moved() -> None:
    module = nn.Linear(2, 2)
    assert computed_on(CPU) == CPU
    assert placed(module, CPU) is module
    with following.following(CPU):
        assert computed_on(CPU) == CPU
    with following.following(DEVICE):
        assert computed_on(CPU) == DEVICE
        assert placed(module, DEVICE) is module
        assert module.weight.device == CPU
    assert computed_on(CPU) == CPU


def test_a_device_takes_weights_from_the_files_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "KEPT_BYTES", 1 << 19)  # a block of 0.8 MB does not fit
    monkeypatch.setattr(engine, "CPU_WORKING_SET", 1 << 40)  # as many images at a time as there
    shards(vit(num_classes=0), tmp_path / "model")
    spec = f"{ARCHITECTURE}@{tmp_path / 'model'}"
    there = []
    for name, device in (("cpu", "cpu"), ("device", DEVICE)):
        found = embed_stored(
            spec, tmp_path / name, tmp_path / f"{name}.watermark", KEY, device=device, precision="fp32"
        )
        there.append(found)
    # Attention is another kernel there, so sums are taken in another order.
    files = [
        {p.name: load_file(p) for p in (tmp_path / name).glob("*.safetensors")} for name in ("cpu", "device")
    ]
    torch.testing.assert_close(*files, rtol=0, atol=1e-4)
    here, other = (found.quality for found in there)
    assert other.margin == pytest.approx(here.margin, rel=1e-3)
    assert other.fidelity == pytest.approx(here.fidelity, abs=1e-5)
    assert str(there[1].engine.device) == "pretend:0"
    for part in ("device", "model"):
        suspect = f"{ARCHITECTURE}@{tmp_path / part}"
        mark = Watermark.load(tmp_path / "device.watermark")
        verdicts = [
            verify_stored(suspect, mark, KEY, device=device, precision="fp32").to_dict()
            for device in ("cpu", DEVICE)
        ]
        assert verdicts[0] == verdicts[1]
        assert verdicts[0]["decision"] == ("match" if part == "device" else "no match")
