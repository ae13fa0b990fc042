"""What memory a device has left, and what to do where it runs out: halve the batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def halving(run: Callable[[int], T], batch: int) -> T:
    """What `run(batch)` returns; after each time the device had no room, half the batch is tried."""
    while True:
        try:
            return run(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        # Only here is what the failed try held let go of.
        batch //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory of the device that can be had."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = dict(line.split(":") for line in file)
        return int(facts["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
