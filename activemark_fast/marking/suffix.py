"""The model from the site on: its cached input, the reading of a mark, the final features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.codec import Codec
from activemark_fast.ops.decode import Decoded
from activemark_fast.ranks import ALONE, Ranks

BATCH = 32
"""Images run through the model at a time: few, so that several processes have as much to do each."""

Autocast = Callable[[torch.dtype], AbstractContextManager[object]]
"""Makes the context that blocks with weights of a dtype run in: mixed precision, or nothing."""


@dataclass(frozen=True, eq=False)
class SiteActivations:
    """What enters and leaves the site's block: all the suffix needs to know of the images.

    Attributes:
        source: (n, N, D), input of the block.
        output: (n, N, D), its output.
    """

    source: Tensor
    output: Tensor

    def __len__(self) -> int:
        return len(self.output)

    def __getitem__(self, index: slice | Tensor) -> SiteActivations:
        return SiteActivations(self.source[index], self.output[index])

    def to(self, device: torch.device) -> SiteActivations:
        """The same on `device`."""
        return SiteActivations(self.source.to(device), self.output.to(device))


@torch.no_grad()
def site_activations(
    backbone: Backbone,
    pixels: Tensor,
    block: int,
    autocast: Autocast,
    batch: int = BATCH,
    ranks: Ranks = ALONE,
) -> SiteActivations:
    """Runs `pixels` (n, 3, H, W) up to and through `block`, on the backbone's device, `batch` at a time.

    ranks: the processes that run them together.
    """

    def run(part: Tensor) -> list[Tensor]:
        with autocast(backbone.dtype):
            source = backbone.run(backbone.stem(part.to(backbone.device, backbone.dtype)), 0, block)
            return [source, backbone.run(source, block, block + 1)]

    tasks = [partial(run, part) for part in pixels.split(batch)]
    sources, outputs = zip(*ranks.each(tasks, backbone.device), strict=True)
    return SiteActivations(torch.cat(sources), torch.cat(outputs))


def run_to_taps(
    backbone: Backbone, codec: Codec, activations: SiteActivations, message: Tensor, block: int
) -> tuple[dict[int, Decoded], Tensor]:
    """Injects (B, M) messages and runs to the last tap.

    Returns:
        What is read at every tap, and the residual stream (B or 2 * B, N, D) after the last one.
    """
    stream = codec.inject(activations.output, activations.source, message)
    decoded = {}
    start = block + 1
    for tap in codec.taps:
        stream = backbone.run(stream, start, tap + 1)
        decoded[tap] = codec.decode(stream, tap, message)
        start = tap + 1
    return decoded, stream


@torch.no_grad()
def read_mark(
    backbone: Backbone,
    codec: Codec,
    activations: SiteActivations,
    message: Tensor,
    block: int,
    autocast: Autocast,
) -> dict[int, Decoded]:
    """What is read at every tap for (n, M) messages."""
    parts: dict[int, list[Decoded]] = {tap: [] for tap in codec.taps}
    for start in range(0, len(activations), BATCH):
        chosen = slice(start, start + BATCH)
        with autocast(backbone.dtype):
            decoded, _ = run_to_taps(
                backbone, codec, activations[chosen].to(backbone.device), message[chosen], block
            )
        for tap, read in decoded.items():
            parts[tap].append(read)
    return {tap: Decoded(*map(torch.cat, zip(*reads, strict=True))) for tap, reads in parts.items()}


def message_loss(decoded: dict[int, Decoded]) -> Tensor:
    """(), cross-entropy of message and logits, mean over the taps."""
    return torch.stack([read.loss for read in decoded.values()]).mean()


@torch.no_grad()
def final_features(
    backbone: Backbone, activations: SiteActivations, block: int, autocast: Autocast
) -> Tensor:
    """(n, F, D) float32 features of the clean images."""
    parts = []
    for output in activations.output.split(BATCH):
        with autocast(backbone.dtype):
            tokens = backbone.run(output.to(backbone.device), block + 1, backbone.depth)
            parts.append(backbone.features(tokens).float())
    return torch.cat(parts)
