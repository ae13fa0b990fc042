"""Ways through the fields of the file, one by one with one key, and through what `verify` can be asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from activemark_fast.forge.thief import Attempt, Thief
from activemark_fast.normalisation import Preprocess
from activemark_fast.site import taps_after
from activemark_fast.triggers import MIN_IMAGES
from activemark_fast.watermark import DEEPEST, FORMAT_VERSION

CLOSE, OFF = 4e-4, 0.01
"""What is added to a normalisation: less than anybody would tell it from a published one by, and more."""
MASSIVE_SHARE = 0.25


def fields(thief: Thief, deadline: float) -> list[Attempt]:
    """Every field of the file that was once free, or might be thought to be.

    Each is set to what would help a forger, by itself, with one key. `verify` is to refuse it, to go on as if
    it were not there, or to call it chosen. Which it does is the attempt's outcome; whether the p-value is
    that of the honest file is said, too.
    """
    key = thief.key.subkey("fields, one by one")
    started = thief.now()
    plain = thief.present(
        "fields", "none changed: the file that embed would write", 1, started, key, thief.seal(key)
    )
    attempts = [plain]
    for name, changes in _changes(thief):
        started = thief.now()
        attempt = thief.present("fields", name, 1, started, key, thief.seal(key, **changes))
        if attempt.p_value == plain.p_value and attempt.p_value is not None and not attempt.chosen:
            attempt = replace(attempt, said=f"{attempt.said}; the p-value is the honest file's")
        attempts.append(attempt)
        if thief.now() >= deadline:
            break
    return attempts


def _changes(thief: Thief) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is set to what; what `verify` refuses at once comes first."""
    site, own = thief.site, thief.preprocess
    massive = tuple(range(0, site.width, round(1 / MASSIVE_SHARE)))
    last = site.depth - 2

    def placed(**changes: Any) -> dict[str, Any]:
        return {"site": replace(site, **changes)}

    def normalised(by: float) -> dict[str, Any]:
        red, green, blue = own.mean
        return {"preprocess": Preprocess(own.size, (red + by, green - by, blue + by), own.std)}

    yield f"site.massive_channels: {len(massive)} of {site.width}", placed(massive_channels=massive)
    yield "site.massive_tokens: all patches but one", placed(massive_tokens=tuple(site.patch_tokens[1:]))
    yield (
        "site.taps: others",
        placed(taps=(site.block + 1,) if site.taps != (site.block + 1,) else (last + 1,)),
    )
    yield "state: a small scale", {"state": {"scale": torch.tensor(1e-3)}}
    yield "digests: some, for images from the key", {"digests": (bytes(32),) * MIN_IMAGES}
    yield "digests: two, for the owner's images", {"digests": (bytes(32),) * 2, "image_source": "tensor"}
    yield "image_source: none that there is", {"image_source": "elsewhere"}
    yield "bits: 9", {"bits": 9}
    yield "axis: channel", {"axis": "channel"}
    yield "version: between two, with a scale", {"version": 2.5, "state": {"scale": torch.tensor(1e-3)}}
    yield "version: not a number", {"version": math.nan}
    yield "version: one that is to come", {"version": FORMAT_VERSION + 1}
    yield "site.block: the last", placed(block=site.depth - 1)
    yield "site.prefix_tokens: as many as there are tokens", placed(prefix_tokens=site.num_tokens)
    yield f"site.depth: {DEEPEST + 1}", placed(depth=DEEPEST + 1, taps=taps_after(site.block, DEEPEST + 1))
    yield f"site.depth: {DEEPEST}", placed(depth=DEEPEST, taps=taps_after(site.block, DEEPEST))
    yield "site.prefix_tokens: some patches among them", placed(prefix_tokens=site.num_tokens // 2)
    yield "site.num_tokens: one more", placed(num_tokens=site.num_tokens + 1)
    yield "site.width: one more", placed(width=site.width + 1)
    yield (
        "preprocess.size: twice as large",
        {"preprocess": Preprocess((2 * own.size[0], 2 * own.size[1]), own.mean, own.std)},
    )
    yield "preprocess.mean: in the last digits", normalised(CLOSE)
    yield "preprocess.mean: a little off", normalised(OFF)
    yield "fingerprint: another", {"fingerprint": "0" * 64}
    yield "architecture: any", {"architecture": "timm:vit_base_patch16_224"}


def arguments(thief: Thief, deadline: float) -> list[Attempt]:
    """What `verify` is asked by its arguments: how precisely it computes, how many wrong bits it takes.

    The verifier's to choose, and a forger might talk them into the best of them.
    """
    key = thief.key.subkey("arguments")
    watermark = thief.seal(key)
    settings: list[dict[str, Any]] = [
        {"precision": "bf16"},
        {"tau": thief.bits - 1},
        {"alpha": 1e-3},
        {"precision": "fp32"},
    ]
    attempts = []
    for setting in settings:
        started = thief.now()
        name = ", ".join(f"{argument} = {value}" for argument, value in setting.items())
        attempts.append(thief.present("arguments", name, 1, started, key, watermark, **setting))
        if thief.now() >= deadline:
            break
    return attempts
