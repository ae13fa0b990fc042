"""verify: does a suspect descend from the marked model?"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations_with_replacement
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from activemark_fast.align import (
    EXPLAINED_WELL,
    Alignment,
    best_explained,
    find_alignment,
    sample_images,
    site_sample,
)
from activemark_fast.backbone import Backbone, NotAViTError, evaluating, non_finite_tensor
from activemark_fast.codec import Codec, KeyedCodec
from activemark_fast.codec.codebooks import BANDS, MEASURED_IMAGES, SiteMeasure, codebooks, draw_sent
from activemark_fast.commitment import Commitment, Opening
from activemark_fast.dress import plain_torch, unwrapped
from activemark_fast.freedoms import EVIDENCE_AT, alternatives, known_normalisation, paid
from activemark_fast.key import Key
from activemark_fast.marking.ranks import ALONE, Ranks
from activemark_fast.marking.reading import Channel, row_scores, wrong_bits
from activemark_fast.marking.suffix import SiteActivations, site_activations
from activemark_fast.marking.traced import IMAGES as TRACED_IMAGES
from activemark_fast.marking.traced import row_answers, traced_channels
from activemark_fast.runtime import resolve_autocast, resolve_device
from activemark_fast.sequential import (
    WEAKEST_NATURAL,
    images_to_exclude,
    look_ends,
    look_penalties,
    mark_excluded,
)
from activemark_fast.site import Site
from activemark_fast.tracing import Register, RegisterError, Trace, trace_answers
from activemark_fast.triggers import ImageMismatchError, check_digests, holdout_images
from activemark_fast.verdict import (
    NO_MATCH_ABOVE,
    Decision,
    Verdict,
    default_tau,
    rank,
    sign_flip_p_value,
)
from activemark_fast.watermark import TWO_BANDS, Watermark, fingerprint

LEARNED_MATCH_RATE = 0.5
"""Detection rate from which a learned mark counts as found."""
LEARNED_ORIGINAL_RATE = 0.01
"""Detection rate on the unmarked original above which a learned codec can make no match."""
MISS = 1e-3
"""How often "no match" may be said of a mark as faint as `sequential` has it where all images are read."""
PLAIN_PRICE, ALIGNED_PRICE = 101 / 100, 101.0
"""What the p-values of the plain and of the aligned reading are multiplied with where both may be made.

Weighted Bonferroni: the inverses sum to 1, so the smaller product is a p-value whenever the second reading is
made, for whatever reason, and however the two depend on one another.
"""
MOST_MOVED = 4
"""Blocks more or fewer than the marked model's for which every place is tried that the mark may have."""
FIRST_SAMPLED = 4
"""Images on which no map must explain the suspect for it to be let go without a look at the others."""


