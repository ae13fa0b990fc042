"""embed: mark a model so that `verify` can later recognise what descends from it."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from activemark_fast.align import site_sample
from activemark_fast.backbone import Backbone, non_finite_tensor
from activemark_fast.codec import CODECS, Codec, KeyedCodec
from activemark_fast.codec.codebooks import (
    BANDS,
    MEASURED_IMAGES,
    Codebook,
    SiteMeasure,
    balanced_bits,
    codebooks,
    draw_sent,
    most_bits,
)
from activemark_fast.dress import fixed_weight, plain_torch, unwrapped
from activemark_fast.freedoms import BITS
from activemark_fast.key import Key
from activemark_fast.marking.edit import search_edit
from activemark_fast.marking.engine import Engine, halving, plan_engine
from activemark_fast.marking.finetune import CHECK_EVERY, finetune
from activemark_fast.marking.quality import (
    DETECTION_TARGET,
    MARGIN_TARGET,
    FidelityCheck,
    Quality,
    QualityCheck,
)
from activemark_fast.marking.reading import Channel
from activemark_fast.marking.resume import TrainingFile, TrainingState
from activemark_fast.marking.steps import COMPILE
from activemark_fast.marking.suffix import (
    BATCH,
    Autocast,
    SiteActivations,
    final_features,
    site_activations,
)
from activemark_fast.marking.traced import IMAGES as TRACED_IMAGES
from activemark_fast.marking.traced import SHARE as TRACED_SHARE
from activemark_fast.marking.traced import example, row_answers, search_changes, traced_channels
from activemark_fast.profile import measure
from activemark_fast.progress import Progress
from activemark_fast.runtime import resolve_autocast, resolve_device
from activemark_fast.site import Placement
from activemark_fast.tracing import Register, changed, check_names
from activemark_fast.triggers import HoldOut, clean_images, holdout_images
from activemark_fast.verifier import Verifier
from activemark_fast.watermark import HOLDOUT_IMAGES, Watermark, fingerprint

PROFILED_IMAGES = 32
FITTED_IMAGES, HELD_IMAGES = 192, 64
"""Clean images that a mark is solved on, and that its cost is measured on, at most."""
CHECKED_IMAGES = 16
"""Hold-out images that the mark is read on before it is released."""
MESSAGES_PER_IMAGE = 2
"""An image runs with a message and with its opposite."""
DEFAULT_FIDELITY = 0.998
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


@dataclass(frozen=True)
class _Settings:
    """What `embed` was asked for; checked when it is made."""

    codec: str
    bits: int
    axis: str
    block: int | None
    fidelity: float
    max_steps: int
    architecture: str | None
    precision: str
    compile: str

    def __post_init__(self) -> None:
        for name, text, choices in (
            ("codec", self.codec, sorted(CODECS)),
            ("axis", self.axis, ["token", "channel"]),
            ("compile", self.compile, list(COMPILE)),
        ):
            if not isinstance(text, str):
                raise TypeError(f"{name}: wanted one of {choices}, got {type(text).__name__}")
            if text not in choices:
                raise ValueError(f"{name}: wanted one of {choices}, got {text!r}")
        if self.axis != "token" and self.codec == KeyedCodec.name:
            raise ValueError(f"axis: the keyed codec injects at tokens, wanted 'token', got {self.axis!r}")
        for name, number in (("bits", self.bits), ("block", self.block), ("max_steps", self.max_steps)):
            if name == "block" and number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{name}: wanted int, got {type(number).__name__}")
        if self.bits not in BITS:
            raise ValueError(
                f"bits: wanted a multiple of {BITS.step}, {BITS[0]} to {BITS[-1]}, got {self.bits}"
            )
        if self.max_steps < 0:
            raise ValueError(f"max_steps: wanted 0 or more, got {self.max_steps}")
        if not isinstance(self.fidelity, (int, float)):
            raise TypeError(f"fidelity: wanted a number, got {type(self.fidelity).__name__}")
        if not 0 < self.fidelity < 1:
            raise ValueError(f"fidelity: wanted a cosine above 0 and below 1, got {self.fidelity}")
        if self.architecture is not None and not isinstance(self.architecture, str):
            raise TypeError(f"architecture: wanted a string, got {type(self.architecture).__name__}")


@dataclass(frozen=True, eq=False)
class _Subject:
    """The model that is being marked, and what is known of it before a weight changes.

    Attributes:
        backbone: a view of the copy that is marked.
        placement: where the mark goes, and why.
        fitted: activations of the clean images that the mark is solved on.
        carriers: of the first hold-out images, which the mark is read on before it is released.
        measured: how tokens vary at the site, on hold-out images.
        fidelity: compares the copy with what it was.
        autocast: mixed precision of the forward passes.
    """

    backbone: Backbone
    placement: Placement
    fitted: SiteActivations
    carriers: SiteActivations
    measured: SiteMeasure
    fidelity: FidelityCheck
    autocast: Autocast


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
    fidelity: float = DEFAULT_FIDELITY,
    max_steps: int = 1000,
    tower: str | None = None,
    inplace: bool = False,
    architecture: str | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    compile: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    recipients: Sequence[str] | None = None,
    progress: bool = False,
) -> Embedding:
    """Marks `model` (arXiv 2510.04966, with keyed codebooks and a closed-form edit by default).

    Args:
        model: an image tower, or a model that holds one (`Backbone` says which). It is not changed, unless
            `inplace`. What `torch.compile` or `DataParallel` wraps is marked, and returned without the
            wrapper, unless `inplace`.
        key: the owner's secret: bytes, a passphrase (str), a key file (Path) or a `Key`.
        images: hold-out images to read the mark on (`holdout_images` says in which forms), up to 128;
            verification needs them again. Without any they are cut from photographs by the key, which is
            better evidence: own images are something the owner chose.
        clean: natural images of the kind the model is used on, 200 or so, in the same forms. The mark is
            solved on three quarters of them, so that it stays away from what they excite; the fidelity is
            measured on the others. Photographs that ship with the package stand beside them, or alone.
        codec: "keyed" (edited in, in closed form), or "learned" (the paper's encoder and decoder, trained;
            no exact p-value).
        bits: message length, a multiple of 8 from 8 to 256.
        axis: what the learned codec overwrites: "token" or "channel".
        block: the block to inject after, from 0; by default the one where massive activations emerge.
        fidelity: lowest mean cosine to the original's features, of class token, mean patch and single
            patches, on clean images that were held out; above 0 and below 1. Their 5th percentile may lie
            1 / 0.3 times as far from 1. A keyed mark is as strong as that allows.
        max_steps: upper bound on gradient steps, which only the learned codec takes.
        tower: dotted name of the module in `model` to mark, where several take images; by default the one
            with the longest list of blocks. Nothing else of the model is run, or copied but to be returned.
        inplace: write the mark into `model` itself, at the very end.
        architecture: model string (`load_model`) to store in the watermark, so that the command line can
            build the suspect.
        device: where to compute; by default where the model is.
        precision: "auto" (bf16 on CUDA, fp32 elsewhere), "fp32", "bf16" or "fp16"; weights stay in their
            own dtype.
        compile: how gradient steps are run: "eager", "regional" (by `torch.compile`, alike blocks once),
            "graph" (replayed as a CUDA graph), or "auto": whichever ends them soonest (`marking.steps` says
            how that is found out; on a CPU it is "eager"). The edit is run eager.
        checkpoint: file that gradient training is saved to, about once a minute, until it has ended. If it is
            there, the training goes on from it, to the result it would have had. An edit takes seconds and
            starts anew.
        recipients: names of those who get copies of their own (`tracing.check_names` says which can be
            names): `Embedding.register` then makes the copies, and `verify` tells with it whose copy a
            suspect was made from. A fifth of the fidelity that may be lost goes to that. Keyed codec only.
        progress: show progress bars on standard error, and how much memory the marking will take.

    Returns:
        The marked model, its watermark and what was measured. The same model, key, images and settings give
        the same weights, bit for bit, on one machine's CPU with as many threads.

    Raises:
        TypeError, ValueError: an argument is not as described; the model has non-finite weights, is no plain
            ViT (`NotAViTError`), has no room for the mark (`SiteError`) or weights that cannot be written to.
        UnverifiedMarkError: `verify` does not find the finished mark. The model is as it was.

    Warns:
        RuntimeWarning: targets were not reached; it says which and by how much, and what would help.
    """
    started = time.perf_counter()
    settings = _Settings(codec, bits, axis, block, fidelity, max_steps, architecture, precision, compile)
    given, model = model, unwrapped(model) if isinstance(model, nn.Module) else model
    original = Backbone(model, tower=tower)
    check_writable(original)
    broken = non_finite_tensor(model)
    if broken is not None:
        raise ValueError(f"model: wanted finite weights, got NaN or infinity in {broken!r}")
    if recipients is not None:
        if codec != KeyedCodec.name:
            raise ValueError(f"recipients: wanted the keyed codec with them, got {codec!r}")
        recipients = check_names(recipients)
    secret = Key.of(key)
    device = resolve_device(device, original.device)
    if compile == "graph" and device.type != "cuda":
        raise ValueError(f"compile: 'graph' needs a CUDA device, got {str(device)!r}")
    most = most_bits(original.width)
    if codec == KeyedCodec.name and bits > most:
        raise ValueError(f"bits: wanted at most {most} for a model of width {original.width}, got {bits}")
    preprocess = original.preprocess
    holdout = holdout_images(images, secret, preprocess, HOLDOUT_IMAGES)
    natural = clean_images(clean, preprocess, FITTED_IMAGES, HELD_IMAGES)
    saved = resumed = None
    if checkpoint is not None:
        saved = _training_file(
            checkpoint, secret, model, settings, [holdout.pixels, natural.fitted], str(device)
        )
        resumed = saved.load()

    marked = copy.deepcopy(original.encoder).eval().to(device)
    stretched = secret.stretched() if codec == KeyedCodec.name else secret
    with Progress(progress) as bar:
        subject = _prepare(
            _view(marked, original), settings, holdout.pixels, natural.fitted, natural.held, device, bar
        )
        site = subject.placement.site
        engine = plan_engine(
            subject.backbone,
            site,
            precision,
            sum(part.nbytes for part in (holdout.pixels, natural.fitted, natural.held)),
            len(subject.fitted),
            len(natural.held),
            MEASURED_IMAGES,
            sum(band.books for band in BANDS),
            MESSAGES_PER_IMAGE,
        )
        if codec == KeyedCodec.name:
            bar.note(f"embed: {engine}")
        alignment = None
        register = None
        steps = 0
        state: dict[str, Tensor] = {}
        if codec == KeyedCodec.name:
            sampled = site_sample(subject.backbone, secret, site, preprocess, subject.autocast)
            alignment = sampled.half().cpu()
            room = (1 - fidelity) * (1 if recipients is None else 1 - TRACED_SHARE)
            check, history = _edit(subject, stretched, settings, 1 - room, engine, bar)
            if recipients is None:
                quality = check()
            else:
                quality, register = _copies(
                    subject, check, stretched, secret, recipients, settings, engine, history, bar
                )
        else:
            quality, history, steps, how, state = _train(
                subject,
                _view(copy.deepcopy(original.encoder).eval().to(device), original),
                secret,
                settings,
                saved,
                resumed,
                bar,
            )
            engine = replace(engine, reason=how, peak_bytes=0)
    marked.to(original.device)
    for ours, theirs in zip(marked.modules(), original.encoder.modules(), strict=True):
        ours.training = theirs.training
    with _released(model, original, marked, inplace) as released:
        watermark = Watermark.seal(
            secret,
            codec=codec,
            bits=bits,
            axis=axis,
            site=replace(site, massive_tokens=(), massive_channels=()) if codec == KeyedCodec.name else site,
            preprocess=preprocess,
            digests=() if holdout.source == "key" else holdout.digests,
            image_source=holdout.source,
            state=state,
            fingerprint=fingerprint(released),
            architecture=architecture,
            alignment=alignment,
        )
        if register is not None and original.tower:
            changes = {f"{original.tower}.{name}": change for name, change in register.changes.items()}
            seen = register.measured, register.reference
            register = Register.make(secret, register.names, released, changes, *seen)
        _check_verified(released, watermark, secret, holdout, device, precision)
    _warn_of_missed_targets(quality, fidelity)
    if inplace:
        original.encoder.load_state_dict(marked.state_dict())
    if saved is not None:
        saved.remove()
    reason = subject.placement.reason
    if len(original.towers) > 1:
        others = ", ".join(repr(name) for name in original.towers if name != original.tower)
        reason += f"; in the tower {original.tower!r}, not in {others}"
    return Embedding(
        given if inplace else released,
        watermark,
        quality,
        natural.source,
        reason,
        steps,
        history,
        engine,
        time.perf_counter() - started,
        register,
    )


def _view(tower: nn.Module, original: Backbone) -> Backbone:
    """A view of a copy of the tower that `original` sees."""
    return Backbone(tower, image_size=original.image_size, tower="")


@contextmanager
def _released(model: nn.Module, original: Backbone, marked: nn.Module, inplace: bool) -> Iterator[nn.Module]:
    """`model` with the marked tower in place of its own: a copy, or for a while the model itself."""
    if not inplace or not original.tower:
        yield copy.deepcopy(model, {id(original.encoder): marked})
        return
    path, _, name = original.tower.rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent, name, marked)
    try:
        yield model
    finally:
        setattr(parent, name, original.encoder)


def check_writable(backbone: Backbone) -> None:
    """Refuses a model with a block that a mark could not be written to."""
    for block in range(1, backbone.depth - 1):
        fixed = fixed_weight(backbone.carrier(block))
        if fixed is not None:
            raise ValueError(f"model: the weight of the last linear layer of block {block} {fixed}")
        backbone.mlp_gain(block)


def _check_verified(
    marked: nn.Module,
    watermark: Watermark,
    secret: Key,
    holdout: HoldOut,
    device: torch.device,
    precision: str,
) -> None:
    """Verifies the finished mark as anybody would. A learned codec must be read; it may not be a match."""
    images = None if holdout.source == "key" else holdout
    verifier = Verifier(watermark, secret, images, power=POWER, device=device, precision=precision)
    verdict = verifier.judge(marked)
    if verdict.decision != "match" and (watermark.two_bands or not verdict.images):
        raise UnverifiedMarkError(
            f"the mark is not handed out, for verify says {verdict.decision!r} of it: "
            f"{verdict.reason}; a lower fidelity or another number of bits may help",
            marked,
            watermark,
        )


def _training_file(
    path: str | os.PathLike[str],
    secret: Key,
    model: nn.Module,
    settings: _Settings,
    images: list[Tensor],
    device: str,
) -> TrainingFile:
    """The file that a training is resumed from, which must be of the same inputs."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"checkpoint: wanted a path, got {type(path).__name__}")
    digests = [secret.mac("resume/images", part.contiguous().numpy().tobytes()).hex() for part in images]
    inputs: dict[str, object] = {
        "model": fingerprint(model),
        "images": digests,
        "settings": [*asdict(settings).values(), device],
    }
    return TrainingFile(Path(path), secret, inputs)


