"""Ways that fit something to the suspect by gradients: a codec, images, their normalisation, an alignment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import torch
from torch import Tensor

from activemark_fast.align import site_sample
from activemark_fast.codec import LearnedCodec
from activemark_fast.codec.codebooks import Codebook, SiteMeasure, codebooks, draw_sent
from activemark_fast.commitment import Commitment, Timestamp
from activemark_fast.forge.jacobian import expected_scores, lead, mean_jacobian
from activemark_fast.forge.thief import Attempt, Thief
from activemark_fast.key import Key
from activemark_fast.marking.suffix import SiteActivations, message_loss, run_to_taps
from activemark_fast.normalisation import Preprocess
from activemark_fast.triggers import MIN_IMAGES, TriggerImages, trigger_images
from activemark_fast.watermark import Watermark

BATCH = 32
CODEC_LR, PIXEL_LR, NORMALISATION_LR, ROTATION_LR = 1e-3, 0.03, 0.02, 0.03
CHECK_EVERY = 20
FITTED = 1e-18
"""A p-value at which fitting ends."""
LEARNED_ENOUGH = 0.01
"""A loss at which training the codec ends."""
MEASURE_SHARE = 0.5
"""Of a way's time, for the Jacobian."""
LATER = 0.01
"""How far the weights of a later model lie from those it was made from, over their standard deviation."""


def learned_codec(thief: Thief, deadline: float) -> list[Attempt]:
    """The published recipe: encoder and decoder are trained to talk past the frozen suspect.

    The forger knows which images and messages `verify` takes, so the codec is trained on these very ones; it
    claims to have read nothing from an unmarked original.
    """
    started = thief.now()
    key = thief.key.subkey("learned codec")
    activations = thief.at_site(thief.triggers(key))
    count = len(activations)
    message = torch.from_numpy(key.stream("messages/verify").bits((count, 1, thief.bits)))[:, 0]
    message = message.to(thief.device)
    codec = LearnedCodec.create(key, thief.site, thief.bits, activations.output, "token").to(thief.device)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=CODEC_LR)
    stream = key.stream("training")
    steps, loss = 0, float("inf")
    while not steps or (thief.now() < deadline and loss > LEARNED_ENOUGH):
        chosen = torch.from_numpy(stream.permutation(count)[:BATCH]).to(thief.device)
        with thief.autocast(thief.backbone.dtype):
            decoded, _ = run_to_taps(
                thief.backbone, codec, activations[chosen], message[chosen], thief.site.block
            )
        error = message_loss(decoded)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        steps, loss = steps + 1, error.item()
        thief.bar.advance(1, loss=loss)
    state = codec.state() | {"original_rate": torch.zeros(())}
    watermark = thief.seal(key, codec=LearnedCodec.name, state=state)
    tried = "encoder and decoder trained on the trigger images of the key"
    return [thief.present("learned codec", tried, steps, started, key, watermark)]


def own_images(thief: Thief, deadline: float) -> list[Attempt]:
    """Trigger images are optimised until the suspect's answer to them agrees with one key.

    They are presented three times: as the owner's own; handed over for a watermark whose images come from
    the key; and with a commitment that was timestamped now, against a model that somebody makes of the
    suspect later.
    """
    started = thief.now()
    key = thief.key.subkey("hold-out images")
    pixels = thief.photographs[:MIN_IMAGES].clone().requires_grad_()
    steps = _fit(thief, key, [pixels], lambda: pixels, PIXEL_LR, deadline)
    images = pixels.detach().cpu()
    given = trigger_images(images, key, thief.preprocess)
    watermark = thief.seal(key, digests=given.digests, image_source=given.source)
    way = "own images"
    return [
        thief.present(way, "optimised for one key", steps, started, key, watermark, images),
        thief.present(
            "images handed over",
            "optimised ones for a watermark whose images come from the key",
            steps,
            started,
            key,
            thief.seal(key),
            images,
        ),
        _claim_on_what_comes_later(thief, key, watermark, given, steps, started),
    ]


def _claim_on_what_comes_later(
    thief: Thief, key: Key, watermark: Watermark, given: TriggerImages, steps: int, started: float
) -> Attempt:
    """The forger commits to what was fitted to the suspect, then accuses whoever goes on from the suspect."""
    later = copy.deepcopy(thief.suspect)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in later.parameters():
            drawn = torch.randn(weights.shape, generator=noise).to(weights)
            weights.add_(LATER * weights.std(correction=0) * drawn)
    # Any authority stamps any file: this stands for its answer.
    stamp = Timestamp(datetime.now(timezone.utc), trusted=True)
    commitment = replace(Commitment.make(key, [(key, watermark)]), timestamp=stamp)
    return thief.present(
        "claim on what comes later",
        "images optimised on the suspect and committed to, before another model is made of it",
        steps,
        started,
        key,
        watermark,
        given.pixels,
        later,
        commitment=commitment,
    )


