"""What marking a model would come to: where, how many bits, in what time and memory, or why not."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from activemark_fast.backbone import Backbone
from activemark_fast.codec.codebooks import BANDS, MEASURED_IMAGES, max_bits
from activemark_fast.decision import least_bits
from activemark_fast.dress import plain_torch, unwrapped
from activemark_fast.freedoms import BITS
from activemark_fast.marking.engine import plan_engine
from activemark_fast.marking.subject import FITTED_IMAGES, HELD_IMAGES, MESSAGES_PER_IMAGE, check_writable
from activemark_fast.profiling import measure
from activemark_fast.runtime import resolve_autocast, resolve_device
from activemark_fast.triggers import clean_images
from activemark_fast.watermark import TRIGGER_IMAGES

LOOKED_AT = 8
"""Photographs that a model is profiled and timed on."""
PASSES = 1000
"""A mark takes about as long as so many images through the whole tower: measured, on one thread of a CPU, as
790 to 1,070 for towers of 5 and 12 blocks of width 96 to 192, 16 to 197 tokens."""


@dataclass(frozen=True)
class Outlook:
    """What marking a model would come to.

    Attributes:
        tower: dotted name of the module that would be marked; "" is the model itself.
        others: other modules that could be, with `tower=`.
        blocks, width, tokens: of the residual stream the mark would be written to.
        image_size: (height, width) in pixels.
        bits: the longest message, a multiple of 8.
        site: where the mark would go, and why, on a few photographs.
        seconds: about how long it would take here.
        peak_bytes: what it would hold at most besides the model; of an allocator's own more.
    """

    tower: str
    others: tuple[str, ...]
    blocks: int
    width: int
    tokens: int
    image_size: tuple[int, int]
    bits: int
    site: str
    seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        tower = f"tower {self.tower!r}: " if self.tower else ""
        others = f"\nother towers: {', '.join(map(repr, self.others))}" if self.others else ""
        height, width = self.image_size
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return (
            f"can be marked: {tower}{self.blocks} blocks of width {self.width}, {self.tokens} "
            f"token{'s' * (self.tokens != 1)} of {height} x {width} pixels\n"
            f"site: {self.site}\n"
            f"message: up to {self.bits} bits\n"
            f"about {time} and {self.peak_bytes / 2**20:.0f} MiB besides the model{others}"
        )


@plain_torch()
@torch.no_grad()
def outlook(
    model: nn.Module,
    *,
    tower: str | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> Outlook:
    """Looks at a model without marking it. It is left as it was.

    Args:
        model: as in `embed`.
        tower: as in `embed`.
        device: as in `embed`.
        precision: as in `embed`.

    Raises:
        TypeError, ValueError: the model cannot be marked, and why; or an argument is not as described.
    """
    view = Backbone(unwrapped(model) if isinstance(model, nn.Module) else model, tower=tower)
    check_writable(view)
    place = resolve_device(device, view.device)
    autocast = resolve_autocast(precision, place)
    photographs = clean_images(None, view.preprocess, LOOKED_AT, 1).fitted
    moved = view.of_copy(place)
    started = time.perf_counter()
    with autocast(moved.dtype):
        placement = measure(moved, photographs).site()
    seconds = (time.perf_counter() - started) / LOOKED_AT
    pixels = photographs[0].nbytes * TRIGGER_IMAGES
    longest = min(BITS[-1], max_bits(view.width) // BITS.step * BITS.step)
    least = least_bits(placement.site.block, view.depth, TRIGGER_IMAGES)
    if longest < least:
        raise ValueError(
            f"model: wanted room for a message of at least {least} bits, got a width of {view.width}, which "
            f"has it for {longest}"
        )
    engine = plan_engine(
        moved,
        placement.site,
        precision,
        sum(tensor.nbytes for tensor in moved.model.state_dict().values()),
        pixels,
        FITTED_IMAGES,
        HELD_IMAGES,
        MEASURED_IMAGES,
        sum(band.books for band in BANDS),
        longest,
        MESSAGES_PER_IMAGE,
    )
    return Outlook(
        view.tower,
        tuple(name for name in view.towers if name != view.tower),
        view.depth,
        view.width,
        view.num_tokens,
        view.image_size,
        longest,
        placement.reason,
        PASSES * seconds,
        engine.peak_bytes,
    )
