"""profile: how large the largest activations are after every block, and which block is the expressive one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from activemark_fast.backbone import Backbone, evaluating
from activemark_fast.block_choice import MASSIVE_RATIO, RULES, TOP, block_for
from activemark_fast.dress import plain_torch
from activemark_fast.ops.magnitude import Magnitudes, magnitudes
from activemark_fast.progress import Progress
from activemark_fast.ranks import ALONE, Ranks
from activemark_fast.runtime import resolve_autocast, resolve_device
from activemark_fast.site import Placement, Site, check_block, taps_after
from activemark_fast.triggers import public_images

MAX_IMAGES = 256
MADE_IMAGES = 32
"""How many images are made where none are given."""
BATCH = 32
KEPT = 16
"""How many of an image's largest magnitudes are kept, unless more are asked for."""


class Massive(NamedTuple):
    """A place of massive activations."""

    token: int
    channel: int
    images: int  # in how many of them the value there is massive
    magnitude: float  # mean over those images


@dataclass(frozen=True, eq=False)
class StreamProfile:
    """Magnitudes of the residual stream at one depth, of every image. NaN and infinities are left out.

    Attributes:
        values: (images, k) float64, the largest |values|, descending; NaN where fewer are finite.
        tokens, channels: (images, k) int64, where they sit; -1 where `values` is NaN.
        medians: (images,) float64, of |values|, within 0.25 %.
        nonfinite: (images,) int64, how many values are NaN or infinite.
    """

    values: np.ndarray
    tokens: np.ndarray
    channels: np.ndarray
    medians: np.ndarray
    nonfinite: np.ndarray

    @property
    def top(self) -> np.ndarray:
        """(k,) float64: the largest, the second largest … magnitude, mean over images."""
        return _mean(self.values)

    @property
    def median(self) -> float:
        """The median magnitude, mean over images."""
        return float(_mean(self.medians))

    @property
    def ratio(self) -> np.ndarray:
        """(k,) float64: `top` over `median`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.top / self.median

    @cached_property
    def massive(self) -> tuple[Massive, ...]:
        """Where massive values are, at least 50 times the median of their image: the most frequent first.

        Only the k largest values of an image are known, so of more than k massive ones some are missing.
        """
        places: dict[tuple[int, int], list[float]] = {}
        for image, rank in np.argwhere(self._huge):
            place = int(self.tokens[image, rank]), int(self.channels[image, rank])
            places.setdefault(place, []).append(float(self.values[image, rank]))
        found = [Massive(*place, len(values), float(np.mean(values))) for place, values in places.items()]
        return tuple(sorted(found, key=lambda m: (-m.images, -m.magnitude, m.token, m.channel)))

    @property
    def massive_tokens(self) -> tuple[int, ...]:
        """Tokens that hold a massive value in at least half of the images, in whatever channel."""
        return self._recurring(self.tokens)

    @property
    def massive_channels(self) -> tuple[int, ...]:
        """Channels that hold a massive value in at least half of the images, at whatever token."""
        return self._recurring(self.channels)

    @property
    def _huge(self) -> np.ndarray:
        return (self.values >= MASSIVE_RATIO * self.medians[:, None]) & (self.values > 0)

    def _recurring(self, places: np.ndarray) -> tuple[int, ...]:
        found = [np.unique(row[huge]) for row, huge in zip(places, self._huge, strict=True)]
        place, images = np.unique(np.concatenate(found), return_counts=True)
        return tuple(int(p) for p in place[2 * images >= len(places)])


@dataclass(frozen=True, eq=False)
class Profile:
    """Magnitudes of the residual stream after every block. Blocks, tokens and channels count from 0.

    Attributes:
        stem: what enters block 0 (behind the norm before the blocks, where there is one).
        blocks: what leaves each block.
        num_tokens, prefix_tokens, width: token layout of the model, as in `Backbone`.
        has_class_token: whether token 0 is a class token.
    """

    stem: StreamProfile
    blocks: tuple[StreamProfile, ...]
    num_tokens: int
    prefix_tokens: int
    width: int
    has_class_token: bool

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.stem.values)

    @property
    def top(self) -> np.ndarray:
        """(depth, k) float64: the largest magnitudes after every block, descending, mean over images."""
        return np.array([block.top for block in self.blocks])

    @property
    def median(self) -> np.ndarray:
        """(depth,) float64: the median magnitude after every block, mean over images."""
        return np.array([block.median for block in self.blocks])

    @property
    def ratio(self) -> np.ndarray:
        """(depth, k) float64: `top` over `median`."""
        return np.array([block.ratio for block in self.blocks])

    @property
    def massive(self) -> tuple[tuple[Massive, ...], ...]:
        """Where massive values are after every block (`StreamProfile.massive`)."""
        return tuple(block.massive for block in self.blocks)

    def token_name(self, token: int) -> str:
        """What a token stands for: "class token", "register 0" or "patch 0"."""
        if token >= self.prefix_tokens:
            return f"patch {token - self.prefix_tokens}"
        if token == 0 and self.has_class_token:
            return "class token"
        return f"register {token - self.has_class_token}"

    def site(self, rule: str = "paper", *, block: int | None = None) -> Placement:
        """Where a mark goes, why, and how sure that is.

        The rules look at the mean of an image's five largest magnitudes.

        - "paper" (section 3.2): the block of the first sharp rise, where massive activations emerge. The mean
          is at least three times what it was before the block, and the largest is at least 50 times the
          median.
        - "reference" (what the authors' code does): the block with the largest difference to its predecessor.
        - "late": the last block that leaves room for two taps, provided that no sharp rise follows it. Its
          marks survive pruning and fine-tuning of all layers better (benchmarks/site_rules.py); but few
          blocks carry them, and whoever resets the last blocks is rid of them.

        By the first two, a model without massive activations, or in which they emerge before block 0, without
        a rise, or too late to leave two blocks for the mark, is marked at its middle block.
        `Placement.reason` says so.

        Args:
            rule: "paper", "reference" or "late".
            block: take this block instead, whatever the rule says.

        Raises:
            ValueError: another `rule`.
            SiteError: `block` leaves no block between it and the last one, or the model has fewer than 3
                blocks.
        """
        if rule not in RULES:
            raise ValueError(f"rule: wanted one of {sorted(RULES)}, got {rule!r}")
        if block is not None and (not isinstance(block, int) or isinstance(block, bool)):
            raise TypeError(f"block: wanted int, got {type(block).__name__}")
        check_block(block, self.depth)
        heights, ratios = self._heights_and_ratios()
        emergence = RULES[rule](_mean(heights.T), self._ratios_of_means())
        alone = [RULES[rule](*image) for image in zip(heights.T, ratios.T, strict=True)]
        agreeing = sum(answer == emergence for answer in alone)
        if block is None:
            block, why = block_for(rule, emergence, self._ratios_of_means())
            reason = f"{why}; {agreeing} of {self.images} images agree)"
        else:
            reason = f"block {block}, as asked for"
        site = Site(
            block=block,
            taps=taps_after(block, self.depth),
            num_tokens=self.num_tokens,
            prefix_tokens=self.prefix_tokens,
            width=self.width,
            massive_tokens=self.blocks[block].massive_tokens,
            massive_channels=self.blocks[block].massive_channels,
            depth=self.depth,
        )
        return Placement(site, emergence, agreeing / self.images, reason)

    def to_dict(self) -> dict[str, object]:
        """The profile as JSON types; what is not known, or infinite, is None."""
        return {
            "images": self.images,
            "num_tokens": self.num_tokens,
            "prefix_tokens": self.prefix_tokens,
            "width": self.width,
            "stem": self._stream_dict(self.stem),
            "blocks": [self._stream_dict(block) for block in self.blocks],
        }

    def __str__(self) -> str:
        rows = [("after", "largest", "median", "ratio", "massive at (images)")]
        names = ["stem", *(f"block {index}" for index in range(self.depth))]
        for name, stream in zip(names, (self.stem, *self.blocks), strict=True):
            numbers = (f"{stream.top[0]:.4g}", f"{stream.median:.4g}", f"{stream.ratio[0]:.3g}")
            rows.append((name, *numbers, self._massive_text(stream)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in (0, 4) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def _heights_and_ratios(self) -> tuple[np.ndarray, np.ndarray]:
        """Of stem and blocks, of every image: mean of the five largest magnitudes, largest over median."""
        streams = (self.stem, *self.blocks)
        heights = np.array([_mean(stream.values[:, :TOP].T) for stream in streams])
        with np.errstate(divide="ignore", invalid="ignore"):
            return heights, np.array([stream.values[:, 0] / stream.medians for stream in streams])

    def _ratios_of_means(self) -> np.ndarray:
        return np.array([self.stem.ratio[0], *self.ratio[:, 0]])

    def _massive_text(self, stream: StreamProfile) -> str:
        shown = [f"{self.token_name(m.token)}, channel {m.channel} ({m.images})" for m in stream.massive[:3]]
        more = len(stream.massive) - len(shown)
        return "; ".join(shown) + (f"; {more} more" if more else "")

    def _stream_dict(self, stream: StreamProfile) -> dict[str, object]:
        return {
            "top": [_json(value) for value in stream.top],
            "median": _json(stream.median),
            "ratio": [_json(value) for value in stream.ratio],
            "nonfinite": int(stream.nonfinite.sum()),
            "massive": [{"name": self.token_name(m.token), **m._asdict()} for m in stream.massive],
        }


@plain_torch()
def profile(
    model: nn.Module,
    images: object = None,
    *,
    k: int = KEPT,
    tower: str | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    progress: bool = False,
) -> Profile:
    """Runs `model` once, block by block, and keeps of every block's output only what a profile needs.

    Args:
        model: an image tower, or a model that holds one (`Backbone` says which); it is left as it is.
        images: images in any of the forms that `trigger_images` lists, up to 256; one is enough. Without
            any, 32 are made, the same for everybody.
        k: how many of the largest magnitudes of each image to keep, at least 5. Massive activations are
            looked for among them.
        tower: dotted name of the module to profile, as in `embed`.
        device: where to compute; by default where the model is.
        precision: "auto" (bf16 on CUDA and on CPUs that multiply it, else fp32), "fp32", "bf16" or "fp16";
            weights stay in their own dtype.
        progress: show a progress bar on standard error.

    Raises:
        TypeError, ValueError: an argument is not as described, or the model is no plain ViT (`NotAViTError`).
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: wanted int, got {type(k).__name__}")
    backbone = Backbone(model, tower=tower)
    most = backbone.num_tokens * backbone.width
    if not TOP <= k <= most:
        raise ValueError(f"k: wanted {TOP} to {most}, the number of values of an image, got {k}")
    device = resolve_device(device, backbone.device)
    autocast = resolve_autocast(precision, device)
    pixels = public_images(images, backbone.preprocess, MADE_IMAGES if images is None else MAX_IMAGES)
    if device != backbone.device:
        backbone = backbone.of_copy(device)
    with evaluating(backbone.encoder), autocast(backbone.dtype), Progress(progress) as bar:
        bar.stage("profile", len(pixels))
        return measure(backbone, pixels, k, bar.advance)


@torch.no_grad()
def measure(
    backbone: Backbone,
    pixels: Tensor,  # (n, 3, H, W), on any device
    k: int = KEPT,
    on_batch: Callable[[int], None] = lambda images: None,
    ranks: Ranks = ALONE,
) -> Profile:
    """The profile of `backbone`, in the mode its blocks are in; `on_batch` hears of each batch measured.

    ranks: the processes that measure it together.
    """

    def run(batch: Tensor) -> list[Tensor]:
        tokens = backbone.stem(batch.to(backbone.device, backbone.dtype))
        measured = [*magnitudes(tokens, k)]
        for block in range(backbone.depth):
            tokens = backbone.run(tokens, block, block + 1)
            measured += magnitudes(tokens, k)
        return measured

    found: list[list[Magnitudes]] = [[] for _ in range(backbone.depth + 1)]
    batches = pixels.split(min(BATCH, -(-len(pixels) // ranks.count)))
    tasks = [partial(run, batch) for batch in batches]
    for batch, measured in zip(batches, ranks.each(tasks, backbone.device), strict=True):
        size = len(Magnitudes._fields)
        for stream, start in zip(found, range(0, len(measured), size), strict=True):
            stream.append(Magnitudes(*measured[start : start + size]))
        on_batch(len(batch))
    stem, *blocks = (_gather(batches, backbone.width) for batches in found)
    return Profile(
        stem=stem,
        blocks=tuple(blocks),
        num_tokens=backbone.num_tokens,
        prefix_tokens=backbone.prefix_tokens,
        width=backbone.width,
        has_class_token=backbone.has_class_token,
    )


def _gather(batches: list[Magnitudes], width: int) -> StreamProfile:
    """What was found in all batches, off the device: only here the host waits for it."""
    values, index, median, _, nonfinite = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    place = index.numpy()
    return StreamProfile(
        values=values.double().numpy(),
        tokens=np.where(place < 0, -1, place // width),
        channels=np.where(place < 0, -1, place % width),
        medians=median.double().numpy(),
        nonfinite=nonfinite.numpy(),
    )


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean along the first axis of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, values, 0).sum(axis=0) / there.sum(axis=0))


def _json(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
