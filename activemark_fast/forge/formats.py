"""The way that older formats left open: which channels are called massive, and how loud the mark is."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from activemark_fast.codec import KeyedCodec
from activemark_fast.codec.keyed import keyed_slots
from activemark_fast.forge.jacobian import expected_scores, lead, mean_jacobian
from activemark_fast.forge.thief import Attempt, Thief
from activemark_fast.key import Key
from activemark_fast.marking.reading import Channel, row_scores
from activemark_fast.marking.suffix import SiteActivations
from activemark_fast.p_value import sign_flip_p_value
from activemark_fast.site import Site
from activemark_fast.triggers import trigger_images

IMAGES = 64
MEASURE_SHARE, CLIMB_SHARE = 0.25, 0.85
"""Of a way's time: until when to measure the Jacobian, and until when to climb."""
ROOM = 0.8
"""Of the longest message for a model's width: what is left over is for channels to be called massive."""
MAX_FLIPPED = 3
"""Channels that change at a step."""
WARMTH = 0.01
"""How much worse a step may be at the start of the annealing; nothing at its end."""
SCALES = (1.0, 0.3, 0.1, 0.03)
"""Lengths of the injected vector that are tried, over the usual one."""


def massive_channels(thief: Thief, deadline: float) -> list[Attempt]:
    """Format 2: climbs over sets of channels called massive, then lowers the scale; one key, its own images.

    The rows that are written and read are made orthogonal to these channels, so each set moves every row a
    little. With the mean Jacobian of the suspect a set's worth is known without running it. The same set is
    then presented in the format of today.
    """
    started = thief.now()
    key = thief.key.subkey("massive channels")
    triggers = trigger_images(None, key, thief.preprocess, IMAGES, synthetic=True)
    activations = thief.at_site(triggers.pixels.to(thief.device))
    slots = torch.from_numpy(keyed_slots(key, thief.site)).to(thief.device)
    bits = min(thief.bits, int(ROOM * (thief.site.width - 1) / (1 + len(thief.site.taps))))
    share = deadline - started
    jacobian, pairs = mean_jacobian(
        thief, thief.site, slots, activations.output, started + MEASURE_SHARE * share
    )
    kept, tries = _climb(thief, key, bits, jacobian, started + CLIMB_SHARE * share)
    site = replace(thief.site, massive_channels=tuple(torch.nonzero(~kept)[:, 0].tolist()))
    best, scale = math.inf, torch.ones(())
    for factor in SCALES:
        codec = KeyedCodec.create(key, site, bits, activations.output, "token")
        codec.scale *= factor
        p_value = _p_value(thief, key, codec, site, activations)
        if p_value < best:
            best, scale = p_value, codec.scale.cpu()
        tries += 1
        if thief.now() >= deadline:
            break
    fields = {
        "bits": bits,
        "digests": triggers.digests,
        "state": {"scale": scale},
        "site": replace(site, depth=0),
        "version": 2,
    }
    tried = (
        f"{len(site.massive_channels)} of {site.width} channels called massive and a scale chosen, "
        f"for one key, by the mean Jacobian ({pairs} forward pairs)"
    )
    return [
        thief.present("format 2", tried, tries, started, key, thief.seal(key, **fields)),
        thief.present(
            "the same in today's format",
            tried,
            tries,
            started,
            key,
            thief.seal(key, site=site, bits=thief.bits),
        ),
    ]


def _climb(
    thief: Thief, key: Key, bits: int, jacobian: dict[int, Tensor], deadline: float
) -> tuple[Tensor, int]:
    """(D,) bool, the channels that are not called massive; and how many sets were tried."""
    width = thief.site.width
    sets = 1 + len(jacobian)
    gaussian = torch.from_numpy(key.stream("directions").normal((sets * bits, width)))
    rows = torch.cat([torch.ones(1, width, dtype=torch.float64), gaussian])

    def worth(kept: Tensor, products: Tensor) -> float:
        # Rows orthogonal to a channel are 0 there: what is left is made orthonormal, in order.
        lower, failed = torch.linalg.cholesky_ex(products)
        if int(failed):
            return -math.inf
        made = torch.linalg.solve_triangular(lower, rows * kept, upper=False)[1:]
        written, *read = made.view(sets, bits, width)
        return float(
            lead(
                torch.cat(
                    [expected_scores(written, r, j) for r, j in zip(read, jacobian.values(), strict=True)]
                )
            )
        )

    stream = thief.key.stream("climbing")
    kept, products = torch.ones(width, dtype=torch.float64), rows @ rows.T
    now = best = worth(kept, products)
    found, tries, started = kept, 1, thief.now()
    while (left := deadline - thief.now()) > 0:
        flipped = torch.from_numpy(stream.permutation(width)[: 1 + tries % MAX_FLIPPED])
        other = kept.clone()
        other[flipped] = 1 - other[flipped]
        if int(other.sum()) < len(rows):
            continue
        tries += 1
        changed = rows[:, flipped]
        others = products + (changed * (other - kept)[flipped]) @ changed.T
        value = worth(other, others)
        warmth = WARMTH * left / max(deadline - started, 1e-9)
        if value > now + warmth * math.log(1 - stream.uniform(1)[0]):
            kept, products, now = other, others, value
        if value > best:
            best, found = value, other
        thief.bar.advance(1, lead=best)
    return found > 0, tries


def _p_value(thief: Thief, key: Key, codec: KeyedCodec, site: Site, activations: SiteActivations) -> float:
    """What `verify` would read in format 2."""
    sent = torch.from_numpy(key.stream("messages/verify").bits((len(activations), 1, codec.bits)))
    channel = Channel(codec.to(thief.device), sent.to(thief.device))
    read = channel.agreement(thief.backbone, activations, 0, site.block, thief.autocast)
    return sign_flip_p_value(row_scores([read]))
