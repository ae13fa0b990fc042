"""embed: mark a model so that `verify` can later recognise what descends from it."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from activemark_fast.align import site_sample
from activemark_fast.backbone import Backbone, non_finite_tensor
from activemark_fast.decision import check_bits
from activemark_fast.defaults import FIDELITY
from activemark_fast.dress import copied, plain_torch, unwrapped
from activemark_fast.following import placed
from activemark_fast.key import Key
from activemark_fast.marking.engine import Engine
from activemark_fast.marking.mark_keyed import mark_keyed
from activemark_fast.marking.mark_learned import mark_learned
from activemark_fast.marking.quality import Quality
from activemark_fast.marking.resume import TrainingFile
from activemark_fast.marking.scratch import Scratch
from activemark_fast.marking.settings import Settings
from activemark_fast.marking.subject import (
    FITTED_IMAGES,
    HELD_IMAGES,
    Marked,
    Subject,
    check_writable,
    prepare,
)
from activemark_fast.progress import Progress
from activemark_fast.ranks import Ranks
from activemark_fast.runtime import resolve_device
from activemark_fast.tracing import Register
from activemark_fast.triggers import CleanImages, TriggerImages, clean_images, trigger_images
from activemark_fast.verifier import Verifier
from activemark_fast.watermark import TRIGGER_IMAGES, Watermark, fingerprint

POWER = 0.999
"""Of the verification that an embedding ends with: it reads images until the verdict is settled."""


class UnverifiedMarkError(RuntimeError):
    """The finished mark cannot be verified, so it is not handed out; the message says why.

    Attributes:
        model, watermark: what was made, for attacks and comparisons, to which a weak mark of a stranger is as
            good; the model is unmarked where it was to be marked in place.
    """

    def __init__(self, message: str, model: nn.Module, watermark: Watermark) -> None:
        super().__init__(message)
        self.model = model
        self.watermark = watermark


@dataclass(frozen=True, eq=False)
class Embedding:
    """What `embed` returns.

    Attributes:
        model: the marked model.
        watermark: what `verify` needs besides the key.
        quality: how the mark and the model do on images that were kept from marking.
        clean_source: which natural images the model's own features were protected on, and compared on.
        site_reason: why the mark is where it is.
        steps: gradient steps taken; 0 for the keyed codec, which is edited in.
        history: one dict for every strength of the edit that was tried and every check during training.
        engine: how it was computed and why so; `peak_bytes` was told before the edit began.
        seconds: wall time of `embed`.
        register: makes the copies of recipients and tells them apart; None without recipients. With them,
            `quality` is that of a copy with a codeword that is nobody's, and `model` is no one's copy.
    """

    model: nn.Module
    watermark: Watermark
    quality: Quality
    clean_source: str
    site_reason: str
    steps: int
    history: list[dict[str, float | str]] = field(repr=False)
    engine: Engine
    seconds: float
    register: Register | None = field(default=None, repr=False)

    @property
    def fidelity(self) -> float:
        """Lowest mean cosine of the marked model's features to the original's (`Fidelity.mean`)."""
        return self.quality.fidelity


@plain_torch()
def embed(
    model: nn.Module,
    key: Key | bytes | str | os.PathLike[str],
    images: object = None,
    *,
    clean: object = None,
    codec: Literal["keyed", "learned"] = "keyed",
    bits: int = 32,
    axis: str = "token",
    block: int | None = None,
    fidelity: float = FIDELITY,
    max_steps: int = 1000,
    tower: str | None = None,
    inplace: bool = False,
    architecture: str | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    compile: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    recipients: Sequence[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> Embedding:
    """Marks `model` (arXiv 2510.04966, with keyed codebooks and a closed-form edit by default).

    Args:
        model: an image tower, or a model that holds one (`Backbone` says which). It is not changed, unless
            `inplace`. What `torch.compile` or `DataParallel` wraps is marked, and returned without the
            wrapper, unless `inplace`.
        key: the owner's secret: bytes, a passphrase (str), a key file (Path) or a `Key`.
        images: trigger images to read the mark on (`trigger_images` says in which forms), up to 128;
            verification needs them again. Without any they are cut from photographs by the key, which is
            better evidence: own images are something the owner chose.
        clean: natural images of the kind the model is used on, 200 or so, in the same forms. The mark is
            solved on three quarters of them, so that it stays away from what they excite; the fidelity is
            measured on the others. Photographs that ship with the package stand beside them, or alone.
        codec: "keyed" (edited in, in closed form), or "learned" (the paper's encoder and decoder, trained;
            no exact p-value).
        bits: message length, a multiple of 8 from 8 to 256. For a keyed mark 8 are too few to be a match, and
            16 where the model has room for one tap only.
        axis: what the learned codec overwrites: "token" or "channel".
        block: the block to inject after, from 0; by default the one where massive activations emerge.
        fidelity: lowest mean cosine to the original's features, of class token, mean patch and single
            patches, on clean images that were held out; above 0 and below 1. Their 5th percentile may lie
            1 / 0.3 times as far from 1. A keyed mark is as strong as that allows.
        max_steps: upper bound on gradient steps, which only the learned codec takes.
        tower: dotted name of the module in `model` to mark, where several take images; by default the one
            with the longest list of blocks. Nothing else of the model is run, or copied but to be returned.
        inplace: write the mark into `model` itself, at the very end. A keyed mark then takes no copy of the
            model, only of the matrices that change.
        architecture: model string (`load_model`) to store in the watermark, so that the command line can
            build the suspect.
        device: where to compute; by default where the model is.
        precision: "auto" (bf16 on CUDA and on CPUs that multiply it, else fp32), "fp32", "bf16" or "fp16";
            weights stay in their own dtype.
        compile: how gradient steps are run: "eager", "regional" (by `torch.compile`, alike blocks once),
            "graph" (replayed as a CUDA graph), or "auto": whichever ends them soonest (`marking.steps` says
            how that is found out; on a CPU it is "eager"). The edit is run eager.
        checkpoint: file that gradient training is saved to, about once a minute, until it has ended. If it is
            there, the training goes on from it, to the result it would have had. An edit takes seconds and
            starts anew.
        recipients: names of those who get copies of their own (`tracing.check_names` says which can be
            names): `Embedding.register` then makes the copies, and `verify` tells with it whose copy a
            suspect was made from. A fifth of the fidelity that may be lost goes to that. Keyed codec only.
        work: folder where activations and changes wait on disk, not in memory. It stays, and if it is there,
            an edit that was cut off goes on from it, to the result it would have had. It is one embedding's
            at a time. Whoever reads it learns where the mark lies: delete it afterwards. Keyed codec only.
        group: processes of torch.distributed that mark the model together, each of which calls this with the
            same arguments and gets the same mark, bit for bit that of one process on such a machine. Images
            are split among them. Keyed codec only, without `work`.
        progress: show progress bars on standard error, and how much memory the marking will take.

    Returns:
        The marked model, its watermark and what was measured. The same model, key, images and settings give
        the same weights, bit for bit, on one machine's CPU with as many threads.

    Raises:
        TypeError, ValueError: an argument is not as described; the model has non-finite weights, no image
            tower of blocks that could be marked (`NotAViTError`), no room for the mark (`SiteError`) or
            weights that cannot be written to.
        UnverifiedMarkError: `verify` does not find the finished mark. The model is as it was.

    Warns:
        RuntimeWarning: targets were not reached; it says which and by how much, and what would help.
    """
    started = time.perf_counter()
    settings = Settings(
        *(codec, bits, axis, block, fidelity, max_steps, architecture, precision, compile),
        recipients,
        work is not None,
        group is not None,
    )
    given, model = model, unwrapped(model) if isinstance(model, nn.Module) else model
    original = Backbone(model, tower=tower)
    _check_model(model, original)
    secret = Key.of(key)
    device = resolve_device(device, original.device)
    settings.check_for(original, device)
    triggers = trigger_images(images, secret, original.preprocess, TRIGGER_IMAGES)
    if settings.keyed:  # after block 0 there is room for most taps
        check_bits(bits, block or 0, original.depth, triggers.count)
    natural = clean_images(clean, original.preprocess, FITTED_IMAGES, HELD_IMAGES)
    inputs = partial(_inputs, secret, original, model, settings, triggers, natural, device)
    saved = None if checkpoint is None else TrainingFile(_path("checkpoint", checkpoint), secret, inputs())
    resumed = None if saved is None else saved.load()
    scratch = None if work is None else Scratch(_path("work", work), secret, inputs())
    ranks = Ranks(group)
    shared = inplace and settings.keyed and device == original.device

    with nullcontext() if scratch is None else scratch.alone(), Progress(progress) as bar:
        subject = prepare(original, settings, triggers, natural, device, shared, scratch, ranks, bar)
        source = natural.source
        del natural, inputs  # their pixels
        alignment = None
        if settings.keyed:
            check_bits(bits, subject.placement.site.block, original.depth, triggers.count)
            bar.note(f"embed: {subject.engine}")
            alignment = _sample(subject, original, secret)
            marked = mark_keyed(subject, secret, settings, bar)
        else:
            reference = original.of_copy(device)
            marked = mark_learned(subject, reference, secret, settings, saved, resumed, bar)
    encoder = _undressed(subject, original)
    with _released(model, original, encoder, inplace) as released:
        watermark = _seal(released, original, subject, marked, secret, settings, triggers, alignment)
        register = _register_of(released, original, marked, secret)
        _check_verified(released, watermark, secret, triggers, device, precision, ranks)
    _warn_of_missed_targets(marked.quality, fidelity)
    if inplace:
        _write_back(encoder, original.encoder)
    if saved is not None:
        saved.remove()
    return Embedding(
        given if inplace else released,
        watermark,
        marked.quality,
        source,
        _site_reason(subject, original),
        marked.steps,
        marked.history,
        marked.engine,
        time.perf_counter() - started,
        register,
    )


def _inputs(
    secret: Key,
    original: Backbone,
    model: nn.Module,
    settings: Settings,
    triggers: TriggerImages,
    natural: CleanImages,
    device: torch.device,
) -> dict[str, object]:
    """All that an embedding depends on besides the key: what it goes on from must be of the same."""
    images = [triggers.pixels, natural.fitted, natural.held]
    digests = [secret.mac("resume/images", part.contiguous().numpy().tobytes()).hex() for part in images]
    asked = [*settings.inputs, str(device), original.tower, settings.recipients is not None]
    return {"model": fingerprint(model), "images": digests, "settings": asked}


def _check_model(model: nn.Module, original: Backbone) -> None:
    """Refuses a model that a mark cannot be written to, or that is broken."""
    check_writable(original)
    broken = non_finite_tensor(model)
    if broken is not None:
        raise ValueError(f"model: wanted finite weights, got NaN or infinity in {broken!r}")


def _path(name: str, path: str | os.PathLike[str]) -> Path:
    """The value of the argument `name`."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: wanted a path, got {type(path).__name__}")
    return Path(path)


