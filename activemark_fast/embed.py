"""embed: mark a model so that `verify` can later recognise what descends from it."""

from __future__ import annotations

import copy
import os
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from activemark_fast.align import site_sample
from activemark_fast.backbone import Backbone, non_finite_tensor
from activemark_fast.codec import CODECS, Codec, KeyedCodec
from activemark_fast.key import Key
from activemark_fast.marking.edit import search_edit
from activemark_fast.marking.engine import Engine, halving, plan_engine
from activemark_fast.marking.finetune import CHECK_EVERY, finetune
from activemark_fast.marking.quality import DETECTION_TARGET, MARGIN_TARGET, Quality, QualityCheck
from activemark_fast.marking.resume import TrainingFile, TrainingState
from activemark_fast.marking.steps import COMPILE
from activemark_fast.marking.suffix import BATCH, SiteActivations, final_features, site_activations
from activemark_fast.profile import measure
from activemark_fast.progress import Progress
from activemark_fast.runtime import resolve_autocast, resolve_device
from activemark_fast.triggers import holdout_images
from activemark_fast.watermark import Watermark, fingerprint

IMAGES = 256
PROFILED_IMAGES = 32
EDIT_IMAGES = 160
"""So many of the hold-out images are enough for an edit; gradient steps from scratch use them all."""
HELD_OUT_EVERY = 5
"""Every fifth of them is kept from marking, to measure the mark on. The kinds of images that are made from a
key take turns by fours: all are on either side."""
MESSAGES_PER_IMAGE = 2


@dataclass(frozen=True, eq=False)
class Embedding:
    """What `embed` returns.

    Attributes:
        model: the marked model.
        watermark: what `verify` needs besides the key.
        quality: how the mark and the model do on images that were kept from marking.
        site_reason: why the mark is where it is.
        steps: gradient steps taken; 0 if the edit was enough.
        history: one dict for every strength of the edit that was tried and every check during training.
        engine: how it was computed and why so; `peak_bytes` was told before the edit began.
        seconds: wall time of `embed`.
    """

    model: nn.Module
    watermark: Watermark
    quality: Quality
    site_reason: str
    steps: int
    history: list[dict[str, float | str]] = field(repr=False)
    engine: Engine
    seconds: float

    @property
    def fidelity(self) -> float:
        """Mean cosine between the clean features of the marked model and the original's."""
        return self.quality.fidelity


