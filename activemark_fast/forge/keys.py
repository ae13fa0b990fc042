"""Ways that leave everything to the key, and try many: keys one after another, and all that is paid for."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from activemark_fast.backbone import Backbone
from activemark_fast.codec.codebooks import BANDS, SiteMeasure, codebooks, max_bits
from activemark_fast.forge.jacobian import expected_scores, lead, mean_jacobian
from activemark_fast.forge.thief import Attempt, Thief
from activemark_fast.freedoms import BITS, EVIDENCE_AT
from activemark_fast.key import Key
from activemark_fast.normalisation import NORMALISATIONS, Preprocess
from activemark_fast.site import Site, taps_after

MEASURE_SHARE = 0.3
"""Of a way's time, for the Jacobian."""
YEAR = 31_557_600
PADDINGS = 4
"""Keys that differ in the number of zeros at their end."""


def keys_read(thief: Thief, deadline: float) -> list[Attempt]:
    """Keys are tried as `verify` would: stretched, their images cut, the suspect read."""
    started = thief.now()
    best, found, tries = math.inf, thief.key, 0
    while not tries or thief.now() < deadline:
        key = thief.key.subkey(f"key {tries}")
        p_value = thief.p_value(key.stretched(), thief.bits, thief.triggers(key))
        if p_value < best:
            best, found = p_value, key
        tries += 1
        thief.bar.advance(1, p_value=best)
    each = (thief.now() - started) / tries
    tried = f"the best of {tries} keys, each read as verify reads it, {each:.2g} s a key"
    return [thief.present("keys, read", tried, tries, started, found, thief.seal(found))]


def keys_guessed(thief: Thief, deadline: float) -> list[Attempt]:
    """Keys are tried without running the suspect: its mean Jacobian tells what each would read.

    Only the best goes before `verify`. What is left of a try's price is stretching the key.
    """
    started = thief.now()
    site = thief.site
    output = thief.at_site(thief.photographs).output
    slots = torch.tensor(site.patch_tokens, device=thief.device)
    measured = SiteMeasure.of(output, site.prefix_tokens)
    measured_until = started + MEASURE_SHARE * (deadline - started)
    jacobian, pairs = mean_jacobian(thief, site, slots, output, measured_until)
    began = thief.now()
    best, found, tries, stretching = -math.inf, thief.key, 0, 0.0
    while not tries or thief.now() < deadline:
        key = thief.key.subkey(f"guessed key {tries}")
        before = thief.now()
        stretched = key.stretched()
        stretching += thief.now() - before
        scores: dict[str, list[torch.Tensor]] = {band.name: [] for band in BANDS}
        for book in codebooks(stretched, site, thief.bits, measured):
            for tap, read in book.read_directions.items():
                written = book.inject_directions.double()
                scores[book.band.name].append(expected_scores(written, read.double(), jacobian[tap]))
        reached = max(float(lead(torch.cat(parts))) for parts in scores.values())
        if reached > best:
            best, found = reached, key
        tries += 1
        thief.bar.advance(1, lead=best)
    each = (thief.now() - began) / tries
    tried = (
        f"the best of {tries} keys by the mean Jacobian ({pairs} forward pairs), {each:.2g} s a key, "
        f"{stretching / tries:.2g} s of it to stretch it; {1 / EVIDENCE_AT:.0e} keys would take "
        f"{each / EVIDENCE_AT / YEAR:.2g} years of this"
    )
    return [thief.present("keys, guessed", tried, tries, started, found, thief.seal(found))]


@dataclass(frozen=True)
class _Setting:
    """What a forger may choose and pays for.

    Attributes:
        block, depth: the site.
        bits: message length.
        normalisation: of `NORMALISATIONS`.
        heads: attention heads that the weights are run with; None as they are.
        size: (height, width) of the images; weights fit any that have as many patches.
    """

    block: int
    depth: int
    bits: int
    normalisation: int
    heads: int | None
    size: tuple[int, int]


