"""The forger: what they hold, how they try a key, and how they present a claim to `verify`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from activemark_fast.backbone import Backbone
from activemark_fast.codec import Codec
from activemark_fast.codec.codebooks import (
    BANDS,
    MEASURED_IMAGES,
    Codebook,
    SiteMeasure,
    codebooks,
    draw_sent,
    max_bits,
)
from activemark_fast.codec.passive import BAND_NAMES
from activemark_fast.freedoms import BITS
from activemark_fast.key import Key
from activemark_fast.marking.reading import Channel, row_scores
from activemark_fast.marking.suffix import Autocast, SiteActivations, site_activations
from activemark_fast.normalisation import Preprocess, known_normalisation
from activemark_fast.p_value import sign_flip_p_value
from activemark_fast.photographs import shipped_photographs
from activemark_fast.profiling import measure
from activemark_fast.progress import Progress
from activemark_fast.runtime import resolve_autocast
from activemark_fast.site import Site
from activemark_fast.triggers import ImageMismatchError, trigger_images
from activemark_fast.verification import verify
from activemark_fast.watermark import TRIGGER_IMAGES, Watermark, WatermarkError, fingerprint

USUAL_BITS = 32
PUBLIC_IMAGES = 32
"""Shipped photographs on which the forger measures the suspect."""


@dataclass(frozen=True)
class Attempt:
    """How far a way of forging got, and what `verify` said of it.

    Attributes:
        way: its name in the table of ways.
        tried: what was chosen, and how.
        tries: how many settings, keys or gradient steps.
        seconds: all of it, `verify` included.
        decision: "match", "no match", "inconclusive", or "refused": `verify` raised an error.
        said: the verdict's reason, or the error's text.
        detection_rate: R, or None.
        p_value, paid_p_value: the verdict's, or None.
        chosen: what the verdict says the owner chose.
        evidence: the verdict's line on what a match proves.
    """

    way: str
    tried: str
    tries: int
    seconds: float
    decision: str
    said: str
    detection_rate: float | None = None
    p_value: float | None = None
    paid_p_value: float | None = None
    chosen: tuple[str, ...] = ()
    evidence: str | None = None

    @property
    def counts(self) -> float | None:
        """The paid p-value, where `verify` takes it to count against an owner who lies; else None."""
        return None if self.chosen else self.paid_p_value

    def __str__(self) -> str:
        effort = f"{self.tries} {'try' if self.tries == 1 else 'tries'}, {self.seconds:.1f} s"
        found = [self.decision.upper()]
        if self.detection_rate is not None:
            found.append(f"R = {self.detection_rate:.3f}")
        if self.p_value is not None:
            found.append(f"p = {self.p_value:.2g}, paid p = {self.paid_p_value:.2g}")
        lines = [f"{self.way}: {self.tried}", f"    {effort}: {', '.join(found)}: {self.said}"]
        if self.chosen:
            lines.append(f"    chosen by the owner: {' and '.join(self.chosen)}")
        if self.evidence is not None:
            lines.append(f"    evidence: {self.evidence}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Thief:
    """What a forger holds.

    Attributes:
        suspect: a copy of it, in eval mode, its weights frozen, on the device of the computation.
        backbone: a view of it.
        site: where `embed` would put a mark.
        bits: 32, or as many as its width has room for.
        preprocess: how images become its input, by a published normalisation.
        key: what the forger's random numbers come from; each way takes sub-keys of it.
        photographs: (n, 3, H, W) on the device, model input: public images to measure the suspect on.
        precision: as in `embed`.
        autocast: the same, as what blocks run in.
        bar: shows how far a way is.
    """

    suspect: nn.Module
    backbone: Backbone
    site: Site
    bits: int
    preprocess: Preprocess
    key: Key
    photographs: Tensor
    precision: str
    autocast: Autocast
    bar: Progress

    @classmethod
    def of(cls, suspect: nn.Module, seed: int, device: torch.device, precision: str, bar: Progress) -> Thief:
        """A forger who has `suspect`. ValueError where it has no room for a mark."""
        held = copy.deepcopy(suspect).eval().requires_grad_(False).to(device)
        backbone = Backbone(held)
        autocast = resolve_autocast(precision, device)
        preprocess = known_normalisation(backbone.preprocess) or backbone.preprocess
        photographs = preprocess(shipped_photographs().images[:PUBLIC_IMAGES]).to(device)
        with torch.no_grad(), autocast(backbone.dtype):
            site = measure(backbone, photographs).site().site
        room = [bits for bits in BITS if bits <= min(USUAL_BITS, max_bits(site.width))]
        if not room:
            raise ValueError(f"suspect: wanted room for {BITS[0]} bits, got a width of {site.width}")
        return cls(
            held,
            backbone,
            replace(site, massive_tokens=(), massive_channels=()),
            room[-1],
            preprocess,
            Key(f"activemark forge: the forger's key, {seed}".encode()),
            photographs,
            precision,
            autocast,
            bar,
        )

    @staticmethod
    def now() -> float:
        """Seconds, of the clock that deadlines are on."""
        return time.perf_counter()

    @property
    def device(self) -> torch.device:
        """Where the suspect is."""
        return self.photographs.device

    def triggers(self, key: Key, preprocess: Preprocess | None = None) -> Tensor:
        """(n, 3, H, W) on the device: what `verify` makes of a key when the images come from it."""
        preprocess = self.preprocess if preprocess is None else preprocess
        return trigger_images(None, key, preprocess, TRIGGER_IMAGES).pixels.to(self.device)

    def at_site(
        self, pixels: Tensor, site: Site | None = None, backbone: Backbone | None = None
    ) -> SiteActivations:
        """What `pixels` make of the stream at a site; the suspect's and the usual one by default."""
        return site_activations(backbone or self.backbone, pixels, (site or self.site).block, self.autocast)

    def scores(
        self,
        stretched: Key,
        bits: int,
        pixels: Tensor,
        site: Site | None = None,
        backbone: Backbone | None = None,
    ) -> list[list[int]]:
        """What `verify` would count for each band: matches less mismatches of each row."""
        site, backbone = site or self.site, backbone or self.backbone
        activations = self.at_site(pixels, site, backbone)
        measured = SiteMeasure.of(activations.output[:MEASURED_IMAGES], site.prefix_tokens)
        books: Sequence[Codebook] = codebooks(stretched, site, bits, measured)
        sent = draw_sent(stretched, "verify", len(pixels), bits)
        bands: dict[str, list[Tensor]] = {band.name: [] for band in BANDS}
        for book, part in zip(books, sent, strict=True):
            book.taps = tuple(tap for tap in book.taps if tap < backbone.depth)
            codec: Codec = book.to(self.device)
            channel = Channel(codec, part.to(self.device))
            read = channel.agreement(backbone, activations, 0, site.block, self.autocast)
            bands[book.band.name].append(channel.cleared(read))
        return [row_scores(parts) for parts in bands.values()]

    def p_value(self, *args: Any, **settings: Any) -> float:
        """The p-value that `verify` would state of injections, nothing paid; arguments as for `scores`."""
        return min(1.0, len(BAND_NAMES) * min(map(sign_flip_p_value, self.scores(*args, **settings))))

    def seal(self, key: Key, **changes: Any) -> Watermark:
        """The watermark that `embed` would write for the suspect, but for `changes`."""
        fields = {
            "codec": "keyed",
            "bits": self.bits,
            "axis": "token",
            "site": self.site,
            "preprocess": self.preprocess,
            "digests": (),
            "image_source": "key",
            "state": {},
            "fingerprint": fingerprint(self.suspect),
            "architecture": None,
        }
        return Watermark.seal(key, **(fields | changes))

    def present(
        self,
        way: str,
        tried: str,
        tries: int,
        started: float,
        key: Key,
        watermark: Watermark,
        images: Tensor | None = None,
        suspect: nn.Module | None = None,
        **settings: Any,
    ) -> Attempt:
        """Claims the suspect before `verify`, with a watermark and whatever else it takes."""
        settings = {"precision": self.precision} | settings
        try:
            verdict = verify(self.suspect if suspect is None else suspect, watermark, key, images, **settings)
        except (WatermarkError, ImageMismatchError) as error:
            return Attempt(way, tried, tries, self.now() - started, "refused", str(error))
        return Attempt(
            way,
            tried,
            tries,
            self.now() - started,
            verdict.decision,
            verdict.reason,
            None if math.isnan(verdict.detection_rate) else verdict.detection_rate,
            verdict.p_value,
            verdict.paid_p_value,
            verdict.chosen,
            verdict.evidence,
        )
