"""What an owner could choose, and what it costs them.

Whoever makes a watermark file may have had the suspect first. Everything a verification uses is therefore
of one of five kinds (`Kind`), and `FIELDS` says of which kind each field of the file is. What an owner may
choose among few values is *paid* for, by a weighted union bound: every value has a weight that the key has
nothing to do with, the weights of all values sum to at most 1, and p is divided by the weight of the one that
was chosen. What they may choose among endlessly many is *chosen*: it is evidence only if it was committed to
before the suspect appeared.

Of several image towers in a suspect each that fits is read, and the p-value pays for their number.

The theorem, with its conditions: take a suspect that was made without the key, and any rule by which an owner
picks the paid settings after having seen it. Then P(paid p-value <= alpha) <= alpha over the random key. For
each setting the p-value is exact (`p_value.sign_flip_p_value`); that settings share the key and the suspect
does not matter to a union bound: P(some p_c <= w_c alpha) <= sum_c w_c alpha <= alpha. Looks, bands,
alignment and the places of a mark in a suspect of other depth are paid for in the same way, in the p-value.
It says nothing of an owner who picks the *key* after having seen the suspect: of N keys the best reaches
1 / N by luck, at the price of stretching N keys (`Key.stretched`). That is what `EVIDENCE_AT` is for. Nor is
the suspect the owner's to choose: of n innocent models the likeliest reaches p with a probability of n p, as
in a sweep, and as for n keys against one model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum

from activemark_fast.normalisation import NORMALISATIONS
from activemark_fast.site import Site


class Kind(Enum):
    """Where an input of a verification comes from."""

    FIXED = "fixed by a public rule"
    MEASURED = "measured on the suspect by a public rule, or refused where it differs from the suspect's"
    KEYED = "drawn from the key"
    PAID = "paid for in the p-value"
    CHOSEN = "chosen by the owner, evidence only with an older timestamped commitment"


FIELDS: dict[str, Kind] = {
    "version": Kind.FIXED,  # older ones count as chosen altogether
    "mac": Kind.FIXED,
    "fingerprint": Kind.FIXED,  # it tells whether the weights are identical, and decides nothing
    "codec": Kind.FIXED,  # "keyed"; the learned one is chosen altogether
    "axis": Kind.FIXED,
    "site.block": Kind.PAID,
    "site.depth": Kind.PAID,  # the taps follow from block and depth
    "site.taps": Kind.FIXED,
    "site.num_tokens": Kind.MEASURED,
    "site.prefix_tokens": Kind.MEASURED,
    "site.width": Kind.MEASURED,
    "site.massive_tokens": Kind.FIXED,  # empty
    "site.massive_channels": Kind.FIXED,
    "bits": Kind.PAID,
    "preprocess.size": Kind.MEASURED,
    "preprocess.mean": Kind.PAID,  # a known one; any other is chosen
    "preprocess.std": Kind.PAID,
    "architecture": Kind.PAID,  # a library's name; a configuration that comes with the watermark is chosen
    "image_source": Kind.FIXED,  # "key"; the owner's own images are chosen
    "digests": Kind.CHOSEN,  # none for images from the key
    "state": Kind.CHOSEN,  # of the learned codec; the keyed one has none
    "alignment": Kind.CHOSEN,  # where the reading goes by it
}
"""Every field of a watermark, those of its parts by their dotted names."""

BITS = range(8, 257, 8)
"""Message lengths of a mark."""
USUAL_BITS = 32
"""The message length of the paper, and the default: half of the weight of all."""
DEPTHS = 64
"""Depths of the marked model that are paid for: a suspect may have fewer blocks than it. The suspect's own
has half of the weight of all."""
ARCHITECTURES = 1 << 16
"""Ways to run given weights that are paid for: names in the libraries' registries under which their shapes
fit, or numbers of heads and the few other settings that shapes leave open: some 26,000 of timm's for a
ViT-S/14, counting image sizes, heads, pooling and norms."""

EVIDENCE_AT = 1e-15
"""A p-value, after what is paid, at or below which a match is evidence against an owner who may lie: to
find a key by trying takes centuries of a GPU then (`key.KEYS_A_SECOND`)."""


def paid(p_value: float, choices: Mapping[str, int]) -> float:
    """The p-value times what is paid for all that an owner could choose (`alternatives`), at most 1."""
    return min(1.0, p_value * math.prod(choices.values()))


def alternatives(site: Site, bits: int, depth: int, architecture: bool) -> dict[str, int]:
    """One over the weight of what an owner chose for each paid field; their product multiplies the p-value.

    Args:
        site: of the watermark.
        bits: message length of the watermark.
        depth: number of the suspect's blocks.
        architecture: the suspect is run as the watermark says; else somebody else said how.
    """
    usual = {"depth": (site.depth == depth, DEPTHS), "bits": (bits == USUAL_BITS, len(BITS))}
    choices = {"block": max(1, site.depth - 2)}
    choices |= {name: 2 if is_it else 2 * (count - 1) for name, (is_it, count) in usual.items()}
    choices["normalisation"] = len(NORMALISATIONS)
    return choices | ({"architecture": ARCHITECTURES} if architecture else {})