def paid_settings(thief: Thief, deadline: float) -> list[Attempt]:
    """One key, and what the p-value is multiplied for: block, depth, bits, normalisation, architecture.

    Settings are drawn at random, as many as there is time for.
    """
    started = thief.now()
    key = thief.key.subkey("paid settings")
    stretched = key.stretched()
    choices = _choices(thief)
    stream = thief.key.stream("paid settings")
    best, tries = math.inf, 0
    while not tries or thief.now() < deadline:
        (block, depth), *others = (
            values[int(stream.integers(0, len(values), 1)[0])] for values in choices.values()
        )
        setting = _Setting(block, depth, *others)
        suspect, site, preprocess = _as_set(thief, setting)
        pixels = thief.triggers(key, preprocess)
        p_value = thief.p_value(stretched, setting.bits, pixels, site, Backbone(suspect))
        tries += 1
        if p_value < best:
            best, found = p_value, setting
        thief.bar.advance(1, p_value=best)
    suspect, site, preprocess = _as_set(thief, found)
    watermark = thief.seal(key, bits=found.bits, site=site, preprocess=preprocess)
    tried = (
        f"the best of {tries} of {math.prod(map(len, choices.values()))} settings for one key: "
        f"block {found.block} of {found.depth}, {found.bits} bits, normalisation {found.normalisation}, "
        f"{found.heads or 'the usual'} heads, images of {found.size}"
    )
    run = "timm:VisionTransformer"  # heads and image size are as the watermark has them
    return [
        thief.present(
            "paid settings", tried, tries, started, key, watermark, suspect=suspect, architecture=run
        )
    ]


def _choices(thief: Thief) -> dict[str, list[Any]]:
    """What each setting can be chosen from; block and depth go together, for each set of taps one."""
    depth, width = thief.backbone.depth, thief.site.width
    heads: list[int | None] = [None]
    if _attentions(thief.suspect):
        heads += [count for count in range(1, width // 4 + 1) if width % count == 0]
    height, wide = thief.preprocess.size
    patch = max(getattr(getattr(thief.suspect, "patch_embed", None), "patch_size", (1,)))
    return {
        "place": [
            (block, of)
            for block in range(depth - 2)
            for of in range(block + 3, 2 * depth + 3)
            if taps_after(block, of)[0] < depth
        ],
        "bits": [bits for bits in BITS if bits <= max_bits(width)],
        "normalisation": list(range(len(NORMALISATIONS))),
        "heads": heads,
        "size": [(height + down, wide + across) for down in range(patch) for across in range(patch)],
    }


def _as_set(thief: Thief, setting: _Setting) -> tuple[nn.Module, Site, Preprocess]:
    """The suspect as it is to be run, the site, and the images' preprocessing."""
    suspect: Any = copy.deepcopy(thief.suspect)
    if setting.size != thief.preprocess.size:
        suspect.patch_embed.img_size = setting.size
    if setting.heads is not None:
        wide = thief.site.width // setting.heads
        for layer in _attentions(suspect):
            layer.num_heads, layer.head_dim, layer.scale = setting.heads, wide, wide**-0.5
    taps = taps_after(setting.block, setting.depth)
    site = replace(thief.site, block=setting.block, depth=setting.depth, taps=taps)
    preprocess = Preprocess(setting.size, *NORMALISATIONS[setting.normalisation])
    return suspect, site, preprocess


def _attentions(model: nn.Module) -> list[Any]:
    """Attention layers of timm, whose number of heads their weights leave open."""
    return [
        m for m in model.modules() if all(hasattr(m, name) for name in ("num_heads", "head_dim", "scale"))
    ]


def padded_keys(thief: Thief, deadline: float) -> list[Attempt]:
    """Keys that scrypt alone would not tell apart: one with zeros behind it, which HMAC fills up with zeros.

    Would they share a stretched key, each would bring images of its own for the price of one.
    """
    started = thief.now()
    material = thief.key.derive("padded keys")
    keys = [Key(material + bytes(zeros)) for zeros in range(PADDINGS)]
    stretched = [key.stretched().derive("compared") for key in keys]
    tried = (
        f"{len(set(stretched))} stretched keys for a key and the same with 1 to {PADDINGS - 1} zeros behind"
    )
    return [thief.present("padded keys", tried, PADDINGS, started, keys[-1], thief.seal(keys[-1]))]