def _write_back(marked: nn.Module, tower: nn.Module) -> None:
    """Gives `tower` what differs in `marked`, which may share tensors with it."""
    before = tower.state_dict()
    new = {
        name: tensor
        for name, tensor in marked.state_dict().items()
        if tensor.data_ptr() != before[name].data_ptr() and not torch.equal(tensor, before[name])
    }
    tower.load_state_dict(new, strict=False)


def _sample(subject: Subject, original: Backbone, secret: Key) -> Tensor:
    """What is kept of the unmarked model's activations, to align suspects with."""
    site, preprocess = subject.placement.site, original.preprocess
    sampled = site_sample(subject.backbone, secret, site, preprocess, subject.autocast)
    return sampled.half().cpu()


def _undressed(subject: Subject, original: Backbone) -> nn.Module:
    """The marked tower, back where the original is and with its training flags."""
    encoder = placed(subject.backbone.model, original.device)
    for ours, theirs in zip(encoder.modules(), original.encoder.modules(), strict=True):
        ours.training = theirs.training
    return encoder


def _seal(
    released: nn.Module,
    original: Backbone,
    subject: Subject,
    marked: Marked,
    secret: Key,
    settings: Settings,
    triggers: TriggerImages,
    alignment: Tensor | None,
) -> Watermark:
    """The watermark of `released`."""
    site = subject.placement.site
    if settings.keyed:
        site = replace(site, massive_tokens=(), massive_channels=())
    return Watermark.seal(
        secret,
        codec=settings.codec,
        bits=settings.bits,
        axis=settings.axis,
        site=site,
        preprocess=original.preprocess,
        digests=triggers.digests,
        image_source=triggers.source,
        state=marked.state,
        fingerprint=fingerprint(released),
        architecture=settings.architecture,
        alignment=alignment,
    )


