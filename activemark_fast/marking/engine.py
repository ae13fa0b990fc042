"""How an embedding is computed: precision, batch, where its caches are, how much memory it will take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.following import kept_bytes
from activemark_fast.marking.memory import free_bytes
from activemark_fast.marking.scratch import Make, Scratch, made
from activemark_fast.marking.suffix import Autocast
from activemark_fast.ranks import ALONE, Ranks
from activemark_fast.runtime import resolve_autocast
from activemark_fast.site import Site

CPU_WORKING_SET = 16 << 20
"""Bytes of hidden activations that a block makes at a time on a CPU."""
GPU_WORKING_SHARE = 0.25
"""The same on a GPU, as a share of the memory that is free."""
MAX_IMAGES, MIN_IMAGES = 128, 4
GROUPS = 8
"""The slots are averaged in this many groups before they enter the solve: a reading averages them all."""
KEPT_OF_GRAM = 0.625
"""Share of a symmetric matrix that is kept (`edit._Gram`)."""
GPU_RESERVE = 0.9
"""Share of a GPU's free memory that is counted on."""


@dataclass(frozen=True, eq=False)
class Engine:
    """How an embedding is computed.

    Attributes:
        device: where.
        autocast: makes the context that blocks run in.
        batch: images that run at a time, each with all its messages.
        caches_on_host: activations wait in pinned host memory, since the device has no room for them.
        peak_bytes: tensors the edit will hold at most, on the device, over the model that was given; what an
            allocator keeps besides is not counted. 0 where there are gradient steps only.
        reason: one sentence on the choices.
        scratch: where activations and changes of weights wait on disk; None where they stay in memory.
        ranks: the processes that compute it.
    """

    device: torch.device
    autocast: Autocast
    batch: int
    caches_on_host: bool
    peak_bytes: int
    reason: str
    scratch: Scratch | None = None
    ranks: Ranks = ALONE

    def offload(self, tensor: Tensor) -> Tensor:
        """`tensor`, where it can wait."""
        if self.scratch is not None:
            return self.scratch.keep(tensor)
        if not self.caches_on_host:
            return tensor
        waiting = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return waiting.copy_(tensor)

    def fetch(self, tensor: Tensor) -> Tensor:
        """What `offload` returned, where it can be computed with."""
        return tensor.to(self.device, non_blocking=True)

    def made(self, name: str, make: Make) -> dict[str, Tensor]:
        """What `make` returns; with a folder, what an earlier run found, and in memory it takes no room."""
        return made(self.scratch, f"{name}-{self.batch}", make)

    def __str__(self) -> str:
        peak = f"; at most {self.peak_bytes / 2**20:.0f} MiB over the model" if self.peak_bytes else ""
        return self.reason + peak


def plan_engine(
    backbone: Backbone,
    site: Site,
    precision: str,
    weights: int,
    pixels: int,
    fitted: int,
    held: int,
    carriers: int,
    books: int,
    bits: int,
    messages: int,
    scratch: Scratch | None = None,
    ranks: Ranks = ALONE,
) -> Engine:
    """The engine for an edit, from the sizes of everything it will hold.

    Args:
        backbone: the model to mark, where it is computed.
        site: where the mark goes.
        precision: as in `embed`.
        weights: bytes of all weights besides those of the model that was given.
        pixels: bytes of the trigger images, on the CPU.
        fitted: images that the edit is solved on.
        held: images that the features are compared on.
        carriers: trigger images whose activations are kept.
        books: codebooks, which share the images that the edit is solved on.
        bits: of a message, which is as many rows of a codebook.
        messages: runs of an image with something sent.
        scratch: where activations and changes wait on disk, beside a model that is not copied.
        ranks: the processes that compute it together.
    """
    device = backbone.device
    autocast = resolve_autocast(precision, device)
    with autocast(backbone.dtype):
        half = torch.is_autocast_enabled(device.type)
        narrow = torch.get_autocast_dtype(device.type).itemsize if half else backbone.dtype.itemsize
    wide = backbone.dtype.itemsize
    blocks = range(site.block + 1, site.taps[-1] + 1)
    hidden = max(backbone.mlp_matrix(block).shape[1] for block in blocks)
    tokens, width, copies = site.num_tokens, site.width, 1 + messages
    free = free_bytes(device)

    one = copies * tokens * hidden * narrow  # hidden activations of one image
    room = CPU_WORKING_SET if device.type == "cpu" else int(GPU_WORKING_SHARE * free) // 6
    batch = ranks.least(max(MIN_IMAGES, min(room // one, MAX_IMAGES, -(-fitted // books))))
    stream = copies * tokens * width * wide
    changes = len(blocks) * (hidden + width) * books * bits * 8  # of MLPs and attention
    matrix = int(3 * 4 * hidden * hidden * KEPT_OF_GRAM)  # of clean images and of what each band changes
    matrix += 4 * width * (hidden + 3 * width)  # of the passive band
    solve = matrix + 8 * hidden * hidden  # in float64 too, where it is factored
    caches = (fitted + 2 * carriers + held) * tokens * width * wide + fitted * stream
    caches += held * tokens * width * 4  # features of the original
    if device.type == "cpu":
        caches += pixels

    def block(kept: int) -> int:
        """Most bytes in a block's run over all batches and its solve; `kept`: what of each image waits."""
        # While a batch is run: its input, its output, what its MLP makes before and after the nonlinearity.
        # Then: input and output, what the MLP made, and means of its slots, of one after the other.
        pooled = copies * GROUPS * hidden * 4
        each = tokens * hidden * (narrow + 4)
        most = max(2 * one + 3 * stream, one + 2 * stream + pooled + max(pooled, each))
        batches = [(start, min(batch, fitted - start)) for start in range(0, fitted, batch)]
        running = [matrix + start * kept + size * most for start, size in batches]
        return max(*running, fitted * kept + solve)

    on_host = device.type == "cuda" and weights + changes + block(one) + caches > GPU_RESERVE * free
    peak = weights + changes + (block(0) if on_host else block(one) + caches)
    where = "caches in pinned host memory" if on_host else "caches on the device"
    if scratch is not None:
        # The activations of all images are there once, before they go to disk; of the changes, those of one
        # matrix while they are added up, and all that differs at the very end.
        changed = len(blocks) * width * (hidden + width) * wide
        on_host, where = False, "caches on disk"
        peak = max(block(0) + caches + 4 * 4 * width * hidden, changed) + kept_bytes()
    how = f"{batch} images at a time, {where}, edit eager: it runs a block twice, so compiling takes longer"
    return Engine(device, autocast, batch, on_host, peak, how, scratch, ranks)