def _prepare(
    backbone: Backbone,
    settings: _Settings,
    holdout: Tensor,
    fitted: Tensor,
    held: Tensor,
    device: torch.device,
    bar: Progress,
) -> _Subject:
    """Profiles the model, finds the site and runs all images up to it."""
    autocast = resolve_autocast(settings.precision, device)
    bar.stage("profile", 1)
    with autocast():
        placement = measure(backbone, fitted[:PROFILED_IMAGES]).site(block=settings.block)
    site = placement.site
    bar.stage("prefix", 3)

    def at_site(pixels: Tensor) -> SiteActivations:
        found = halving(lambda batch: site_activations(backbone, pixels, site.block, autocast, batch), BATCH)
        bar.advance()
        return found

    carriers = at_site(holdout[:MEASURED_IMAGES])
    measured = SiteMeasure.of(carriers.output, site.prefix_tokens)
    fidelity = FidelityCheck(backbone, at_site(held).output, site.block, autocast)
    if not measured.usable:
        raise ValueError("model: wanted finite activations that vary, got constant or non-finite ones")
    return _Subject(
        backbone, placement, at_site(fitted), carriers[:CHECKED_IMAGES], measured, fidelity, autocast
    )


def _edit(
    subject: _Subject, stretched: Key, settings: _Settings, wanted: float, engine: Engine, bar: Progress
) -> tuple[QualityCheck, list[dict[str, float | str]]]:
    """Marks the subject's model in closed form; `wanted` is the fidelity that the mark has to keep."""
    backbone, site = subject.backbone, subject.placement.site
    device, bits = backbone.device, settings.bits
    books = [book.to(device) for book in codebooks(stretched, site, bits, subject.measured)]
    output = engine.keep(subject.fitted.output)
    sent = [
        torch.from_numpy(
            balanced_bits(stretched.stream(f"messages/edit/{i}"), len(output[i :: len(books)]), bits)
        ).to(device)
        for i in range(len(books))
    ]
    checked = draw_sent(stretched, "check", len(subject.carriers), bits)
    channels = [Channel(book, part.to(device)) for book, part in zip(books, checked, strict=True)]
    check = QualityCheck(backbone, channels, subject.carriers, subject.fidelity, site.block, subject.autocast)
    history = search_edit(
        backbone, books, site, output, sent, subject.fidelity, check.margin, wanted, engine, bar
    )
    return check, history


