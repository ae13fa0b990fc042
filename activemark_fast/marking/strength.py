"""How strong an edit is: as strong as the fidelity asked for allows, found by scaling the one change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.codec.codebooks import BANDS, LOUD, NATURAL, Codebook
from activemark_fast.codec.passive import PASSIVE, Rows
from activemark_fast.marking.cosine import Fidelity
from activemark_fast.marking.edit import Changes, Step, edit
from activemark_fast.marking.engine import Engine
from activemark_fast.marking.memory import halving
from activemark_fast.progress import Progress

LOOKS = 4
"""Most strengths of a band whose fidelity is measured."""
UNUSED = 0.1
"""How much of the loss of fidelity that is allowed may be left."""
LARGEST_FACTOR = 4.0
"""A band is made at most so many times as strong as it was solved for."""
PASSIVE_SHARE, LOUD_SHARE = 0.3, 0.75
"""Most of the allowed loss of fidelity that the passive band may use, and it and the loud one together; the
natural one takes the rest."""
FIRST_FACTORS = {PASSIVE: 1.0, LOUD.name: 0.45, NATURAL.name: 1.4}
"""What is looked at first: about what a fidelity of 0.998 allows most models."""
LOUD_MARGIN = 2.5
"""A loud band that is read more clearly than this is made weaker, and leaves more to the natural one."""


@torch.no_grad()
def search_edit(
    backbone: Backbone,
    books: Sequence[Codebook],
    passive: Mapping[int, Rows],
    steps: Sequence[Step],
    originals: Sequence[Tensor],
    output: Tensor,
    sent: Sequence[Tensor],
    fidelity: Callable[[bool], Fidelity],
    margin: Callable[[], float],
    wanted: float,
    engine: Engine,
    bar: Progress,
) -> tuple[list[dict[str, float | str]], Fidelity | None]:
    """Edits `backbone` in place, as strongly as the fidelity asked for allows.

    One edit is solved for, band by band. The loud band's change of the weights is then scaled until its share
    of the allowed loss of fidelity is used up, or less where its reading is clearer than `LOUD_MARGIN`; the
    natural one's until all of the loss is. Where even the weakest strength that was looked at costs too much,
    the band is left out: fidelity wins.

    Args:
        backbone: the model to mark.
        books: on the backbone's device.
        passive: what is read of each block without injection.
        steps: as `edit_steps` gives them.
        originals: the unmarked matrix of each step, of whatever shape and wherever it is.
        output: (n, N, D), clean output of the site's block.
        sent: for each codebook (its images, M) of 0 and 1; see `edit`.
        fidelity: measures the edited model, at a glance (True) where a later band takes what is left anyway.
        margin: how clearly the loud band is read from it (`Quality.margin`).
        wanted: fidelity asked for (`Fidelity.loss`).
        engine: how to compute.
        bar: shows the steps.

    Returns:
        Every strength tried, and what was measured; the fidelity of the edited model, None where the natural
        band was left out.
    """
    matrices = [step.matrix for step in steps]

    def original(index: int) -> Tensor:
        return engine.fetch(originals[index]).view_as(matrices[index])

    def solved(batch: int) -> Changes:
        for index, matrix in enumerate(matrices):
            matrix.copy_(original(index))  # an earlier try may have run out of memory half way
        bar.stage("edit", len(steps))
        return edit(backbone, books, passive, steps, output, sent, replace(engine, batch=batch), bar)

    changes = halving(solved, engine.batch)
    factors = {PASSIVE: 0.0} | {band.name: 0.0 for band in BANDS}
    history: list[dict[str, float | str]] = []

    def apply() -> None:
        for index, (matrix, change) in enumerate(zip(matrices, changes, strict=True)):
            parts = (factors[band] * part.matrix for band, part in change.items() if factors[band])
            matrix.copy_(original(index).float() + sum(parts))

    lost, found = 0.0, None
    shares = {PASSIVE: PASSIVE_SHARE, LOUD.name: LOUD_SHARE, NATURAL.name: 1.0}
    for band, share in shares.items():
        if band == PASSIVE and not passive:
            continue

        def made(factor: float, name: str = band) -> None:
            factors[name] = factor
            apply()

        bar.stage(f"edit: strength of the {band} band", LOOKS)
        room = share * (1 - wanted) - lost
        most = 1.0 if band == PASSIVE else LARGEST_FACTOR
        first = FIRST_FACTORS[band]
        look = partial(fidelity, band != NATURAL.name)
        best, found = best_strength(made, look, band, lost, room, first, most, history, bar)
        if best != factors[band]:
            made(best)
        lost = lost if found is None else found.loss
        if band == LOUD.name and (read := margin()) > LOUD_MARGIN:
            made(best * LOUD_MARGIN / read)
            lost *= (LOUD_MARGIN / read) ** 2
    return history, found


def best_strength(
    apply: Callable[[float], None],
    fidelity: Callable[[], Fidelity],
    band: str,
    lost: float,
    room: float,
    first: float,
    most: float,
    history: list[dict[str, float | str]],
    bar: Progress,
) -> tuple[float, Fidelity | None]:
    """The strongest factor that costs no more fidelity than there is room for.

    Args:
        apply: makes the model's change so many times as strong as it was solved for.
        fidelity: measures the model.
        band: what is changed.
        lost: loss of fidelity without the change.
        room: how much more may be lost.
        first: the factor to look at first.
        most: the largest factor.
        history: every factor tried is added, with what was measured.
        bar: shows the looks.

    Returns:
        The factor, and the fidelity with it; 0 and None where even the weakest one tried costs too much. The
        model is left with the last one tried.
    """
    found: dict[float, Fidelity] = {}
    factor = first
    while True:
        apply(factor)
        found[factor] = reached = fidelity()
        history.append({"stage": f"edit: {band}", "factor": factor, **asdict(reached)})
        bar.advance(fidelity=reached.mean)
        losses = [look.loss - lost if math.isfinite(look.loss) else math.inf for look in found.values()]
        tried = dict(zip(found, losses, strict=True))
        following = _next_factor(tried, room, most)
        enough = (1 - UNUSED) * room <= tried[factor] <= room
        if enough or following in tried or len(tried) == LOOKS:
            break
        factor = following
    best = max((factor for factor, loss in tried.items() if loss <= room), default=0.0)
    return best, found.get(best)


def _next_factor(tried: dict[float, float], room: float, most: float) -> float:
    """A factor that should lose a bit less than there is room for. The loss grows with about its square.

    Args:
        tried: the loss of each factor so far; the last two tell which power.
        room: how much may be lost.
        most: the largest factor.
    """
    (factor, lost), *before = reversed(tried.items())
    power = 2.0
    if before and 0 < lost < math.inf and 0 < before[0][1] < math.inf:
        other, less = before[0]
        power = min(max(math.log(lost / less) / math.log(factor / other), 1.0), 4.0)
    change = (1 - UNUSED / 2) * room / max(lost, 1e-9)
    return min(factor * max(change, 1e-3) ** (1 / power), most)
