"""forge: play the thief who claims somebody else's model, and measure how far that gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from activemark_fast.backbone import Backbone
from activemark_fast.forge.fields import arguments, fields
from activemark_fast.forge.fitted import learned_codec, own_alignment, own_images, own_normalisation
from activemark_fast.forge.formats import massive_channels
from activemark_fast.forge.keys import keys_guessed, keys_read, padded_keys, paid_settings
from activemark_fast.forge.thief import Attempt, Thief
from activemark_fast.freedoms import EVIDENCE_AT
from activemark_fast.progress import Progress
from activemark_fast.runtime import resolve_device


@dataclass(frozen=True)
class Way:
    """A way of forging.

    Attributes:
        play: takes the forger and until when (`Thief.now`) to go on, and presents at least one claim to
            `verify`, however little time there is.
        share: how much of the time it gets, over the others'.
    """

    play: Callable[[Thief, float], list[Attempt]]
    share: float


WAYS: tuple[Way, ...] = (
    Way(padded_keys, 0.1),
    Way(arguments, 0.5),
    Way(fields, 1.5),
    Way(learned_codec, 1),
    Way(own_images, 1),
    Way(own_normalisation, 1),
    Way(own_alignment, 1),
    Way(massive_channels, 2),
    Way(paid_settings, 1),
    Way(keys_read, 0.5),
    Way(keys_guessed, 1.5),
)
"""All ways there are, in the order they are played. A further one belongs here."""


@dataclass(frozen=True)
class Forgery:
    """What a forger achieved.

    Attributes:
        attempts: every claim that was presented to `verify`.
    """

    attempts: tuple[Attempt, ...]

    @property
    def smallest(self) -> float | None:
        """The smallest paid p-value of a claim that `verify` took to rest on nothing chosen."""
        return min((a.counts for a in self.attempts if a.counts is not None), default=None)

    def __str__(self) -> str:
        named = [a for a in self.attempts if a.decision == "match" and a.chosen]
        if self.smallest is None:
            found = "no claim was read"
        else:
            worth = "EVIDENCE" if self.smallest <= EVIDENCE_AT else "no evidence"
            found = f"smallest paid p-value of {len(self.attempts)} claims: {self.smallest:.3g}, {worth}"
        dismissed = f"{len(named)} further claims match, and verify calls them no evidence by themselves"
        return "\n".join([*map(str, self.attempts), "", found, dismissed])

    def to_dict(self) -> dict[str, object]:
        """The figures as JSON types."""
        return {"smallest_paid_p_value": self.smallest, "attempts": [asdict(a) for a in self.attempts]}


def forge(
    suspect: nn.Module,
    *,
    minutes: float = 10,
    seed: int = 0,
    device: str | torch.device | None = None,
    precision: str = "auto",
    ways: Sequence[Way] | None = None,
    progress: bool = False,
) -> Forgery:
    """Tries to claim `suspect`, which was not marked, within a budget of time.

    Args:
        suspect: a plain ViT. It is not changed.
        minutes: budget for all ways together, shared as `WAYS` says; what one leaves over goes to the next
            ones. Each presents its claim, so a tiny budget is overdrawn by the readings of `verify`.
        seed: of the forger's keys; how far they get in the time depends on the machine.
        device: where to compute; by default where the suspect is.
        precision: as in `embed`.
        ways: those to play; all of `WAYS` by default.
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
    device = resolve_device(device, Backbone(suspect).device)
    attempts: list[Attempt] = []
    with Progress(progress) as bar:
        bar.stage("profile", 1)
        started = Thief.now()
        thief = Thief.of(suspect, seed, device, precision, bar)
        chosen = WAYS if ways is None else ways
        shares = [way.share for way in chosen]
        for index, way in enumerate(chosen):
            bar.stage(way.play.__name__.replace("_", " "), 0)
            left = started + 60 * minutes - thief.now()
            deadline = thief.now() + max(0.0, left) * way.share / sum(shares[index:])
            attempts += way.play(thief, deadline)
    return Forgery(tuple(attempts))
