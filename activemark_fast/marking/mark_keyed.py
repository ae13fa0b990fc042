"""Marks a subject with the keyed codec: an edit in closed form, and what the copies of recipients take."""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

from activemark_fast.codec.codebooks import NATURAL, Codebook, balanced_bits, codebooks, draw_sent
from activemark_fast.codec.passive import passive_rows
from activemark_fast.key import Key
from activemark_fast.marking.cosine import Fidelity
from activemark_fast.marking.quality import Quality, QualityCheck
from activemark_fast.marking.reading import Channel
from activemark_fast.marking.settings import Settings
from activemark_fast.marking.strength import search_edit
from activemark_fast.marking.subject import Marked, Subject
from activemark_fast.marking.suffix import site_activations
from activemark_fast.marking.traced import IMAGES as TRACED_IMAGES
from activemark_fast.marking.traced import SHARE as TRACED_SHARE
from activemark_fast.marking.traced import example, row_answers, search_changes, traced_channels
from activemark_fast.progress import Progress
from activemark_fast.tracing import Register, changed
from activemark_fast.triggers import trigger_images


def mark_keyed(subject: Subject, secret: Key, settings: Settings, bar: Progress) -> Marked:
    """Marks the subject's model by one edit, as strong as the fidelity that was asked for allows.

    With recipients, a share of what may be lost is left to their copies, and `Marked.quality` is a copy's.
    """
    stretched = secret.stretched()
    traced = settings.recipients is not None
    room = (1 - settings.fidelity) * (1 - TRACED_SHARE if traced else 1)
    check, history, fidelity = _edit(subject, stretched, settings, 1 - room, bar)
    if not traced:
        return Marked(check(fidelity=fidelity), history, subject.engine, 0, {}, None)
    quality, register, tried = _copies(subject, check, stretched, secret, settings, bar)
    return Marked(quality, history + tried, subject.engine, 0, {}, register)


def _edit(
    subject: Subject, stretched: Key, settings: Settings, wanted: float, bar: Progress
) -> tuple[QualityCheck, list[dict[str, float | str]], Fidelity | None]:
    """Marks the subject's model in closed form; `wanted` is the fidelity that the mark has to keep.

    Returns:
        What measures the quality; what `search_edit` returns.
    """
    backbone, site, engine = subject.backbone, subject.placement.site, subject.engine
    device, bits = backbone.device, settings.bits
    books = [book.to(device) for book in codebooks(stretched, site, bits, subject.measured)]
    output = engine.offload(subject.fitted.output)
    sent = [
        torch.from_numpy(
            balanced_bits(stretched.stream(f"messages/edit/{i}"), len(output[i :: len(books)]), bits)
        ).to(device)
        for i in range(len(books))
    ]
    checked = draw_sent(stretched, "check", len(subject.carriers), bits)
    channels = [
        # Readings of the natural band are looked at one by one: the first will do.
        Channel(book, (part[:, :1] if book.band == NATURAL else part).to(device))
        for book, part in zip(books, checked, strict=True)
    ]
    check = QualityCheck(
        backbone,
        channels,
        subject.carriers,
        subject.fidelity,
        site.block,
        subject.autocast,
        engine.ranks,
    )
    looks = count()

    def fidelity(glance: bool) -> Fidelity:
        def look() -> dict[str, Tensor]:
            found = vars(subject.fidelity(glance)).items()
            return {name: torch.tensor(pair, dtype=torch.float64) for name, pair in found}

        found = engine.made(f"look-{next(looks)}", look)
        return Fidelity(**{name: (float(pair[0]), float(pair[1])) for name, pair in found.items()})

    found = search_edit(
        *(backbone, books, passive_rows(stretched, site), subject.steps, _originals(subject), output, sent),
        *(fidelity, check.margin, wanted, engine, bar),
    )
    return check, *found


def _originals(subject: Subject) -> list[Tensor]:
    """The unmarked weight of each step: the model's that was given, which is not written to meanwhile.

    On the device, unless they wait elsewhere.
    """
    engine, original = subject.engine, subject.original.encoder
    names = {module: name for name, module in subject.backbone.encoder.named_modules()}
    weights = [original.get_parameter(f"{names[step.layer]}.weight").detach() for step in subject.steps]
    waiting = engine.caches_on_host or engine.scratch is not None
    return weights if waiting else [engine.fetch(weight) for weight in weights]


def _copies(
    subject: Subject,
    check: QualityCheck,
    stretched: Key,
    secret: Key,
    settings: Settings,
    bar: Progress,
) -> tuple[Quality, Register, list[dict[str, float | str]]]:
    """What the copies of the subject's model, which is marked, take; the model is left as it was.

    Returns:
        The quality of a copy, the register, and what was tried.
    """
    assert settings.recipients is not None
    engine = subject.engine
    backbone, site, bits = subject.backbone, subject.placement.site, settings.bits
    images = trigger_images(None, secret, backbone.preprocess, TRACED_IMAGES).pixels
    channels = traced_channels(stretched, site, bits, subject.measured, backbone.device)
    changes, tried = search_changes(
        backbone,
        [channel.codec for channel in channels if isinstance(channel.codec, Codebook)],
        site,
        stretched,
        secret,
        engine.offload(subject.fitted.output),
        subject.fidelity,
        settings.fidelity,
        engine,
        bar,
    )
    read = site_activations(backbone, images, site.block, subject.autocast)
    reference = row_answers(backbone, channels, read, site.block, subject.autocast)
    register = Register.make(
        secret, settings.recipients, backbone.model, changes, subject.measured, reference
    )
    marked = {name: backbone.model.get_parameter(name).detach().clone() for name in changes}
    word = example(secret, register.positions)
    backbone.model.load_state_dict(changed(backbone.model, changes, word), strict=False)
    quality = check()
    backbone.model.load_state_dict(marked, strict=False)
    return quality, register, tried