def own_normalisation(thief: Thief, deadline: float) -> list[Attempt]:
    """The six numbers of the normalisation are optimised for one key."""
    started = thief.now()
    key = thief.key.subkey("normalisation")
    own = thief.preprocess
    shown = thief.triggers(key, Preprocess(own.size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    mean = torch.tensor(own.mean, device=thief.device).requires_grad_()
    std = torch.tensor(own.std, device=thief.device).requires_grad_()

    def pixels() -> Tensor:
        return (shown - mean[:, None, None]) / std.clamp_min(0.01)[:, None, None]

    steps = _fit(thief, key, [mean, std], pixels, NORMALISATION_LR, deadline)
    red, green, blue = mean.tolist()
    of_red, of_green, of_blue = std.detach().clamp_min(0.01).tolist()
    fitted = Preprocess(own.size, (red, green, blue), (of_red, of_green, of_blue))
    watermark = thief.seal(key, preprocess=fitted)
    tried = "mean and standard deviation of the images optimised for one key"
    return [thief.present("own normalisation", tried, steps, started, key, watermark)]


def _fit(
    thief: Thief,
    key: Key,
    parameters: Sequence[Tensor],
    pixels: Callable[[], Tensor],
    lr: float,
    deadline: float,
) -> int:
    """Optimises what images are made of until the loud band of one key reads right; returns the steps."""
    stretched = key.stretched()
    block = thief.site.block
    optimizer = torch.optim.Adam(list(parameters), lr=lr)
    steps = 0
    while True:
        images = pixels()
        with thief.autocast(thief.backbone.dtype):
            source = thief.backbone.run(thief.backbone.stem(images.to(thief.backbone.dtype)), 0, block)
            output = thief.backbone.run(source, block, block + 1)
        book = _loud_book(thief, stretched, output.detach())
        sent = draw_sent(stretched, "verify", len(images), thief.bits)[0].to(thief.device)
        with thief.autocast(thief.backbone.dtype):
            decoded, _ = run_to_taps(
                thief.backbone, book, SiteActivations(source, output), sent[:, steps % sent.shape[1]], block
            )
        loss = message_loss(decoded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        thief.bar.advance(1, loss=loss.item())
        if thief.now() >= deadline:
            return steps
        if steps % CHECK_EVERY == 0:
            p_value = thief.p_value(stretched, thief.bits, pixels().detach())
            if p_value <= FITTED:
                return steps


def _loud_book(thief: Thief, stretched: Key, output: Tensor) -> Codebook:
    measured = SiteMeasure.of(output, thief.site.prefix_tokens)
    return codebooks(stretched, thief.site, thief.bits, measured)[0].to(thief.device)


def own_alignment(thief: Thief, deadline: float) -> list[Attempt]:
    """The activations to align with are the suspect's, turned so that the mark's directions fit it.

    Which turn makes every bit answer is found by gradients on the mean Jacobian, for one key.
    """
    started = thief.now()
    key = thief.key.subkey("alignment")
    site = thief.site
    output = thief.at_site(thief.photographs).output
    slots = torch.tensor(site.patch_tokens, device=thief.device)
    measured_until = started + MEASURE_SHARE * (deadline - started)
    jacobian, _ = mean_jacobian(thief, site, slots, output, measured_until)
    book = _loud_book(thief, key.stretched(), output).to(torch.device("cpu"))
    written = book.inject_directions.double()
    width = site.width
    ones = torch.full((width, 1), width**-0.5, dtype=torch.float64)  # alignment leaves it as it is
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(width, dtype=torch.float64)[:, 1:]], dim=1))[0][:, 1:]
    turn = torch.zeros(width - 1, width - 1, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([turn], lr=ROTATION_LR)

    def matrix() -> Tensor:
        return basis @ torch.linalg.matrix_exp(turn - turn.T) @ basis.T + ones @ ones.T

    steps = 0
    while not steps or thief.now() < deadline:
        turned = matrix()
        scores = torch.cat(
            [
                expected_scores(written @ turned, read.double() @ turned, jacobian[tap])
                for tap, read in book.read_directions.items()
            ]
        )
        loss = -lead(scores) - scores.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        thief.bar.advance(1, loss=loss.item())
        if float(scores.detach().min()) > 1 - 1e-3:
            break
    sample = site_sample(thief.backbone, key, site, thief.preprocess, thief.autocast).double().cpu()
    watermark = thief.seal(key, alignment=(sample @ matrix().detach().T).half())
    tried = "activations to align with, turned for one key"
    return [thief.present("own alignment", tried, steps, started, key, watermark, align=True)]