def embed(
    model: nn.Module,
    key: Key | bytes | str | os.PathLike[str],
    images: object = None,
    *,
    codec: str = "keyed",
    method: str | None = None,
    bits: int = 32,
    axis: str = "token",
    block: int | None = None,
    fidelity: float = 0.997,
    max_steps: int = 1000,
    inplace: bool = False,
    architecture: str | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    compile: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Embedding:
    """Marks `model` (arXiv 2510.04966, with the keyed codec and the closed-form edit by default).

    Args:
        model: a plain ViT (`Backbone` says which). It is not changed, unless `inplace`.
        key: the owner's secret: bytes, a passphrase (str), a key file (Path) or a `Key`.
        images: hold-out images (`holdout_images` says in which forms), up to 256; without any they are made
            from the key. An edit looks at the first 160; verification needs them all.
        codec: "keyed", or "learned" (the paper's encoder and decoder; no exact p-value).
        method: "edit" (closed form, then as many gradient steps as the targets need: none if the edit met
            them) or "finetune" (gradient steps only). By default "edit" for the keyed codec, "finetune" for
            the learned one.
        bits: message length, 8 to 256.
        axis: what the learned codec overwrites: "token" or "channel".
        block: the block to inject after, from 0; by default the one where massive activations emerge.
        fidelity: lowest mean cosine to the original's features, above 0 and below 1.
        max_steps: upper bound on gradient steps.
        inplace: write the mark into `model` itself, at the very end.
        architecture: model string (`load_model`) to store in the watermark, so that the command line can
            build the suspect.
        device: where to compute; by default where the model is.
        precision: "auto" (bf16 on CUDA, fp32 elsewhere), "fp32", "bf16" or "fp16"; weights stay in their
            own dtype.
        compile: how gradient steps are run: "eager", "regional" (by `torch.compile`, alike blocks once),
            "graph" (replayed as a CUDA graph), or "auto": whichever ends them soonest (`marking.steps` says
            how that is found out; on a CPU it is "eager"). The edit runs each block once, and eager.
        checkpoint: file that gradient training is saved to, about once a minute, until it has ended. If it is
            there, the training goes on from it, to the result it would have had. An edit takes seconds and
            starts anew.
        progress: show progress bars on standard error, and how much memory the marking will take.

    Returns:
        The marked model, its watermark and what was measured. The same model, key, images and settings give
        the same weights, bit for bit, on one machine's CPU with as many threads.

    Raises:
        TypeError, ValueError: an argument is not as described; the model has non-finite weights, is no plain
            ViT (`NotAViTError`) or has no room for the mark (`SiteError`).

    Warns:
        RuntimeWarning: the targets were not reached; `quality` tells by how much.
    """
    started = time.perf_counter()
    method = method or ("edit" if codec == KeyedCodec.name else "finetune")
    _check_settings(codec, method, bits, axis, block, fidelity, max_steps, architecture, compile)
    original = Backbone(model)
    broken = non_finite_tensor(model)
    if broken is not None:
        raise ValueError(f"model: wanted finite weights, got NaN or infinity in {broken!r}")
    secret = Key.of(key)
    place = resolve_device(device, original.device)
    if compile == "graph" and place.type != "cuda":
        raise ValueError(f"compile: 'graph' needs a CUDA device, got {str(place)!r}")
    autocast = resolve_autocast(precision, place)
    preprocess = original.preprocess
    holdout = holdout_images(images, secret, preprocess, IMAGES)
    saved = resumed = None
    if checkpoint is not None:
        if not isinstance(checkpoint, (str, os.PathLike)):
            raise TypeError(f"checkpoint: wanted a path, got {type(checkpoint).__name__}")
        inputs: dict[str, object] = {
            "model": fingerprint(model),
            "images": [digest.hex() for digest in holdout.digests],
            "settings": [
                codec,
                method,
                bits,
                axis,
                block,
                fidelity,
                max_steps,
                precision,
                compile,
                str(place),
            ],
        }
        saved = TrainingFile(Path(checkpoint), secret, inputs)
        resumed = saved.load()

    marked = copy.deepcopy(model).eval().to(place)
    with Progress(progress) as bar:
        backbone = Backbone(marked)
        bar.stage("profile", 1)
        with autocast():
            placement = measure(backbone, holdout.pixels[:PROFILED_IMAGES]).site(block=block)
        site = placement.site
        bar.stage("prefix", 1)
        shown = holdout.pixels[: EDIT_IMAGES if method == "edit" else None]
        activations = halving(
            lambda batch: site_activations(backbone, shown, site.block, autocast, batch), BATCH
        )
        coder: Codec = CODECS[codec].create(secret, site, bits, activations.output, axis).to(place)
        alignment = None
        if coder.exact:
            alignment = site_sample(backbone, secret, site, preprocess, autocast).half().cpu()

        def messages(purpose: str, *shape: int) -> Tensor:
            return torch.from_numpy(secret.stream(f"messages/{purpose}").bits((*shape, bits))).to(place)

        held = torch.arange(len(activations), device=place) % HELD_OUT_EVERY == 0
        fitted, kept = activations[~held], activations[held]
        del activations
        engine = plan_engine(
            backbone, site, precision, holdout.pixels, len(fitted), len(kept), MESSAGES_PER_IMAGE
        )
        fitted = SiteActivations(engine.keep(fitted.source), engine.keep(fitted.output))
        if method == "edit":
            bar.note(f"embed: {engine}")
        check = QualityCheck(backbone, coder, site, kept, messages("check", len(kept)), autocast)
        history: list[dict[str, float | str]] = []
        if resumed is not None:
            history = resumed.history
            quality = check()
        elif method == "edit" and isinstance(coder, KeyedCodec):
            texts = messages("edit", MESSAGES_PER_IMAGE, len(fitted))
            quality, history = search_edit(
                backbone, coder, site, fitted.output, texts, check, fidelity, engine, bar
            )
        else:
            quality = check()
        steps = 0
        if resumed is not None or not quality.reaches(fidelity):
            stage = "polish" if method == "edit" else "fine-tuning"
            reference = Backbone(copy.deepcopy(model).eval().to(place))
            features = final_features(reference, fitted, site.block, autocast)
            bar.stage(stage, max_steps)

            def reached(step: int, loss: float) -> bool:
                nonlocal quality
                quality = check(reference)
                history.append({"stage": stage, "step": step, "loss": loss, **asdict(quality)})
                bar.advance(CHECK_EVERY, loss=loss, bit_error=quality.bit_error, fidelity=quality.fidelity)
                return quality.reaches(fidelity)

            def save(step: int, tensors: dict[str, Tensor]) -> None:
                if saved is not None and saved.due():
                    saved.save(TrainingState(step, tensors, history))

            if resumed is not None:
                bar.advance(resumed.step)
            draws = secret.stream("fine-tuning")
            steps, how = finetune(
                backbone,
                reference,
                coder,
                site,
                fitted,
                features,
                draws,
                max_steps,
                autocast,
                compile,
                reached,
                resumed,
                save,
            )
            if method == "finetune":
                engine = replace(engine, reason=how, peak_bytes=0)
            elif steps > 0:
                engine = replace(engine, reason=f"{engine.reason}; {how}")
    if not quality.reaches(fidelity):
        warnings.warn(
            f"the mark did not reach its targets: fidelity {quality.fidelity:.4f} (wanted {fidelity}), "
            f"margin {quality.margin:.2f} ({MARGIN_TARGET}), detection rate {quality.detection_rate:.3f} "
            f"({DETECTION_TARGET}), on the original {quality.original_detection_rate:.3f} (0)",
            RuntimeWarning,
            stacklevel=2,
        )
    coder.original_rate.fill_(quality.original_detection_rate)
    marked.to(original.device)
    for ours, theirs in zip(marked.modules(), model.modules(), strict=True):
        ours.training = theirs.training
    watermark = Watermark.seal(
        secret,
        codec=codec,
        bits=bits,
        axis=axis,
        site=site,
        preprocess=preprocess,
        digests=holdout.digests,
        image_source=holdout.source,
        state=coder.state(),
        fingerprint=fingerprint(marked),
        architecture=architecture,
        alignment=alignment,
    )
    if inplace:
        model.load_state_dict(marked.state_dict())
        marked = model
    if saved is not None:
        saved.remove()
    seconds = time.perf_counter() - started
    return Embedding(marked, watermark, quality, placement.reason, steps, history, engine, seconds)


def _check_settings(
    codec: str,
    method: str,
    bits: int,
    axis: str,
    block: int | None,
    fidelity: float,
    max_steps: int,
    architecture: str | None,
    compile: str,
) -> None:
    for name, text, choices in (
        ("codec", codec, sorted(CODECS)),
        ("method", method, ["edit", "finetune"]),
        ("axis", axis, ["token", "channel"]),
        ("compile", compile, list(COMPILE)),
    ):
        if not isinstance(text, str):
            raise TypeError(f"{name}: wanted one of {choices}, got {type(text).__name__}")
        if text not in choices:
            raise ValueError(f"{name}: wanted one of {choices}, got {text!r}")
    if method == "edit" and codec != KeyedCodec.name:
        raise ValueError(f"method: the edit places keyed marks only; the {codec} codec needs 'finetune'")
    if axis != "token" and codec == KeyedCodec.name:
        raise ValueError(f"axis: the keyed codec injects at tokens, wanted 'token', got {axis!r}")
    for name, number in (("bits", bits), ("block", block), ("max_steps", max_steps)):
        if name == "block" and number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name}: wanted int, got {type(number).__name__}")
    if not 8 <= bits <= 256:
        raise ValueError(f"bits: wanted 8 to 256, got {bits}")
    if max_steps < 0:
        raise ValueError(f"max_steps: wanted 0 or more, got {max_steps}")
    if not isinstance(fidelity, (int, float)):
        raise TypeError(f"fidelity: wanted a number, got {type(fidelity).__name__}")
    if not 0 < fidelity < 1:
        raise ValueError(f"fidelity: wanted a cosine above 0 and below 1, got {fidelity}")
    if architecture is not None and not isinstance(architecture, str):
        raise TypeError(f"architecture: wanted a string, got {type(architecture).__name__}")
