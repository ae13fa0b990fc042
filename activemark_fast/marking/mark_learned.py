"""Marks a subject with the learned codec: gradient steps, which a resume file may carry on."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.codec import CODECS, Codec
from activemark_fast.key import Key
from activemark_fast.marking.finetune import CHECK_EVERY, finetune
from activemark_fast.marking.quality import QualityCheck
from activemark_fast.marking.reading import Channel
from activemark_fast.marking.resume import TrainingFile, TrainingState
from activemark_fast.marking.settings import Settings
from activemark_fast.marking.subject import Marked, Subject
from activemark_fast.marking.suffix import final_features
from activemark_fast.progress import Progress


def mark_learned(
    subject: Subject,
    reference: Backbone,
    secret: Key,
    settings: Settings,
    saved: TrainingFile | None,
    resumed: TrainingState | None,
    bar: Progress,
) -> Marked:
    """Marks the subject's model by gradient steps.

    Args:
        subject: what is marked.
        reference: a view of the original, where the subject is.
        secret: the key.
        settings: what was asked for.
        saved: the file that the training is kept in, once in a while.
        resumed: what it held.
        bar: shows the progress.
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
    engine = replace(subject.engine, reason=how, peak_bytes=0)
    return Marked(quality, history, engine, steps, coder.state(), None)