def verify(
    suspect: nn.Module,
    watermark: Watermark,
    key: Key | bytes | str | os.PathLike[str],
    images: object = None,
    *,
    alpha: float = 1e-6,
    tau: int | None = None,
    align: bool | None = None,
    commitment: Commitment | None = None,
    exhaustive: bool = False,
    architecture: str | None = None,
    register: Register | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> Verdict:
    """Reads the mark from `suspect` and says whether it is there.

    Images are read in growing steps, in a secret random order, until a match is evidence even against a lying
    owner (`freedoms.EVIDENCE_AT`); what is not is read to the end. The p-value stays exact
    (`sequential.look_penalties`).

    The suspect runs no further than the last tap, in eval mode, and is left as it was. What is wrong with a
    suspect (another architecture, too few blocks, non-finite weights or outputs) makes the verdict
    "inconclusive", with the reason; what is wrong with the other arguments is an error.

    Args:
        suspect: a model with loaded weights. All of its image towers that fit are read, and the p-value pays
            for their number.
        watermark: what `embed` returned, or `Watermark.load`.
        key: the key it was made with, in any form `embed` takes.
        images: the hold-out images of the embedding; None, and nothing else, if they were made from the key.
        alpha: p-value at or below which a keyed mark is a match; above 0, at most 0.001.
        tau: most wrong bits of an image that counts as detected; by default what one fair-coin message in
            10,000 stays within (5 of 32 bits).
        align: whether to undo a permutation, rotation or scaling of the suspect's residual stream before
            reading (`align`). None: where the plain reading is no match and such a map explains the suspect
            well; the p-value pays for the second try. A suspect of another width is read so only.
        commitment: what the owner published; the verdict then tells whether this key and watermark are the
            committed ones, and since when.
        exhaustive: read all images of every suspect, so that detection rates can be compared.
        architecture: the model string by which the suspect was built, where that is the owner's word, such as
            the watermark's: heads, norms and the like, which weights leave open. The p-value pays for it.
        register: of the recipients of copies (`Embedding.register`, `Register.load`); `Verdict.trace` then
            tells whose copy the suspect was made from. A recipient is accused at `alpha`, all of them paid.
        device: where to compute; by default where the suspect is.
        precision: as in `embed`.

    Returns:
        The verdict. Keyed codec: "match" if the exact p-value is at most `alpha` after all that an owner
        could choose is paid for (`freedoms`); "no match" if it is above 0.001 and the images exclude a mark
        as faint as `sequential` has it; else, and where the mark has too few bits for `alpha`,
        "inconclusive". Learned codec: "match" if at least half of the images are detected, "inconclusive" if
        the codec also reads the unmarked original; there is no p-value.

    Raises:
        TypeError, ValueError: an argument is not as described.
        WatermarkError: `key` is not the key of `watermark`.
        RegisterError: `register` is of another key or another marked model.
        ImageMismatchError: `images` are not those of the embedding.
    """
    if not isinstance(suspect, nn.Module):
        raise TypeError(f"suspect: wanted a torch.nn.Module, got {type(suspect).__name__}")
    tensors = list(suspect.parameters())
    place = resolve_device(device, tensors[0].device if tensors else torch.device("cpu"))
    verifier = Verifier(
        watermark,
        key,
        images,
        alpha=alpha,
        tau=tau,
        align=align,
        commitment=commitment,
        architecture=architecture,
        power=None if exhaustive else 1.0,
        register=register,
        device=place,
        precision=precision,
    )
    return verifier.judge(suspect)


@dataclass(frozen=True, eq=False)
class _Reading:
    """What one reading of a suspect showed.

    Attributes:
        p_value: of all bands together, the reading's price paid; 1 for a codec without.
        bands: of each band alone, nothing paid.
        errors: (taps, n), wrong bits of each image's message, of the first band.
        excluded: whether the images exclude a mark that is as strong as `sequential` has it in either band.
        alignment: what was undone before.
    """

    p_value: float
    bands: tuple[float, ...]
    errors: np.ndarray
    excluded: bool
    alignment: Alignment | None


@dataclass(frozen=True, eq=False)
class _Means:
    """What reads one suspect: channels, those of each band together."""

    bands: list[list[Channel]]


class Verifier:
    """Judges suspects under one watermark and key.

    All that does not depend on the suspect is checked and prepared once, when the object is made: the key,
    the hold-out images and what they carry. The directions of a mark in bands depend on how the suspect's
    own tokens vary, so they are made for each suspect.

    Args:
        watermark, key, images, alpha, tau, align, commitment, register, precision: as `verify` takes them.
        architecture: the model string by which suspects are built, where it is the watermark's own word; None
            where somebody else says how suspects are run. The p-value pays for it, and a configuration that
            the owner may have written (`hf:`) counts as chosen.
        power: None to read every image. Otherwise the images are read in a secret random order and in growing
            steps, until the verdict is settled: 1, as `verify` does; below 1, a match at `alpha`, or no sign
            of a mark where a suspect with the faintest mark that `sequential` has would be given up with a
            probability of at most 1 - `power`. Above 0. The p-value stays exact
            (`sequential.look_penalties`). A codec without p-value reads all.
        device: where to compute; by default the CPU.
        ranks: processes that judge the same suspects together, each with a verifier like this one.

    Raises:
        TypeError, ValueError, WatermarkError, ImageMismatchError: as `verify` does.
    """

    @plain_torch()
    def __init__(
        self,
        watermark: Watermark,
        key: Key | bytes | str | os.PathLike[str],
        images: object = None,
        *,
        alpha: float = 1e-6,
        tau: int | None = None,
        power: float | None = None,
        align: bool | None = None,
        commitment: Commitment | None = None,
        architecture: str | None = None,
        register: Register | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
        ranks: Ranks = ALONE,
    ) -> None:
        if not isinstance(watermark, Watermark):
            raise TypeError(f"watermark: wanted a Watermark, got {type(watermark).__name__}")
        if not isinstance(alpha, (int, float)):
            raise TypeError(f"alpha: wanted a number, got {type(alpha).__name__}")
        if not 0 < alpha <= NO_MATCH_ABOVE:
            raise ValueError(f"alpha: wanted above 0 and at most {NO_MATCH_ABOVE}, got {alpha}")
        if tau is not None and (not isinstance(tau, int) or isinstance(tau, bool)):
            raise TypeError(f"tau: wanted int, got {type(tau).__name__}")
        if power is not None and not isinstance(power, (int, float)):
            raise TypeError(f"power: wanted a number, got {type(power).__name__}")
        if power is not None and not 0 < power <= 1:
            raise ValueError(f"power: wanted above 0 and at most 1, got {power}")
        if align is not None and not isinstance(align, bool):
            raise TypeError(f"align: wanted True, False or None, got {type(align).__name__}")
        if commitment is not None and not isinstance(commitment, Commitment):
            raise TypeError(f"commitment: wanted a Commitment, got {type(commitment).__name__}")
        if register is not None and not isinstance(register, Register):
            raise TypeError(f"register: wanted a Register, got {type(register).__name__}")
        self.device = resolve_device(device, torch.device("cpu"))
        self._autocast = resolve_autocast(precision, self.device)
        self._ranks = ranks
        secret = Key.of(key)
        watermark.check(secret)  # before anything in it is relied on
        if register is not None:
            register.check(secret)
            if register.fingerprint != watermark.fingerprint:
                raise RegisterError("register: wanted that of the marked model, got another model's")
        self._register = register
        self.watermark = watermark
        self.alpha = alpha
        self.tau = default_tau(watermark.bits) if tau is None else tau
        if not 0 <= self.tau < watermark.bits:
            raise ValueError(f"tau: wanted 0 to {watermark.bits - 1}, got {tau}")
        if align and watermark.alignment is None:
            raise ValueError("align: wanted a watermark with activations to align with, got one without")
        self._align = align if watermark.alignment is not None else False
        self._opening = None if commitment is None else Opening.of(commitment, secret, watermark)
        self._secret = secret
        if images is None and watermark.image_source != "key":
            raise ImageMismatchError(
                f"images: wanted the {len(watermark.digests)} images of the embedding "
                f"({watermark.image_source}), got none"
            )
        if images is not None and watermark.image_source == "key":
            raise ImageMismatchError("images: wanted none, for this mark's are made from the key, got some")
        known = known_normalisation(watermark.preprocess)
        self._normalisation_chosen = known is None and watermark.two_bands
        self._architecture = architecture
        self._claims = 1 if commitment is None else len(commitment.claims)
        self._preprocess = known if known is not None and watermark.two_bands else watermark.preprocess
        old = watermark.version < TWO_BANDS
        holdout = holdout_images(images, secret, self._preprocess, watermark.images, synthetic=old)
        if watermark.image_source != "key" or old:
            check_digests(holdout, watermark.digests)
        count, bits = len(holdout.pixels), watermark.bits
        self._codec: Codec | None = None
        if watermark.two_bands:
            self._stretched = secret.stretched()
            sent = draw_sent(self._stretched, "verify", count, bits)
        else:
            self._codec = watermark.restore_codec(secret).to(self.device)
            sent = [torch.from_numpy(secret.stream("messages/verify").bits((count, 1, bits)))]
        self._own = watermark.site if self._codec is None else replace(watermark.site, taps=self._codec.taps)
        self._exact = self._codec is None or self._codec.exact
        self._power = power if self._exact else None
        if self._power is None:
            order, self._ends = torch.arange(count), [count]
        else:  # as an owner's folder is sorted, its first images need not be like the others
            order, self._ends = torch.from_numpy(secret.stream("looks").permutation(count)), look_ends(count)
        self._penalties = look_penalties(len(self._ends))
        self._pixels = holdout.pixels[order].to(self.device)
        self._measured_pixels = holdout.pixels[:MEASURED_IMAGES].to(self.device)
        self._sent = [part[order].to(self.device) for part in sent]
        if register is not None:
            pixels = holdout_images(None, secret, watermark.preprocess, TRACED_IMAGES).pixels
            self._traced_pixels = pixels.to(self.device)

    @plain_torch()
    @torch.no_grad()
    def judge(self, suspect: nn.Module) -> Verdict:
        """The verdict on one suspect; see `verify`.

        Raises:
            TypeError: `suspect` is not a module.
        """
        if not isinstance(suspect, nn.Module):
            raise TypeError(f"suspect: wanted a torch.nn.Module, got {type(suspect).__name__}")
        suspect = unwrapped(suspect)
        try:
            first = Backbone(suspect)
        except NotAViTError as error:
            return self._unreadable(suspect, f"the suspect cannot be read: {error}")
        views = [first, *self._other_towers(suspect, first)]
        fitting = [view for view in views if self.misfit(view) is None]
        if not fitting:
            return self.inconclusive(str(self.misfit(first)))
        verdicts = [
            self.read(self._here(view), view.depth, tries=len(fitting), blocks=view.depth) for view in fitting
        ]
        verdict = min(verdicts, key=rank)
        return replace(
            verdict,
            identical=verdict.images > 0 and fingerprint(suspect) == self.watermark.fingerprint,
        )

    def _other_towers(self, suspect: nn.Module, first: Backbone) -> Iterator[Backbone]:
        """Views of the image towers of a suspect besides the first one, as far as they can be seen."""
        for tower in first.towers:
            if tower != first.tower:
                with suppress(NotAViTError):
                    yield Backbone(suspect, tower=tower)

    def _here(self, view: Backbone) -> Backbone:
        """The view, or one of a copy of its tower on the verifier's device."""
        if all(tensor.device == self.device for tensor in view.encoder.parameters()):
            return view
        return Backbone(copy.deepcopy(view.encoder).to(self.device), image_size=view.image_size, tower="")

    @plain_torch()
    @torch.no_grad()
    def read(
        self,
        backbone: Backbone,
        depth: int,
        prefix: list[SiteActivations] | None = None,
        tries: int = 1,
        blocks: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Verdict:
        """The verdict on a model of the marked one's shape but for its width and depth, on `device`.

        `identical` is left False.

        Args:
            backbone: a view of the suspect.
            depth: how many of its blocks, from the first, hold the suspect's weights.
            prefix: the activations of each look's images at the site, in order, as far as an earlier call got
                them from weights that were equal up to the site's block; those that are needed are added.
            tries: of how many readings of one suspect the best is reported; the p-value pays for them.
            blocks: how many blocks the suspect has in all; by default as many as the marked model. Where it
                has others, the mark is looked for at all of `sites`, which the p-value pays for, too.
            check: called now and then; what it raises ends the reading.
        """
        own = self._own
        blocks = own.depth if blocks is None else blocks
        sites = self.sites(blocks, depth)
        if not sites:
            return self.inconclusive(
                f"the suspect has {depth} blocks, the mark is first read after {own.taps[0] + 1}"
            )
        choices = self._choices(blocks)
        verdicts = []
        known = {own.block: [] if prefix is None else prefix}
        for site in sites:
            before = known.setdefault(site.block, [])
            verdict = self._read_at(site, backbone, before, tries * len(sites), choices, check)
            if site.block != own.block or site.taps != own.taps[: len(site.taps)]:
                at = ", ".join(str(tap + 1) for tap in site.taps)
                verdict = replace(
                    verdict,
                    reason=f"{verdict.reason} (written after block {site.block + 1} and read after {at}: it "
                    f"has {blocks} blocks, the marked model {own.depth})",
                )
            verdicts.append(verdict)
            if verdict.decision == "match":
                break
        best = min(verdicts, key=rank)
        others = [] if own.depth in (0, blocks) else [f"{blocks} blocks, the marked model {own.depth}"]
        if backbone.width != own.width:
            others.append(f"width {backbone.width}, the marked model {own.width}")
        if best.decision == "no match" and others:
            reason = f"no sign of the mark, but the suspect has {' and '.join(others)}"
            return replace(best, decision="inconclusive", reason=reason)
        return best

    def sites(self, blocks: int, depth: int) -> list[Site]:
        """Where the mark may lie in a suspect of `blocks` blocks of which the first `depth` can be run.

        Blocks that were dropped, doubled or put in before the site move it and its taps by as many; those
        between the site and a tap, that tap. Up to `MOST_MOVED` blocks, every way there is; of more, all in
        one place or spread evenly. The first is the place that the mark was given, and the only one in a
        suspect of less than half of the marked model's blocks; there is none where the suspect is too short.
        """
        own = self._own
        more = blocks - own.depth
        moves = [(0,) * (1 + len(own.taps))]
        # An owner who states another depth chooses among no more than `freedoms.DEPTHS`: not endless ones.
        if self._codec is None and more and own.depth <= 2 * blocks:
            steps = range(abs(more) + 1) if abs(more) <= MOST_MOVED else (0, abs(more))
            sign = 1 if more > 0 else -1
            moves = [
                tuple(sign * move for move in ways)
                for ways in combinations_with_replacement(steps, 1 + len(own.taps))
            ]
            moves.append(
                tuple(round((place + 1) * blocks / own.depth) - 1 - place for place in (own.block, *own.taps))
            )
        found = {}
        for move, *tap_moves in moves:
            taps = (tap + moved for tap, moved in zip(own.taps, tap_moves, strict=True))
            places = (own.block + move, *(tap for tap in taps if tap < depth))
            rises = all(before < after for before, after in zip((-1, *places), places, strict=False))
            if rises and len(places) > 1:
                found[places] = replace(own, block=places[0], taps=places[1:])
        return list(found.values())

    def _read_at(
        self,
        site: Site,
        backbone: Backbone,
        prefix: list[SiteActivations],
        tries: int,
        choices: Mapping[str, int],
        check: Callable[[], None],
    ) -> Verdict:
        """See `read`; the taps of `site` can all be run."""
        measured = None
        if self._codec is None:
            if not prefix:
                prefix.append(self._at_site(site, backbone, self._measured_pixels))
            measured = SiteMeasure.of(prefix[0].output, site.prefix_tokens)
            if not measured.usable:
                return self._unreadable(backbone.model, "the suspect puts out NaN or infinite activations")
        readings = []
        widened = backbone.width != site.width
        if self._align is not True and not widened:
            price = tries * (1.0 if self._align is False else PLAIN_PRICE)
            means = self._means(site, measured, None)
            plain = self._reading(site, backbone, means, prefix, price, choices, None, check)
            if plain is None:
                return self._unreadable(backbone.model, "the suspect puts out NaN or infinite activations")
            readings.append(plain)
        if not readings or (self._align is None and not self._matches(readings[0].p_value, choices)):
            alignment = self._alignment(site, backbone)
            if alignment is not None and self._exact:
                price = tries * (1.0 if self._align else ALIGNED_PRICE)
                means = self._means(site, measured, alignment)
                aligned = self._reading(site, backbone, means, prefix, price, choices, alignment, check)
                readings += [] if aligned is None else [aligned]
        if not readings:
            reason = "the suspect's activations are constant or not finite"
            if widened:
                reason = f"{self._other_width(backbone)}, and no map between the two explains it"
            return self._unreadable(backbone.model, reason)
        reading = min(readings, key=lambda reading: reading.p_value)
        verdict = self._decide(reading, choices)
        if self._register is None:
            return verdict
        return replace(verdict, trace=self._trace(self._register, site, backbone, reading.alignment))

    def _trace(
        self, register: Register, site: Site, backbone: Backbone, alignment: Alignment | None
    ) -> Trace:
        """What the suspect tells of the recipients, read at `site` after undoing `alignment`."""
        bits = self.watermark.bits
        channels = traced_channels(self._stretched, site, bits, register.measured, self.device)
        if alignment is not None:
            matrix, scale = alignment.matrix.to(self.device), alignment.scale
            channels = [
                Channel(channel.codec.aligned(matrix, scale), channel.sent)
                for channel in channels
                if isinstance(channel.codec, KeyedCodec)
            ]
        read = self._at_site(site, backbone, self._traced_pixels)
        answers = np.full(register.reference.shape, np.nan)
        with evaluating(backbone.model):
            told = row_answers(backbone, channels, read, site.block, self._autocast)
        answers[: len(site.taps)] = told.numpy()
        return trace_answers(register, self._secret, answers, self.alpha)

    def _at_site(self, site: Site, backbone: Backbone, pixels: Tensor) -> SiteActivations:
        with evaluating(backbone.model):
            return site_activations(backbone, pixels, site.block, self._autocast)

    def _means(self, site: Site, measured: SiteMeasure | None, alignment: Alignment | None) -> _Means:
        """What reads a suspect at `site`, after undoing `alignment`. `measured`: on it, for two bands."""
        if measured is None:
            assert self._codec is not None
            codecs: list[Codec] = [copy.copy(self._codec)]
            counts = [1]
        else:
            back = measured if alignment is None else measured.turned_back(alignment.matrix)
            codecs = list(codebooks(self._stretched, site, self.watermark.bits, back))
            counts = [band.books for band in BANDS]
        channels = []
        for codec, sent in zip(codecs, self._sent, strict=True):
            codec = codec.to(self.device)
            if alignment is not None and isinstance(codec, KeyedCodec):
                scale = alignment.scale if measured is None else 1.0  # measured on the suspect already
                codec = codec.aligned(alignment.matrix.to(self.device), scale)
            codec.taps = site.taps
            channels.append(Channel(codec, sent))
        ends = np.cumsum(counts)
        return _Means([channels[end - count : end] for count, end in zip(counts, ends, strict=True)])

    def _choices(self, blocks: int) -> dict[str, int]:
        """What is paid for a suspect of `blocks` blocks; nothing where all counts as chosen."""
        watermark = self.watermark
        if not watermark.two_bands:
            return {}
        choices = alternatives(watermark.site, watermark.bits, blocks, self._architecture is not None)
        return choices | ({"committed claim": self._claims} if self._claims > 1 else {})

    def _matches(self, p_value: float, choices: Mapping[str, int]) -> bool:
        """Whether a p-value is a match's, after what an owner could choose is paid for."""
        return paid(p_value, choices) <= self.alpha

    def _settled(self, p_value: float, excluded: bool, choices: Mapping[str, int]) -> bool:
        """Whether no further look is needed."""
        if self._power == 1:
            return paid(p_value, choices) <= min(self.alpha, EVIDENCE_AT)
        given_up = p_value > NO_MATCH_ABOVE and excluded
        return self._power is not None and (given_up or self._matches(p_value, choices))

    @cached_property
    def _sample_images(self) -> Tensor:
        """Made when the first suspect has to be aligned, and then kept."""
        images = sample_images(self._secret, self.watermark.site, self._preprocess)
        return images.to(self.device)

    @cached_property
    def _original_sample(self) -> Tensor | None:
        """What the watermark keeps of the original to align with, where it is computed with."""
        stored = self.watermark.alignment
        return None if stored is None else stored.to(self.device).float()

    def _alignment(self, site: Site, backbone: Backbone) -> Alignment | None:
        """How the suspect's residual stream lies to the original's; None if it is not worth a reading."""
        stored = self._original_sample
        if stored is None:
            return None
        preprocess = self._preprocess

        def sampled(images: Tensor) -> Tensor:
            with evaluating(backbone.model):
                return site_sample(backbone, self._secret, site, preprocess, self._autocast, images)

        images = self._sample_images
        few = sampled(images[:FIRST_SAMPLED])
        if self._align is None and not best_explained(stored[: len(few)], few) >= EXPLAINED_WELL:
            return None
        sample = torch.cat([few, sampled(images[FIRST_SAMPLED:])])
        alignment = find_alignment(stored, sample)
        wanted = alignment is not None and (self._align is True or alignment.worthwhile)
        return alignment if wanted else None

    def _reading(
        self,
        site: Site,
        backbone: Backbone,
        means: _Means,
        prefix: list[SiteActivations],
        price: float,
        choices: Mapping[str, int],
        alignment: Alignment | None,
        check: Callable[[], None],
    ) -> _Reading | None:
        """Looks at more and more images until the verdict is settled; None where the suspect overflows.

        price: what a p-value is multiplied with besides the penalty of its look and the number of bands.
        """
        block = site.block
        ahead = int(self._codec is None)  # what comes first in `prefix` tells how the tokens vary
        parts: list[list[list[Tensor]]] = [[[] for _ in band] for band in means.bands]
        p_value = 1.0
        start = 0
        for look, (end, penalty) in enumerate(zip(self._ends, self._penalties, strict=True)):
            if ahead + look == len(prefix):
                prefix.append(self._at_site(site, backbone, self._pixels[start:end]))
            with evaluating(backbone.model):
                for band, kept in zip(means.bands, parts, strict=True):
                    for channel, seen in zip(band, kept, strict=True):
                        check()
                        at = prefix[ahead + look]
                        seen.append(
                            channel.agreement(backbone, at, start, block, self._autocast, self._ranks)
                        )
                        if not bool(torch.isfinite(seen[-1]).all()):
                            return None
            agreements = [[torch.cat(seen, dim=1) for seen in kept] for kept in parts]
            errors = wrong_bits(agreements[0][0]).cpu().numpy()  # (taps, n)
            bands: tuple[float, ...] = ()
            excluded = False
            if self._exact:
                bands = tuple(sign_flip_p_value(row_scores(kept)) for kept in agreements)
                p_value = min(p_value, price * penalty * len(bands) * min(bands))
                miss = self._miss(penalty)
                excluded = mark_excluded(self._agreement(errors), miss) and all(
                    mark_excluded(_single(kept), miss, WEAKEST_NATURAL) for kept in agreements[1:]
                )
                if self._settled(p_value, excluded, choices):
                    break
            start = end
        return _Reading(p_value, bands, errors, excluded, alignment)

    def _decide(self, reading: _Reading, choices: Mapping[str, int]) -> Verdict:
        if not self._exact:
            return self._decide_learned(reading.errors[-1])
        taps, images = reading.errors.shape
        p_value, alignment = min(1.0, reading.p_value), reading.alignment
        books = max(band.books for band in BANDS) if self._codec is None else 1
        bits = taps * self.watermark.bits * books
        price = 1.0 if self._align is not None else ALIGNED_PRICE if alignment is not None else PLAIN_PRICE
        decision: Decision
        if self._matches(p_value, choices):
            decision, reason = "match", "the suspect carries the mark"
        elif not self._matches(price * self._penalties[-1] * len(reading.bands) * 2.0**-bits, choices):
            decision = "inconclusive"
            reason = (
                f"{bits} bits are too few for a match at alpha = {self.alpha:g}, whatever they read: "
                "more bits or taps would be needed"
            )
        elif p_value > NO_MATCH_ABOVE and reading.excluded:
            decision, reason = "no match", "no sign of the mark"
        elif p_value > NO_MATCH_ABOVE:
            decision = "inconclusive"
            enough = images_to_exclude(self._agreement(reading.errors), self._miss(self._penalties[-1]))
            more = "more bits" if enough is None else f"about {enough} images, or more bits,"
            reason = f"no sign of the mark, but {images} images are too few to exclude one: {more} would do"
        else:
            decision = "inconclusive"
            reason = "signs of the mark, but not enough to exclude chance: more hold-out images or bits might"
        verdict = self._verdict(decision, reason, reading.errors[-1], p_value, reading.bands, choices)
        if alignment is None:
            return verdict
        kind = "scaling" if alignment.kind == "identity" else alignment.kind
        reason += f" (after undoing a {kind} of its residual stream that explains {alignment.explained:.3f})"
        chosen = (*verdict.chosen, "activations to align with")
        return replace(verdict, reason=reason, aligned=kind, chosen=chosen)

    def misfit(self, backbone: Backbone, *, same_width: bool = False) -> str | None:
        """Why the suspect's shape does not allow the mark to be read, or None.

        same_width: it must have the marked model's width, though another can be read (`align`).
        """
        site, size = self.watermark.site, self.watermark.preprocess.size
        widens = self._codec is None and self._align is not False and not same_width
        if backbone.width != site.width and not widens:
            return self._other_width(backbone)
        if backbone.image_size != size or backbone.num_tokens != site.num_tokens:
            return (
                f"the suspect takes images of {backbone.image_size} as {backbone.num_tokens} tokens, the "
                f"marked model {size} as {site.num_tokens}"
            )
        if backbone.prefix_tokens != site.prefix_tokens:
            return (
                f"the suspect has {backbone.prefix_tokens} tokens before its patches, the marked model "
                f"{site.prefix_tokens}"
            )
        return None

    def _other_width(self, backbone: Backbone) -> str:
        return f"the suspect has width {backbone.width}, the marked model {self.watermark.site.width}"

    def inconclusive(self, reason: str) -> Verdict:
        """The verdict on a suspect that could not be read."""
        return self._verdict("inconclusive", reason)

    def _agreement(self, errors: np.ndarray) -> np.ndarray:
        """(n, taps), mean over the bits of +1 for a right bit and -1 for a wrong one."""
        return np.asarray(1 - 2 * errors.T / self.watermark.bits)

    def _miss(self, penalty: int) -> float:
        """The share of all misses that one look may make."""
        return MISS if self._power in (None, 1) else (1 - self._power) / penalty

    def _decide_learned(self, errors: np.ndarray) -> Verdict:
        found = float((errors <= self.tau).mean()) >= LEARNED_MATCH_RATE
        share = "at least" if found else "less than"
        reason = f"the learned codec reads the message from {share} half of the images"
        assert self._codec is not None
        original_rate = float(self._codec.original_rate)
        if found and original_rate > LEARNED_ORIGINAL_RATE:
            reason += (
                f", but also from the unmarked original (R = {original_rate:.3f}), so this proves nothing"
            )
            return self._verdict("inconclusive", reason, errors)
        return self._verdict("match" if found else "no match", reason, errors)

    def _unreadable(self, suspect: nn.Module, reason: str) -> Verdict:
        # Looked for only now: a NaN where nothing is read (a head, a text tower) must not hide a mark.
        broken = non_finite_tensor(suspect)
        if broken is not None:
            reason = f"the suspect has NaN or infinite weights in {broken!r}"
        return self.inconclusive(reason)

    def _verdict(
        self,
        decision: Decision,
        reason: str,
        errors: np.ndarray | None = None,
        p_value: float | None = None,
        bands: tuple[float, ...] = (),
        choices: Mapping[str, int] = MappingProxyType({}),
    ) -> Verdict:
        errors = np.zeros(0, dtype=np.int64) if errors is None else errors
        rate = float((errors <= self.tau).mean()) if len(errors) else float("nan")
        watermark = self.watermark
        chosen = [] if self._exact else ["the codec"]
        if self._exact and not watermark.two_bands:
            chosen.append(f"the site, channels and scale of a watermark of format {watermark.version}")
        if watermark.image_source != "key":
            chosen.append("the hold-out images")
        if self._normalisation_chosen:
            chosen.append("the normalisation of images")
        if str(self._architecture).startswith("hf:"):
            chosen.append("the model's configuration")
        return Verdict(
            decision,
            reason,
            errors,
            watermark.bits,
            self.tau,
            rate,
            p_value,
            self.alpha,
            watermark.codec,
            chosen=tuple(chosen),
            opening=self._opening,
            alternatives=choices,
            bands={band.name: p for band, p in zip(BANDS, bands, strict=False)} if choices else {},
        )


def _single(agreements: Sequence[Tensor]) -> np.ndarray:
    """Of a band's (taps, n, reads, M): (n, taps), the mean of +1 for a right bit and -1 for a wrong one."""
    right = torch.stack([torch.sign(part).double().mean(dim=(2, 3)) for part in agreements])
    return np.asarray(right.mean(dim=0).T.cpu())
