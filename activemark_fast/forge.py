"""forge: play the thief who claims somebody else's model, and measure how far that gets.

The suspect is left as it is: a forger who may change it could mark it honestly. What the forger chooses are
the things an owner brings along: the codec, the key, the hold-out images. Three ways are tried on a budget of
time:

- *learned codec*: an encoder and a decoder are trained to talk past the frozen model (the published recipe).
- *hold-out images*: for one random key of the keyed codec, images are optimised until the model's answer to
  them happens to agree with the messages. `verify` says of such a match that it is no evidence by itself.
- *keys*: random keys of the keyed codec are tried one after another, on images made for the purpose.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from activemark_fast.backbone import Backbone
from activemark_fast.codec import KeyedCodec, LearnedCodec
from activemark_fast.key import Key
from activemark_fast.marking.suffix import (
    Autocast,
    SiteActivations,
    message_loss,
    read_mark,
    run_to_taps,
    site_activations,
)
from activemark_fast.ops.decode import Decoded
from activemark_fast.profile import measure
from activemark_fast.progress import Progress
from activemark_fast.runtime import resolve_autocast, resolve_device
from activemark_fast.site import Site
from activemark_fast.triggers import MIN_IMAGES, synthetic_images
from activemark_fast.verdict import bit_scores, default_tau, sign_flip_p_value

BITS = 32
LEARNED_IMAGES, HELD_IMAGES = 192, 64
LEARNED_BATCH = 32
PROFILED_IMAGES = 32
LEARNED_LR, PIXEL_LR = 1e-3, 0.03
CHECK_EVERY = 25
ENOUGH_RATE = 0.99
"""Detection rate at which the learned codec counts as forged, and no more time is spent on it."""


@dataclass(frozen=True)
class Forgery:
    """What a forger achieved.

    Attributes:
        learned_rate, learned_steps, learned_seconds: detection rate R of a learned codec that was trained on
            the suspect, on images and messages it was not trained on; gradient steps; time.
        image_p_value, image_steps, image_seconds: p-value of the keyed codec on hold-out images that were
            optimised for one random key; gradient steps; time.
        key_p_value, keys, key_seconds: smallest p-value of the keyed codec over random keys; how many keys
            were tried; time.
    """

    learned_rate: float
    learned_steps: int
    learned_seconds: float
    image_p_value: float
    image_steps: int
    image_seconds: float
    key_p_value: float
    keys: int
    key_seconds: float

    def __str__(self) -> str:
        hours = 1e6 / self.keys * self.key_seconds / 3600
        return "\n".join(
            [
                f"learned codec:   R = {self.learned_rate:.3f} after {self.learned_steps} steps, "
                f"{self.learned_seconds:.0f} s",
                f"hold-out images: p = {self.image_p_value:.2g} for one key after {self.image_steps} steps, "
                f"{self.image_seconds:.0f} s; verify calls it no evidence without an older commitment",
                f"keys:            p = {self.key_p_value:.2g}, the smallest of {self.keys} keys, "
                f"{self.key_seconds:.0f} s (chance: about {1 / self.keys:.2g}); "
                f"1e-6 would take about {hours:.3g} hours, 5e-20 about {hours * 2e13:.2g}",
            ]
        )

    def to_dict(self) -> dict[str, object]:
        """The figures as JSON types."""
        return asdict(self)


def forge(
    suspect: nn.Module,
    *,
    minutes: float = 10,
    seed: int = 0,
    device: str | torch.device | None = None,
    precision: str = "auto",
    progress: bool = False,
) -> Forgery:
    """Tries to claim `suspect`, which was not marked, within a budget of time.

    Args:
        suspect: a plain ViT. It is not changed.
        minutes: budget for all three ways together; a third each, and what is left over goes to the keys.
            Each makes at least one step.
        seed: of the forger's keys; how far they get in the time depends on the machine.
        device: where to compute; by default where the suspect is.
        precision: as in `embed`.
        progress: show progress bars on standard error.

    Raises:
        TypeError, ValueError: an argument is not as described, or the suspect is no plain ViT with room for a
            mark.
    """
    if not isinstance(minutes, (int, float)) or isinstance(minutes, bool):
        raise TypeError(f"minutes: wanted a number, got {type(minutes).__name__}")
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes: wanted a finite number above 0, got {minutes}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: wanted int, got {type(seed).__name__}")
    started = time.perf_counter()
    original = Backbone(suspect)
    place = resolve_device(device, original.device)
    autocast = resolve_autocast(precision, place)
    backbone = Backbone(copy.deepcopy(suspect).eval().requires_grad_(False).to(place))
    preprocess = backbone.preprocess
    key = Key(f"activemark forge: the thief's key, {seed}".encode())
    images = synthetic_images(key.stream("images"), LEARNED_IMAGES + HELD_IMAGES, preprocess.size)
    pixels = preprocess(images).to(place)
    with torch.no_grad(), autocast():
        site = measure(backbone, pixels[:PROFILED_IMAGES]).site().site
    activations = site_activations(backbone, pixels, site.block, autocast)
    thief = _Thief(backbone, site, key, pixels, activations, autocast)
    share = minutes * 60 / 3
    with Progress(progress) as bar:
        rate, steps, seconds = thief.train_codec(started + share, bar)
        image_p, image_steps, image_seconds = thief.fit_images(time.perf_counter() + share, bar)
        key_p, keys, key_seconds = thief.try_keys(started + 3 * share, bar)
    return Forgery(rate, steps, seconds, image_p, image_steps, image_seconds, key_p, keys, key_seconds)


@dataclass(frozen=True, eq=False)
class _Thief:
    backbone: Backbone
    site: Site
    key: Key
    pixels: Tensor
    activations: SiteActivations
    autocast: Autocast

    def _messages(self, purpose: str, count: int) -> Tensor:
        return torch.from_numpy(self.key.stream(purpose).bits((count, BITS))).to(self.pixels.device)

    def train_codec(self, deadline: float, bar: Progress) -> tuple[float, int, float]:
        """R of a learned codec on held-out images, steps, seconds."""
        started = time.perf_counter()
        codec = LearnedCodec.create(self.key, self.site, BITS, self.activations.output, "token")
        codec.to(self.pixels.device)
        optimizer = torch.optim.AdamW(codec.parameters(), lr=LEARNED_LR)
        stream = self.key.stream("learned codec/training")
        held, message = self.activations[LEARNED_IMAGES:], self._messages("learned codec/check", HELD_IMAGES)
        bar.stage("learned codec", 0)
        rate, step = 0.0, 0
        while True:
            for _ in range(CHECK_EVERY):
                chosen = torch.from_numpy(stream.integers(0, LEARNED_IMAGES, LEARNED_BATCH))
                sent = torch.from_numpy(stream.bits((LEARNED_BATCH, BITS))).to(self.pixels.device)
                loss = self._loss(codec, self.activations[chosen.to(self.pixels.device)], sent)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                if time.perf_counter() > deadline:
                    break
            errors = self._read(codec, held, message)[codec.taps[-1]].errors
            rate = float((errors <= default_tau(BITS)).double().mean())
            bar.advance(CHECK_EVERY, rate=rate, loss=loss.item())
            if rate >= ENOUGH_RATE or time.perf_counter() > deadline:
                return rate, step, time.perf_counter() - started

    def fit_images(self, deadline: float, bar: Progress) -> tuple[float, int, float]:
        """The p-value on images that are optimised for one key, steps, seconds."""
        started = time.perf_counter()
        codec = KeyedCodec.create(self.key, self.site, BITS, self.activations.output, "token")
        codec.to(self.pixels.device)
        message = self._messages("hold-out images", MIN_IMAGES)
        pixels = self.pixels[:MIN_IMAGES].clone().requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=PIXEL_LR)
        block = self.site.block
        bar.stage("hold-out images", 0)
        step, p_value = 0, 1.0
        while True:
            with self.autocast():
                source = self.backbone.run(self.backbone.stem(pixels.to(self.backbone.dtype)), 0, block)
                output = self.backbone.run(source, block, block + 1)
            activations = SiteActivations(source, output)
            p_value = min(p_value, self._p_value(codec, activations, message))
            if p_value <= 2.0 ** -(BITS * len(codec.taps)) or (step and time.perf_counter() > deadline):
                return p_value, step, time.perf_counter() - started
            loss = self._loss(codec, activations, message)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            bar.advance(1, p_value=p_value, loss=loss.item())

    def try_keys(self, deadline: float, bar: Progress) -> tuple[float, int, float]:
        """The smallest p-value over random keys, how many, seconds."""
        started = time.perf_counter()
        activations = self.activations[:MIN_IMAGES]
        bar.stage("keys", 0)
        best, keys = 1.0, 0
        while not keys or time.perf_counter() < deadline:
            key = self.key.subkey(f"key {keys}")
            codec = KeyedCodec.create(key, self.site, BITS, activations.output, "token")
            message = torch.from_numpy(key.stream("messages/verify").bits((MIN_IMAGES, BITS)))
            message, codec = message.to(self.pixels.device), codec.to(self.pixels.device)
            best = min(best, self._p_value(codec, activations, message))
            keys += 1
            bar.advance(1, p_value=best)
        return best, keys, time.perf_counter() - started

    def _loss(
        self, codec: KeyedCodec | LearnedCodec, activations: SiteActivations, message: Tensor
    ) -> Tensor:
        """Mean cross-entropy of the bits over all taps, 0-dimensional."""
        with self.autocast():
            decoded, _ = run_to_taps(self.backbone, codec, activations, message, self.site.block)
        return message_loss(decoded)

    def _read(
        self, codec: KeyedCodec | LearnedCodec, activations: SiteActivations, message: Tensor
    ) -> dict[int, Decoded]:
        return read_mark(self.backbone, codec, activations, message, self.site.block, self.autocast)

    def _p_value(self, codec: KeyedCodec, activations: SiteActivations, message: Tensor) -> float:
        read = self._read(codec, activations, message).values()
        return sign_flip_p_value([s for at_tap in read for s in bit_scores(at_tap.logits, message)])
