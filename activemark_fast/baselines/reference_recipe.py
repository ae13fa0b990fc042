"""The recipe of the ActiveMark paper (arXiv 2510.04966), step for step, to compare `embed` with.

An encoder, a decoder and the blocks between them are trained together; each step runs the marked and the
original model in full on freshly augmented images. Gradients are set to zero before each step.
"""

from __future__ import annotations

import copy
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from activemark_fast.backbone import Backbone
from activemark_fast.baselines.common import Cost, Finding, share_of
from activemark_fast.codec import LearnedCodec
from activemark_fast.key import Key
from activemark_fast.marking.suffix import read_mark, site_activations
from activemark_fast.profiling import measure
from activemark_fast.progress import Progress
from activemark_fast.site import Site
from activemark_fast.triggers import trigger_images
from activemark_fast.verdict import default_tau

IMAGES = 256
PROFILED_IMAGES = 32
BITS = 32
BATCH = 16
EPOCHS = 5
STEPS_PER_EPOCH = 500
MODEL_LR = 1e-5
CODEC_LR = 1e-4


@dataclass(frozen=True, eq=False)
class Mark:
    """A model that was marked by the paper's recipe, and what reads the mark.

    Attributes:
        model: the marked model.
        codec: encoder and decoder.
        site: where the mark is.
        pixels: (n, 3, H, W), the trigger images as model input.
        messages: (n, M), one for each.
        cost: what the training took.
    """

    model: nn.Module
    codec: LearnedCodec
    site: Site
    pixels: Tensor
    messages: Tensor
    cost: Cost


def generate(
    model: nn.Module,
    key: Key | bytes | str | os.PathLike[str],
    images: object = None,
    *,
    bits: int = BITS,
    block: int | None = None,
    epochs: int = EPOCHS,
    steps_per_epoch: int = STEPS_PER_EPOCH,
    fraction: float = 1.0,
    progress: bool = False,
) -> Mark:
    """Marks a copy of `model` (section 3 of the paper).

    Loss: cross-entropy of message and what the decoder reads at the input of the last block, plus 1 - cosine
    between the final features of the marked model, with the message in it, and of the original. AdamW at 1e-5
    on the blocks after the site up to the last but one, and at 1e-4 on encoder and decoder; 16 images a step,
    flipped at random, each with a random message; fp16 autocast with a scaled loss on a GPU.

    Args:
        model: a plain ViT; not changed.
        key: the owner's secret, as in `embed`: draws the codec's first weights, the messages, and the images
            where there are none.
        images: trigger images, in any form `embed` takes, up to 256.
        bits: message length.
        block: the block to inject after; by default where massive activations emerge.
        epochs: passes.
        steps_per_epoch: steps a pass.
        fraction: take only this share of the steps.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: `fraction` is not in (0, 1], or as for `embed`.
    """
    started = time.perf_counter()
    steps = share_of(epochs * steps_per_epoch, fraction)
    secret = Key.of(key)
    marked, original = (Backbone(copy.deepcopy(model).eval().requires_grad_(False)) for _ in range(2))
    device = original.device
    pixels = trigger_images(images, secret, original.preprocess, IMAGES).pixels.to(device, original.dtype)
    site = measure(original, pixels[:PROFILED_IMAGES]).site("reference", block=block).site
    codec = LearnedCodec.create(secret, site, bits, pixels, "token").to(device)
    last = codec.taps[-1]
    suffix = nn.ModuleList(list(marked.blocks)[site.block + 1 : last + 1]).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(suffix.parameters()), "lr": MODEL_LR},
            {"params": list(codec.parameters()), "lr": CODEC_LR},
        ]
    )
    half = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    draws = secret.stream("reference recipe")
    with Progress(progress) as bar:
        bar.stage("reference recipe", steps)
        for _ in range(steps):
            chosen = torch.from_numpy(draws.integers(0, len(pixels), BATCH)).to(device)
            flipped = torch.from_numpy(draws.bits(BATCH)).to(device, torch.bool)
            message = torch.from_numpy(draws.bits((BATCH, bits))).to(device)
            batch = torch.where(flipped[:, None, None, None], pixels[chosen].flip(-1), pixels[chosen])
            with torch.autocast(device.type, dtype=torch.float16) if half else nullcontext():
                with torch.no_grad():
                    wanted = original.features(original.run(original.stem(batch), 0, original.depth))
                    source = marked.run(marked.stem(batch), 0, site.block)
                    output = marked.run(source, site.block, site.block + 1)
                tapped = marked.run(codec.inject(output, source, message), site.block + 1, last + 1)
                told = codec.decode(tapped, last, message).loss.mean()
                seen = marked.features(marked.run(tapped, last + 1, marked.depth))
            loss = told + 1 - cosine_similarity(seen.float(), wanted.float(), dim=-1).mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            bar.advance()
    suffix.requires_grad_(False)
    messages = torch.from_numpy(secret.stream("messages/verify").bits((len(pixels), bits))).to(device)
    cost = Cost(time.perf_counter() - started, steps / (epochs * steps_per_epoch))
    return Mark(marked.model, codec.requires_grad_(False), site, pixels, messages, cost)


def verify(suspect: nn.Module, mark: Mark) -> Finding:
    """The detection rate: share of the images whose message is read with at most tau wrong bits (5 of 32)."""
    view = Backbone(suspect)
    activations = site_activations(view, mark.pixels, mark.site.block, nullcontext)
    decoded = read_mark(view, mark.codec, activations, mark.messages, mark.site.block, nullcontext)
    errors = decoded[mark.codec.taps[-1]].errors
    return Finding(float((errors <= default_tau(mark.codec.bits)).double().mean()))