def _copies(
    subject: _Subject,
    check: QualityCheck,
    stretched: Key,
    secret: Key,
    recipients: Sequence[str],
    settings: _Settings,
    engine: Engine,
    history: list[dict[str, float | str]],
    bar: Progress,
) -> tuple[Quality, Register]:
    """What the copies of the subject's model, which is marked, take; the model is left as it was.

    history: what is tried is added.

    Returns:
        The quality of a copy, and the register.
    """
    backbone, site, bits = subject.backbone, subject.placement.site, settings.bits
    images = holdout_images(None, secret, backbone.preprocess, TRACED_IMAGES).pixels
    channels = traced_channels(stretched, site, bits, subject.measured, backbone.device)
    changes, tried = search_changes(
        backbone,
        [channel.codec for channel in channels if isinstance(channel.codec, Codebook)],
        site,
        stretched,
        secret,
        engine.keep(subject.fitted.output),
        subject.fidelity,
        settings.fidelity,
        engine,
        bar,
    )
    history += tried
    read = site_activations(backbone, images, site.block, subject.autocast)
    reference = row_answers(backbone, channels, read, site.block, subject.autocast)
    register = Register.make(secret, recipients, backbone.model, changes, subject.measured, reference)
    marked = {name: backbone.model.get_parameter(name).detach().clone() for name in changes}
    word = example(secret, register.positions)
    backbone.model.load_state_dict(changed(backbone.model, changes, word), strict=False)
    quality = check()
    backbone.model.load_state_dict(marked, strict=False)
    return quality, register


