from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pretend_device import pretend_device
from torch import nn
from torch.nn.functional import linear

from activemark_fast import following
from activemark_fast.following import computed_on, placed

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
