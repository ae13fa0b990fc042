from __future__ import annotations

import threading

import torch
from torch import nn

from activemark_fast.checkpoints.mapped import _on_meta


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.tied = self.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def test_only_the_thread_that_asks_makes_parameters_without_values() -> None:
    made: list[nn.Module] = []
    with _on_meta():
        other = threading.Thread(target=lambda: made.append(nn.Linear(3, 3)))
        other.start()
        other.join()
        ours = Rotary()
    assert ours.weight.is_meta
    assert ours.weight is ours.tied
    assert torch.equal(ours.table, torch.arange(3.0))
    assert not any(
        parameter.is_meta for model in (*made, nn.Linear(3, 3)) for parameter in model.parameters()
    )