def _train(
    subject: _Subject,
    reference: Backbone,
    secret: Key,
    settings: _Settings,
    saved: TrainingFile | None,
    resumed: TrainingState | None,
    bar: Progress,
) -> tuple[Quality, list[dict[str, float | str]], int, str, dict[str, Tensor]]:
    """Marks the subject's model by gradient steps, with the learned codec.

    Returns:
        The quality, its history, the steps taken, how they were run, and the codec's state.
    """
    backbone, site, autocast = subject.backbone, subject.placement.site, subject.autocast
    device = backbone.device
    coder: Codec = CODECS[settings.codec].create(
        secret, site, settings.bits, subject.fitted.output, settings.axis
    )
    coder = coder.to(device)
    message = secret.stream("messages/check").bits((len(subject.carriers), 1, settings.bits))
    channel = Channel(coder, torch.from_numpy(message).to(device))
    check = QualityCheck(backbone, [channel], subject.carriers, subject.fidelity, site.block, autocast)
    quality = check()
    history = [] if resumed is None else resumed.history
    features = final_features(reference, subject.fitted, site.block, autocast)
    bar.stage("fine-tuning", settings.max_steps)
    if resumed is not None:
        bar.advance(resumed.step)

    def reached(step: int, loss: float) -> bool:
        nonlocal quality
        quality = check(reference)
        figures = {
            name: value
            for name, value in asdict(quality).items()
            if name not in ("features", "natural_margin")
        }
        history.append({"stage": "fine-tuning", "step": step, "loss": loss, **figures})
        bar.advance(CHECK_EVERY, loss=loss, bit_error=quality.bit_error, fidelity=quality.fidelity)
        return quality.reaches(settings.fidelity)

    def save(step: int, tensors: dict[str, Tensor]) -> None:
        if saved is not None and saved.due():
            saved.save(TrainingState(step, tensors, history))

    steps, how = finetune(
        backbone,
        reference,
        coder,
        site,
        subject.fitted,
        features,
        secret.stream("fine-tuning"),
        settings.max_steps,
        autocast,
        settings.compile,
        reached,
        resumed,
        save,
    )
    coder.original_rate.fill_(quality.original_detection_rate)
    return quality, history, steps, how, coder.state()


def _warn_of_missed_targets(quality: Quality, fidelity: float) -> None:
    missed = []
    if not quality.keeps(fidelity):
        missed.append(
            f"fidelity {quality.fidelity:.4f}, 5th percentile {quality.fidelity_tail:.4f} (wanted "
            f"{fidelity}); more clean images would help"
        )
    if not quality.margin >= MARGIN_TARGET or not quality.detection_rate >= DETECTION_TARGET:
        missed.append(
            f"margin {quality.margin:.2f} (wanted {MARGIN_TARGET:g}), detection rate "
            f"{quality.detection_rate:.3f} ({DETECTION_TARGET:g}): the mark is as strong as the fidelity "
            "allows; a lower fidelity or fewer bits would help"
        )
    if quality.original_detection_rate > 0:
        missed.append(
            f"the original reads as marked, too, on {quality.original_detection_rate:.3f} of the images"
        )
    if missed:
        warnings.warn(
            f"the mark did not reach its targets: {'; '.join(missed)}", RuntimeWarning, stacklevel=4
        )