def _register_of(released: nn.Module, original: Backbone, marked: Marked, secret: Key) -> Register | None:
    """The register of the recipients, of the whole model where a tower in it was marked."""
    register = marked.register
    if register is None or not original.tower:
        return register
    changes = {f"{original.tower}.{name}": change for name, change in register.changes.items()}
    return Register.make(secret, register.names, released, changes, register.measured, register.reference)


def _site_reason(subject: Subject, original: Backbone) -> str:
    """Why the mark is where it is."""
    reason = subject.placement.reason
    if len(original.towers) > 1:
        others = ", ".join(repr(name) for name in original.towers if name != original.tower)
        reason += f"; in the tower {original.tower!r}, not in {others}"
    return reason


@contextmanager
def _released(model: nn.Module, original: Backbone, marked: nn.Module, inplace: bool) -> Iterator[nn.Module]:
    """`model` with the marked tower in place of its own: a copy, or for a while the model itself."""
    if not inplace or not original.tower:
        yield copied(model, {id(original.encoder): marked})
        return
    path, _, name = original.tower.rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent, name, marked)
    try:
        yield model
    finally:
        setattr(parent, name, original.encoder)


def _check_verified(
    marked: nn.Module,
    watermark: Watermark,
    secret: Key,
    triggers: TriggerImages,
    device: torch.device,
    precision: str,
    ranks: Ranks,
) -> None:
    """Verifies the finished mark as anybody would. A learned codec must be read; it may not be a match."""
    images = None if triggers.source == "key" else triggers
    verifier = Verifier(
        watermark, secret, images, power=POWER, device=device, precision=precision, ranks=ranks
    )
    verdict = verifier.judge(marked)
    if verdict.decision != "match" and (watermark.in_bands or not verdict.images):
        raise UnverifiedMarkError(
            f"the mark is not handed out, for verify says {verdict.decision!r} of it: "
            f"{verdict.reason}; a lower fidelity or another number of bits may help",
            marked,
            watermark,
        )


def _warn_of_missed_targets(quality: Quality, fidelity: float) -> None:
    missed = quality.missed(fidelity)
    if missed:
        warnings.warn(
            f"the mark did not reach its targets: {'; '.join(missed)}", RuntimeWarning, stacklevel=4
        )
