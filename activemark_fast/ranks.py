"""Processes that work on one model together: each does a part of what takes long, and all get all results.

Every part is computed by one process exactly as it would be by a single one, and parts are added up in the
same order everywhere. So however many there are, they get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Task = Callable[[], Sequence[Tensor]]


class Ranks:
    """The processes of a group, as one of them sees it; without a group it is alone.

    Attributes:
        count: of the processes.
        rank: which of them this is, from 0.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.count = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def each(
        self, tasks: Sequence[Task], device: torch.device, owners: Sequence[int] | None = None
    ) -> Iterator[Sequence[Tensor]]:
        """What each task returns, in order; all processes must ask for the same and take every result.

        Those of neighbouring tasks that are of different processes run at the same time.

        device: where the tensors are.
        owners: of each task, the process that runs it; in turn by default.
        """
        owners = [index % self.count for index in range(len(tasks))] if owners is None else owners
        start = 0
        while start < len(tasks):
            stop = start + 1
            while stop < len(tasks) and owners[stop] not in owners[start:stop]:
                stop += 1
            turn = owners[start:stop]
            own = tasks[start + turn.index(self.rank)]() if self.rank in turn else []
            for owner in turn:
                yield own if self.count == 1 else self.sent(owner, own, device)
            start = stop

    def least(self, number: int) -> int:
        """The least of the processes' numbers."""
        if self.count == 1:
            return number
        numbers: list[Any] = [None] * self.count
        dist.all_gather_object(numbers, number, group=self._group)
        return min(numbers)

    def sent(self, owner: int, own: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """The tensors `own` of the process `owner`; those of the others do not matter."""
        facts: list[Any] = [[(tensor.shape, tensor.dtype) for tensor in own]]
        dist.broadcast_object_list(facts, group_src=owner, group=self._group)
        tensors = []
        for index, (shape, dtype) in enumerate(facts[0]):
            if owner == self.rank:
                tensor = own[index].contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype, device=device)
            if tensor.numel():  # as bytes: not every backend knows every dtype
                dist.broadcast(tensor.flatten().view(torch.uint8), group_src=owner, group=self._group)
            tensors.append(tensor)
        return tensors


ALONE = Ranks()
