"""Verifier: judges one suspect after another under one watermark and key."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from activemark_fast.backbone import Backbone, NotAViTError, non_finite_tensor
from activemark_fast.codec.codebooks import MAX_BOOKS
from activemark_fast.codec.passive import BAND_NAMES
from activemark_fast.commitment import Commitment, Opening
from activemark_fast.decision import Policy, decide, doubted
from activemark_fast.defaults import ALPHA
from activemark_fast.dress import plain_torch, unwrapped
from activemark_fast.following import computed_on
from activemark_fast.freedoms import alternatives
from activemark_fast.key import Key
from activemark_fast.looks import Prefix, Reader, UnreadableError, other_width
from activemark_fast.normalisation import Preprocess, known_normalisation
from activemark_fast.ranks import ALONE, Ranks
from activemark_fast.runtime import resolve_autocast, resolve_device
from activemark_fast.sequential import look_penalties
from activemark_fast.site import Site, sites_in
from activemark_fast.tracing import Register, RegisterError
from activemark_fast.triggers import ImageMismatchError, TriggerImages, check_digests, trigger_images
from activemark_fast.verdict import NO_MATCH_ABOVE, Decision, Verdict, default_tau, rank
from activemark_fast.watermark import IN_BANDS, Watermark, fingerprint


class Verifier:
    """Judges suspects under one watermark and key.

    All that does not depend on the suspect is checked and prepared once, when the object is made: the key,
    the trigger images and what they carry. The directions of a mark in bands depend on how the suspect's
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
        alpha: float = ALPHA,
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
        _check_settings(watermark, alpha, tau, power, align, commitment, register)
        self.device = resolve_device(device, torch.device("cpu"))
        autocast = resolve_autocast(precision, self.device)
        secret = Key.of(key)
        watermark.check(secret)  # before anything in it is relied on
        if register is not None:
            register.check(secret)
            if register.fingerprint != watermark.fingerprint:
                raise RegisterError("register: wanted that of the marked model, got another model's")
        tau = default_tau(watermark.bits) if tau is None else tau
        if not 0 <= tau < watermark.bits:
            raise ValueError(f"tau: wanted 0 to {watermark.bits - 1}, got {tau}")
        if align and watermark.alignment is None:
            raise ValueError("align: wanted a watermark with activations to align with, got one without")
        self._opening = None if commitment is None else Opening.of(commitment, secret, watermark)
        known = known_normalisation(watermark.preprocess) if watermark.in_bands else None
        preprocess = watermark.preprocess if known is None else known
        triggers = _triggers(images, watermark, secret, preprocess)
        codec = None if watermark.in_bands else watermark.restore_codec(secret).to(self.device)
        exact = codec is None or codec.exact
        power = power if exact else None
        self._reader = Reader(
            watermark,
            secret,
            codec,
            triggers,
            preprocess,
            power,
            register is not None,
            self.device,
            autocast,
            ranks,
        )
        self._policy = Policy(
            alpha=alpha,
            tau=tau,
            align=align if watermark.alignment is not None else False,
            power=power,
            bits=watermark.bits,
            books=MAX_BOOKS if codec is None else 1,
            bands=len(BAND_NAMES) if codec is None else 1,
            penalties=tuple(look_penalties(len(self._reader.ends))),
            original_rate=None if codec is None or codec.exact else float(codec.original_rate),
        )
        self.watermark = watermark
        self._own = watermark.site if codec is None else replace(watermark.site, taps=codec.taps)
        self._register = register
        self._architecture = architecture
        self._claims = 1 if commitment is None else len(commitment.claims)
        self._chosen = _chosen(watermark, exact, known is None, architecture)

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
        if all(computed_on(tensor.device) == self.device for tensor in view.encoder.parameters()):
            return view
        return view.of_copy(self.device)

    @plain_torch()
    @torch.no_grad()
    def read(
        self,
        backbone: Backbone,
        depth: int,
        prefix: Prefix | None = None,
        tries: int = 1,
        blocks: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Verdict:
        """The verdict on a model of the marked one's shape but for its width and depth, on `device`.

        `identical` is left False.

        Args:
            backbone: a view of the suspect.
            depth: how many of its blocks, from the first, hold the suspect's weights.
            prefix: of weights that are equal up to the site's block, where an earlier call had such.
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
        policy = replace(self._policy, alternatives=self._alternatives(blocks))
        prefixes = {own.block: Prefix() if prefix is None else prefix}
        verdicts = []
        for site in sites:
            before = prefixes.setdefault(site.block, Prefix())
            verdict = self._read_at(site, backbone, before, policy, tries * len(sites), check)
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
        return doubted(best, f"the suspect has {' and '.join(others)}") if others else best

    def sites(self, blocks: int, depth: int) -> list[Site]:
        """Where the mark may lie in a suspect of `blocks` blocks, the first `depth` of which can be run.

        The first is the place that the mark was given; there is none where the suspect is too short.
        """
        return sites_in(self._own, blocks, depth, self.watermark.in_bands)

    def _read_at(
        self,
        site: Site,
        backbone: Backbone,
        prefix: Prefix,
        policy: Policy,
        tries: int,
        check: Callable[[], None],
    ) -> Verdict:
        """See `read`; the taps of `site` can all be run."""
        try:
            reading = self._reader.read(site, backbone, prefix, policy, tries, check)
        except UnreadableError as error:
            return self._unreadable(backbone.model, str(error))
        decision, reason = decide(reading, policy)
        verdict = self._verdict(decision, reason, reading.errors[-1])
        if policy.exact:
            verdict = replace(
                verdict,
                p_value=min(1.0, reading.p_value),
                alternatives=policy.alternatives,
                bands=dict(zip(BAND_NAMES, reading.bands, strict=False)) if policy.alternatives else {},
            )
        alignment = reading.alignment
        if alignment is not None:
            kind = "scaling" if alignment.kind == "identity" else alignment.kind
            verdict = replace(
                verdict,
                reason=f"{reason} (after undoing a {kind} of its residual stream that explains "
                f"{alignment.explained:.3f})",
                aligned=kind,
                chosen=(*verdict.chosen, "activations to align with"),
            )
        if self._register is None:
            return verdict
        trace = self._reader.trace(self._register, site, backbone, alignment, policy.alpha)
        return replace(verdict, trace=trace)

    def _alternatives(self, blocks: int) -> dict[str, int]:
        """What is paid for a suspect of `blocks` blocks; nothing where all counts as chosen."""
        watermark = self.watermark
        if not watermark.in_bands:
            return {}
        choices = alternatives(watermark.site, watermark.bits, blocks, self._architecture is not None)
        return choices | ({"committed claim": self._claims} if self._claims > 1 else {})

    def misfit(self, backbone: Backbone, *, same_width: bool = False) -> str | None:
        """Why the suspect's shape does not allow the mark to be read, or None.

        same_width: it must have the marked model's width, though another can be read (`align`).
        """
        site, size = self.watermark.site, self.watermark.preprocess.size
        widens = self.watermark.in_bands and self._policy.align is not False and not same_width
        if backbone.width != site.width and not widens:
            return other_width(backbone, site)
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

    def inconclusive(self, reason: str) -> Verdict:
        """The verdict on a suspect that could not be read."""
        return self._verdict("inconclusive", reason)

    def _unreadable(self, suspect: nn.Module, reason: str) -> Verdict:
        # Looked for only now: a NaN where nothing is read (a head, a text tower) must not hide a mark.
        broken = non_finite_tensor(suspect)
        if broken is not None:
            reason = f"the suspect has NaN or infinite weights in {broken!r}"
        return self.inconclusive(reason)

    def _verdict(self, decision: Decision, reason: str, errors: np.ndarray | None = None) -> Verdict:
        """A verdict without a p-value."""
        errors = np.zeros(0, dtype=np.int64) if errors is None else errors
        return Verdict(
            decision,
            reason,
            errors,
            self.watermark.bits,
            self._policy.tau,
            float((errors <= self._policy.tau).mean()) if len(errors) else float("nan"),
            None,
            self._policy.alpha,
            self.watermark.codec,
            chosen=self._chosen,
            opening=self._opening,
        )


def _check_settings(
    watermark: object,
    alpha: object,
    tau: object,
    power: object,
    align: object,
    commitment: object,
    register: object,
) -> None:
    """Raises TypeError or ValueError for what `Verifier` cannot take, as far as one argument alone tells."""
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


def _triggers(images: object, watermark: Watermark, secret: Key, preprocess: Preprocess) -> TriggerImages:
    """The trigger images of the embedding. Raises ImageMismatchError for others."""
    if images is None and watermark.image_source != "key":
        raise ImageMismatchError(
            f"images: wanted the {len(watermark.digests)} images of the embedding "
            f"({watermark.image_source}), got none"
        )
    if images is not None and watermark.image_source == "key":
        raise ImageMismatchError("images: wanted none, for this mark's are made from the key, got some")
    old = watermark.version < IN_BANDS
    triggers = trigger_images(images, secret, preprocess, watermark.images, synthetic=old)
    if watermark.image_source != "key" or old:
        check_digests(triggers, watermark.digests)
    return triggers


def _chosen(
    watermark: Watermark, exact: bool, other_normalisation: bool, architecture: str | None
) -> tuple[str, ...]:
    """What the owner of `watermark` chose freely.

    exact: its codec has a p-value. other_normalisation: than the published ones.
    """
    return tuple(
        what
        for what, is_chosen in (
            ("the codec", not exact),
            (
                f"the site, channels and scale of a watermark of format {watermark.version}",
                exact and not watermark.in_bands,
            ),
            ("the hold-out images", watermark.image_source != "key"),
            ("the normalisation of images", watermark.in_bands and other_normalisation),
            ("the model's configuration", str(architecture).startswith("hf:")),
        )
        if is_chosen
    )
