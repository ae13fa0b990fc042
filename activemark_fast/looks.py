"""Reads a suspect: the mark at one place, in looks at more and more images, until the verdict is settled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from activemark_fast.align import (
    EXPLAINED_WELL,
    Alignment,
    best_explained,
    find_alignment,
    sample_images,
    site_sample,
)
from activemark_fast.backbone import Backbone, evaluating
from activemark_fast.band_reading import BandReading
from activemark_fast.codec import Codec, KeyedCodec
from activemark_fast.codec.codebooks import BANDS, MEASURED_IMAGES, SiteMeasure, codebooks, draw_sent
from activemark_fast.codec.passive import (
    Moments,
    passive_rows,
    passive_scores,
    readings,
)
from activemark_fast.decision import Policy, Reading
from activemark_fast.key import Key
from activemark_fast.marking.reading import Channel, passive_pairs
from activemark_fast.marking.suffix import BATCH, Autocast, SiteActivations, site_activations
from activemark_fast.marking.traced import IMAGES as TRACED_IMAGES
from activemark_fast.marking.traced import row_answers, traced_channels
from activemark_fast.normalisation import Preprocess
from activemark_fast.ops.common import in_full_precision
from activemark_fast.p_value import sign_flip_p_value
from activemark_fast.ranks import ALONE, Ranks
from activemark_fast.sequential import look_ends
from activemark_fast.site import Site
from activemark_fast.tracing import Register, Trace, trace_answers
from activemark_fast.triggers import TriggerImages, trigger_images
from activemark_fast.verdict import NO_MATCH_ABOVE
from activemark_fast.watermark import Watermark

FIRST_SAMPLED = 4
"""Images on which no map must explain the suspect for it to be let go without a look at the others."""


class UnreadableError(Exception):
    """The suspect cannot be read; the message says why."""


class Prefix:
    """Activations of the images of each look at the site: run when they are first asked for, then kept.

    It serves all suspects whose weights up to the site's block are equal.
    """

    MEASURED = -1
    """In place of a look: the images that tell how tokens vary."""

    def __init__(self) -> None:
        self._kept: dict[int, SiteActivations] = {}

    @property
    def kept(self) -> list[SiteActivations]:
        """What was run so far, in the order in which it was."""
        return list(self._kept.values())

    def at(self, look: int, run: Callable[[], SiteActivations]) -> SiteActivations:
        """The activations of `look`, which `run` makes."""
        if look not in self._kept:
            self._kept[look] = run()
        return self._kept[look]


class Reader:
    """Reads one mark from suspects of the marked model's shape.

    Args:
        watermark: of the mark; checked.
        secret: its key.
        codec: of a mark of one band, on `device`; None for a mark in bands, whose directions depend on
            how the suspect's own tokens vary, and are made for each suspect.
        triggers: the trigger images.
        preprocess: how images made from the key become model input.
        power: as `Verifier` takes it; None for a codec without p-value.
        traced: whether recipients are to be told apart, too.
        device: where suspects are.
        autocast: mixed precision of the forward passes.
        ranks: processes that read the same suspects together.
    """

    def __init__(
        self,
        watermark: Watermark,
        secret: Key,
        codec: Codec | None,
        triggers: TriggerImages,
        preprocess: Preprocess,
        power: float | None,
        traced: bool,
        device: torch.device,
        autocast: Autocast,
        ranks: Ranks = ALONE,
    ) -> None:
        self._watermark, self._secret, self._codec = watermark, secret, codec
        self._preprocess, self._device, self._autocast = preprocess, device, autocast
        self._ranks = ranks
        count, bits = triggers.count, watermark.bits
        if codec is None:
            self._stretched = secret.stretched()
            sent = draw_sent(self._stretched, "verify", count, bits)
        else:
            sent = [torch.from_numpy(secret.stream("messages/verify").bits((count, 1, bits)))]
        if power is None:
            order, self.ends = torch.arange(count), [count]
        else:  # as an owner's folder is sorted, its first images need not be like the others
            order, self.ends = torch.from_numpy(secret.stream("looks").permutation(count)), look_ends(count)
        measured = range(min(MEASURED_IMAGES, count))
        starts = (0, *self.ends)
        by_look = {look: order[start:end].tolist() for look, (start, end) in enumerate(pairwise(starts))}
        # Made when a suspect first takes the look, then kept for others.
        self._pixels = cache(lambda look: triggers.some(by_look.get(look, measured)).to(device))
        self._sent = [part[order].to(device) for part in sent]
        if traced:
            made = trigger_images(None, secret, watermark.preprocess, TRACED_IMAGES).pixels
            self._traced_pixels = made.to(device)

    def read(
        self,
        site: Site,
        backbone: Backbone,
        prefix: Prefix,
        policy: Policy,
        tries: int,
        check: Callable[[], None],
    ) -> Reading:
        """What the suspect shows at `site`, whose taps can all be run: as it is, and aligned where it helps.

        Args:
            site: where the mark may lie.
            backbone: a view of the suspect, on the reader's device.
            prefix: of its weights up to the site's block.
            policy: says when the looks end, and whether to align.
            tries: of how many readings of one suspect the best is reported.
            check: called now and then; what it raises ends the reading.

        Raises:
            UnreadableError: it puts out what is not finite, or constant; or it has another width, and no map
                between the two explains it.
        """
        measured = seen = None
        if self._codec is None:
            seen = prefix.at(Prefix.MEASURED, partial(self._at_site, site, backbone, Prefix.MEASURED))
            measured = SiteMeasure.of(seen.output, site.prefix_tokens)
            if not measured.usable:
                raise UnreadableError("the suspect puts out NaN or infinite activations")

        def reading(alignment: Alignment | None) -> Reading | None:
            bands = self._bands(site, measured, alignment)
            weights = policy.weights(alignment is not None, tries)
            passive = None
            if seen is not None:
                passive = cache(partial(self._passive, site, backbone, seen.output, alignment))
            found = self._looks(site, backbone, bands, prefix, policy, weights, alignment, passive, check)
            if (
                found is None
                or passive is None
                or policy.settled(found.p_value, excluded=False, hopeless=False)
            ):
                return found
            p_value = min(found.p_value, policy.price(alignment is not None, tries) * passive())
            return replace(found, p_value=p_value, bands=(*found.bands, passive()))

        readings = []
        widened = backbone.width != site.width
        if policy.align is not True and not widened:
            plain = reading(None)
            if plain is None:
                raise UnreadableError("the suspect puts out NaN or infinite activations")
            readings.append(plain)
        if not readings or (policy.align is None and not policy.matches(readings[0].p_value)):
            alignment = self._alignment(site, backbone, policy.align is True)
            if alignment is not None and policy.exact:
                aligned = reading(alignment)
                readings += [] if aligned is None else [aligned]
        if not readings:
            if widened:
                width = other_width(backbone, site)
                raise UnreadableError(f"{width}, and no map between the two explains it")
            raise UnreadableError("the suspect's activations are constant or not finite")
        return min(readings, key=lambda reading: reading.p_value)

    def trace(
        self, register: Register, site: Site, backbone: Backbone, alignment: Alignment | None, alpha: float
    ) -> Trace:
        """What the suspect tells of the recipients, read at `site` after undoing `alignment`."""
        channels = traced_channels(
            self._stretched, site, self._watermark.bits, register.measured, self._device
        )
        if alignment is not None:
            matrix, scale = alignment.matrix.to(self._device), alignment.scale
            channels = [
                Channel(channel.codec.aligned(matrix, scale), channel.sent)
                for channel in channels
                if isinstance(channel.codec, KeyedCodec)
            ]
        read = self._seen(site, backbone, self._traced_pixels)
        answers = np.full(register.reference.shape, np.nan)
        with evaluating(backbone.model):
            told = row_answers(backbone, channels, read, site.block, self._autocast)
        answers[: len(site.taps)] = told.numpy()
        return trace_answers(register, self._secret, answers, alpha)

    def _at_site(self, site: Site, backbone: Backbone, look: int) -> SiteActivations:
        return self._seen(site, backbone, self._pixels(look))

    def _seen(self, site: Site, backbone: Backbone, pixels: Tensor) -> SiteActivations:
        batch = min(BATCH, -(-len(pixels) // self._ranks.count))
        with evaluating(backbone.model):
            return site_activations(backbone, pixels, site.block, self._autocast, batch, self._ranks)

    def _bands(
        self, site: Site, measured: SiteMeasure | None, alignment: Alignment | None
    ) -> list[list[Channel]]:
        """What reads a suspect at `site`, after undoing `alignment`: the channels of each band.

        measured: on the suspect, for a mark in bands.
        """
        if measured is None:
            assert self._codec is not None
            codecs: list[Codec] = [copy.copy(self._codec)]
            counts = [1]
        else:
            back = measured if alignment is None else measured.turned_back(alignment.matrix)
            codecs = list(codebooks(self._stretched, site, self._watermark.bits, back))
            counts = [band.books for band in BANDS]
        channels = []
        for codec, sent in zip(codecs, self._sent, strict=True):
            codec = codec.to(self._device)
            if alignment is not None and isinstance(codec, KeyedCodec):
                scale = alignment.scale if measured is None else 1.0  # measured on the suspect already
                codec = codec.aligned(alignment.matrix.to(self._device), scale)
            codec.taps = site.taps
            channels.append(Channel(codec, sent))
        ends = np.cumsum(counts)
        return [channels[end - count : end] for count, end in zip(counts, ends, strict=True)]

    def _passive(self, site: Site, backbone: Backbone, output: Tensor, alignment: Alignment | None) -> float:
        """The p-value of the passive band.

        output: (n, N, D), of the site's block for the images that tell how tokens vary.
        """
        back = None if alignment is None else alignment.matrix.to(self._device).float().T
        rows, read = passive_rows(self._stretched, site), []
        with evaluating(backbone.model):
            for block, *pair in passive_pairs(backbone, output, site, self._autocast):
                with in_full_precision(output):
                    turned = pair if back is None else (part @ back for part in pair)
                    read.append(readings(rows[block], Moments.of(*turned)))
        return sign_flip_p_value(passive_scores(read))

    @cached_property
    def _sample_images(self) -> Tensor:
        """Made when the first suspect has to be aligned, and then kept."""
        images = sample_images(self._secret, self._watermark.site, self._preprocess)
        return images.to(self._device)

    @cached_property
    def _original_sample(self) -> Tensor | None:
        """What the watermark keeps of the original to align with, where it is computed with."""
        stored = self._watermark.alignment
        return None if stored is None else stored.to(self._device).float()

    def _alignment(self, site: Site, backbone: Backbone, wanted: bool) -> Alignment | None:
        """How the suspect's residual stream lies to the original's; None if it is not worth a reading.

        wanted: any such map is worth one.
        """
        stored = self._original_sample
        if stored is None:
            return None

        def sampled(images: Tensor) -> Tensor:
            with evaluating(backbone.model):
                return site_sample(backbone, self._secret, site, self._preprocess, self._autocast, images)

        images = self._sample_images
        few = sampled(images[:FIRST_SAMPLED])
        if not wanted and not best_explained(stored[: len(few)], few) >= EXPLAINED_WELL:
            return None
        sample = torch.cat([few, sampled(images[FIRST_SAMPLED:])])
        alignment = find_alignment(stored, sample)
        return alignment if alignment is not None and (wanted or alignment.worthwhile) else None

    def _looks(
        self,
        site: Site,
        backbone: Backbone,
        bands: Sequence[Sequence[Channel]],
        prefix: Prefix,
        policy: Policy,
        weights: Sequence[float],
        alignment: Alignment | None,
        passive: Callable[[], float] | None,
        check: Callable[[], None],
    ) -> Reading | None:
        """Looks at more and more images until the verdict is settled; None where the suspect overflows.

        weights: of each look (`Policy.weights`).
        passive: reads the p-value of the passive band; None for a codec without.
        """
        read = [BandReading(channels, loud=index == 0) for index, channels in enumerate(bands)]
        p_value, wanted = 1.0, policy.unpaid(weights[-1])
        for look, start in enumerate((0, *self.ends[:-1])):
            activations = prefix.at(look, partial(self._at_site, site, backbone, look))
            settled = False
            for band in read:
                if band.done:
                    continue
                agreements: list[Tensor] = []
                for channel in band.channels:
                    check()
                    with evaluating(backbone.model):
                        agreements.append(
                            channel.agreement(
                                backbone, activations, start, site.block, self._autocast, self._ranks
                            )
                        )
                    if not bool(torch.isfinite(agreements[-1]).all()):
                        return None
                band.add(agreements)
                if policy.exact:
                    p_value = min(p_value, weights[look] * band.test())
                    settled = policy.settled(p_value, excluded=False, hopeless=False)
                    if settled:
                        break
            if settled:
                break
            if policy.exact:
                live = [band for band in read if not band.done]
                for band in live:
                    band.exclude(policy.miss(look))
                if policy.power is not None and p_value > NO_MATCH_ABOVE:
                    for band in live:
                        band.done = band.hopeless(self.ends[-1], wanted, passive)
                given_up = all(band.excluded for band in read), all(band.done for band in read)
                if policy.settled(p_value, *given_up):
                    break
        return Reading(
            p_value,
            tuple(band.p_value for band in read if band.p_value is not None),
            read[0].errors,
            read[0].draws,
            all(band.excluded for band in read),
            alignment,
        )


def other_width(backbone: Backbone, site: Site) -> str:
    """That the suspect is wider or narrower than the marked model."""
    return f"the suspect has width {backbone.width}, the marked model {site.width}"
