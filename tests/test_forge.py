from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import vit
from torch import nn

from activemark_fast import forge as forge_module
from activemark_fast.forge import Forgery, forge


class Clock:
    """Goes on by a tenth of a second at every look: how far a forger gets depends on no machine."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        self.seconds += 0.1
        return self.seconds


@pytest.fixture(scope="module")
def forgery() -> Forgery:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forge_module, "time", Clock())
        return forge(vit(embed_dim=104, depth=4), minutes=0.2)


def test_a_forger_gets_somewhere_with_what_can_be_fitted_and_nowhere_with_keys(forgery: Forgery) -> None:
    assert forgery.learned_steps >= 1
    assert 0 <= forgery.learned_rate <= 1
    assert forgery.image_steps >= 1
    assert forgery.image_p_value < 1e-3  # the images were fitted to the key: no p-value holds for them
    assert forgery.keys >= 1
    assert 1e-6 < forgery.key_p_value <= 1
    assert min(forgery.learned_seconds, forgery.image_seconds, forgery.key_seconds) > 0
    assert set(forgery.to_dict()) == set(vars(forgery))
    for part in (f"R = {forgery.learned_rate:.3f}", f"smallest of {forgery.keys} keys", "no evidence"):
        assert part in str(forgery)


def test_the_suspect_is_left_as_it_was() -> None:
    suspect = vit(embed_dim=104, depth=4).train()
    before = {name: tensor.clone() for name, tensor in suspect.state_dict().items()}
    forgery = forge(suspect, minutes=1e-9)
    assert forgery.keys == 1  # each way makes at least one step
    assert (forgery.learned_steps, forgery.image_steps) == (1, 1)
    assert suspect.training
    assert all(parameter.requires_grad for parameter in suspect.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in suspect.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"minutes": 0}, ValueError, "minutes: wanted a finite number above 0, got 0"),
        ({"minutes": float("inf")}, ValueError, "minutes: wanted a finite number above 0, got inf"),
        ({"minutes": float("nan")}, ValueError, "minutes: wanted a finite number above 0, got nan"),
        ({"minutes": "5"}, TypeError, "minutes: wanted a number, got str"),
        ({"seed": 1.5}, TypeError, "seed: wanted int, got float"),
        ({"precision": "fp8"}, ValueError, "precision: wanted"),
    ],
)
def test_errors_name_the_argument(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        forge(vit(depth=4), **settings)


def test_no_vit() -> None:
    with pytest.raises(ValueError, match="looked for"):
        forge(nn.Linear(3, 3))
