"""What a thief makes of several attacks: many keys, one after another, the strongest at a price."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from activemark_fast.attacks.overwrite import overwrite
from activemark_fast.datasets import Labelled
from activemark_fast.utility import features, probe_accuracy

Run = Callable[..., nn.Module]
"""An attack, `run(model, data, seed, strength)`."""
LOOKS = 6


def overwrite_many(
    model: nn.Module, data: Labelled | Tensor | None, seed: int, strength: float, *, loss: float = 0.004
) -> nn.Module:
    """A copy of `model` that was marked again and again, each time under another key.

    Args:
        model: a plain ViT.
        data: not used.
        seed: chooses the keys: `overwriting_key` of 1000 seed, 1000 seed + 1, …
        strength: how many keys.
        loss: how far each mark may take the features: 1 - `fidelity` of `embed`.

    Raises:
        ValueError: `strength` is below 1.
    """
    if strength < 1:
        raise ValueError(f"strength: wanted at least 1 key, got {strength}")
    for number in range(round(strength)):
        model = overwrite(model, None, 1000 * seed + number, loss)
    return model


def stack(
    model: nn.Module,
    data: Labelled | Tensor,
    seed: int,
    strength: float,
    *,
    before: Sequence[tuple[Run, float]],
    attack: Run,
) -> nn.Module:
    """A copy of `model` that went through several attacks, one after another.

    Args:
        model: a plain ViT.
        data: what the attacks need.
        seed: of all of them.
        strength: of the last one.
        before: the others, in order, each with its strength.
        attack: the last one.
    """
    for run, amount in before:
        model = run(model, data, seed, amount)
    return attack(model, data, seed, strength)


def search(
    model: nn.Module,
    data: Labelled,
    seed: int,
    strength: float,
    *,
    attack: Run,
    gentle: float,
    harsh: float,
) -> nn.Module:
    """A copy of `model` after the strongest attack that costs so much accuracy, found by bisection.

    The thief fits a linear probe to one half of the labelled images and tests on the other. Six strengths are
    looked at between `gentle` and `harsh`; if none of them is cheap enough, the attack is at `gentle`.

    Args:
        model: a plain ViT.
        data: labelled images, which the attack may use, too.
        seed: of the attack.
        strength: points (hundredths) of the probe's accuracy that may be lost.
        attack: what is tried.
        gentle: a strength that costs little.
        harsh: one that costs much; lower than `gentle` if the attack grows that way.

    Raises:
        TypeError: `data` has no labels.
    """
    if not isinstance(data, Labelled):
        raise TypeError(f"data: wanted labelled images, got {type(data).__name__}")
    half = len(data) // 2

    def accuracy(of: nn.Module) -> float:
        found = features(of, data.images)
        return probe_accuracy(found[:half], data.labels[:half], found[half:], data.labels[half:])

    least = accuracy(model) - strength / 100
    found = None
    low, high = gentle, harsh
    for look in range(LOOKS):
        tried = high if look == 0 else (low + high) / 2
        attacked = attack(model, data, seed, tried)
        if accuracy(attacked) >= least:
            low, found = tried, attacked
            if look == 0:
                break
        else:
            high = tried
    return attack(model, data, seed, gentle) if found is None else found
