"""The traced rows of a mark: what they take of each matrix, how strong they may be, what they answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.codec.codebooks import TRACED, Codebook, SiteMeasure, balanced_bits, codebooks, draw_sent
from activemark_fast.key import Key
from activemark_fast.marking.cosine import Fidelity
from activemark_fast.marking.edit import Step, edit_steps, solve_rows
from activemark_fast.marking.engine import Engine
from activemark_fast.marking.memory import halving
from activemark_fast.marking.reading import Channel
from activemark_fast.marking.strength import LARGEST_FACTOR, LOOKS, best_strength
from activemark_fast.marking.suffix import Autocast, SiteActivations
from activemark_fast.progress import Progress
from activemark_fast.site import Site
from activemark_fast.tracing import Change, changed, draw_biases, example_codeword

SHARE = 0.2
"""Share of the allowed loss of fidelity that goes to the traced rows of a copy, where there are any."""
IMAGES = 32
"""Images, made from the key, that traced rows are read on. 64 read twice told a pruned copy hardly better."""


def traced_steps(backbone: Backbone, site: Site) -> list[Step]:
    """The layers that carry the traced rows: the last of each MLP, in equal shares for each tap.

    Raises:
        ValueError: as `edit_steps`.
    """
    steps = [step for step in edit_steps(backbone, site) if step.last]
    taps = Counter(step.tap for step in steps)
    return [replace(step, shares={TRACED.name: 1 / taps[step.tap]}) for step in steps]


def traced_channels(
    stretched: Key, site: Site, bits: int, measured: SiteMeasure, device: torch.device
) -> list[Channel]:
    """What the traced rows are read with.

    stretched: the key that the mark is drawn from. measured: on the original model.
    """
    books = codebooks(stretched, site, bits, measured, (TRACED,))
    sent = draw_sent(stretched, "traced", IMAGES, bits, (TRACED,))
    return [Channel(book.to(device), part.to(device)) for book, part in zip(books, sent, strict=True)]


@torch.no_grad()
def row_answers(
    backbone: Backbone,
    channels: Sequence[Channel],
    activations: SiteActivations,
    block: int,
    autocast: Autocast,
) -> Tensor:
    """(taps, books, bits) float64 on the CPU: what each row answers to its own bit, mean over all readings.

    activations: at the site, of the `IMAGES` images.
    """
    means = [
        channel.agreement(backbone, activations, 0, block, autocast).double().mean(dim=(1, 2))
        for channel in channels
    ]
    return torch.stack(means, dim=1).cpu()


@torch.no_grad()
def search_changes(
    backbone: Backbone,
    books: Sequence[Codebook],
    site: Site,
    stretched: Key,
    key: Key,
    output: Tensor,
    fidelity: Callable[[], Fidelity],
    wanted: float,
    engine: Engine,
    bar: Progress,
) -> tuple[dict[str, Change], list[dict[str, float | str]]]:
    """Solves for the changes that make the copies of a marked model, as strong as the fidelity allows.

    The fidelity is that of a copy with a codeword that is nobody's: what all copies share may depend on no
    recipient's.

    Args:
        backbone: the marked model; it is left as it was.
        books: traced, on the backbone's device.
        site: where the mark is.
        stretched: the key that the mark is drawn from.
        key: the key that codewords are drawn from.
        output: (n, N, D), clean output of the site's block.
        fidelity: measures the model.
        wanted: fidelity asked for (`Fidelity.loss`).
        engine: how to compute.
        bar: shows the steps.

    Returns:
        The changes by the names of the matrices, and every strength that was tried.

    Raises:
        ValueError: the fidelity leaves no room for them.
    """
    bits = books[0].bits
    sent = [
        torch.from_numpy(
            balanced_bits(stretched.stream(f"messages/traced/edit/{i}"), len(output[i :: len(books)]), bits)
        ).to(backbone.device)
        for i in range(len(books))
    ]

    def solved(batch: int) -> list[Tensor]:
        bar.stage("traced rows", len(steps))
        return solve_rows(backbone, books, steps, output, sent, replace(engine, batch=batch), bar)

    steps = traced_steps(backbone, site)
    solutions = halving(solved, engine.batch)
    names = {id(parameter): name for name, parameter in backbone.model.named_parameters()}
    rows = len(books) * bits
    changes = {}
    for step, right in zip(steps, solutions, strict=True):
        read = torch.cat([book.read_directions[step.tap] for book in books])
        left = (read / step.gain).float().cpu()
        changes[names[id(step.layer.weight)]] = Change(site.taps.index(step.tap) * rows, left, right.cpu())
    word = example(key, len(site.taps) * rows)
    marked = {name: backbone.model.get_parameter(name).detach().clone() for name in changes}

    def scaled(factor: float) -> dict[str, Change]:
        return {name: replace(change, right=factor * change.right) for name, change in changes.items()}

    def apply(factor: float) -> None:
        backbone.model.load_state_dict(marked, strict=False)
        backbone.model.load_state_dict(changed(backbone.model, scaled(factor), word), strict=False)

    history: list[dict[str, float | str]] = []
    bar.stage("traced rows: strength", LOOKS)
    lost = fidelity().loss
    room = 1 - wanted - lost
    factor, _ = best_strength(apply, fidelity, TRACED.name, lost, room, 1.0, LARGEST_FACTOR, history, bar)
    backbone.model.load_state_dict(marked, strict=False)
    if factor == 0:
        raise ValueError(
            f"recipients: no copies can be told apart at a fidelity of {wanted}: a lower one would do"
        )
    return scaled(factor), history


def example(key: Key, positions: int) -> Tensor:
    """(positions,) of booleans on the CPU: the codeword of nobody."""
    return torch.from_numpy(example_codeword(key, draw_biases(key, positions)))
