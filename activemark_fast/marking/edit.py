"""The closed-form edit: places a keyed mark in the suffix's MLPs, without a gradient.

The suffix has to learn linear maps of rank M, from the injected directions U to the read-out P. As in
linear model editing (ROME, Meng et al. 2022; MEMIT, Meng et al. 2023) it is written into the last linear
layer of each block's MLP, block after block, each closing its share of what is still missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.codec.codebooks import BANDS, LOUD, NATURAL, Codebook
from activemark_fast.marking.engine import GROUPS, Engine, halving
from activemark_fast.marking.quality import Fidelity
from activemark_fast.progress import Progress
from activemark_fast.site import Site

CLEAN_ROWS = 8
"""Rows of clean hidden activations in the solve, at least, for each of its unknowns (where there are any)."""
COLUMN_PARTS = 4
LOOKS = 4
"""Most strengths of a band whose fidelity is measured."""
UNUSED = 0.1
"""How much of the loss of fidelity that is allowed may be left."""
LARGEST_FACTOR = 4.0
"""A band is made at most so many times as strong as it was solved for."""
NATURAL_SHARE = 0.5
"""Share of the allowed loss of fidelity that goes to the natural band; the loud one takes the rest."""


@dataclass(frozen=True)
class Dials:
    """How the edit of one band is solved.

    Attributes:
        gain: what a reading should show for each unit that was injected: gamma in `edit`.
        protection: weight of the clean activations, which the edit should not react to: lambda in `edit`.
        ridge: identity term of the solve, over the mean diagonal of its matrix. A small one hides the edit in
            directions that clean images hardly use.
        whole: whether the edit also takes away what the model answers by itself; else it only adds what each
            row lacks on average.
    """

    gain: float
    protection: float
    ridge: float
    whole: bool


DIALS = {
    LOUD.name: Dials(gain=0.65, protection=15.0, ridge=0.01, whole=True),
    NATURAL.name: Dials(gain=0.3, protection=15.0, ridge=0.5, whole=False),
}

Changes = list[dict[str, Tensor]]
"""Of each edited block, by band: (D, H) float32."""


@torch.no_grad()
def search_edit(
    backbone: Backbone,
    books: Sequence[Codebook],
    site: Site,
    output: Tensor,
    sent: Sequence[Tensor],
    fidelity: Callable[[], Fidelity],
    wanted: float,
    engine: Engine,
    bar: Progress,
) -> list[dict[str, float | str]]:
    """Edits `backbone` in place, as strongly as the fidelity asked for allows.

    One edit is solved for, band by band. The natural band's change of the weights is then scaled until half
    of the allowed loss of fidelity is used up, and the loud one's until all of it is. Where even the weakest
    strength that was looked at costs too much, the band is left out: fidelity wins.

    Args:
        backbone: the model to mark.
        books: on the backbone's device.
        site: where the mark goes.
        output: (n, N, D), clean output of the site's block.
        sent: for each codebook (its images, M) of 0 and 1; see `edit`.
        fidelity: measures the edited model.
        wanted: fidelity asked for (`Fidelity.loss`).
        engine: how to compute.
        bar: shows the steps.

    Returns:
        Every strength tried, and what was measured.
    """
    matrices = [backbone.mlp_matrix(block) for block in range(site.block + 1, site.taps[-1] + 1)]
    originals = [matrix.clone() for matrix in matrices]

    def solved(batch: int) -> Changes:
        for matrix, weight in zip(matrices, originals, strict=True):
            matrix.copy_(weight)  # an earlier try may have run out of memory half way
        bar.stage("edit", len(matrices))
        return edit(backbone, books, site, output, sent, replace(engine, batch=batch), bar)

    changes = halving(solved, engine.batch)
    factors = {band.name: 0.0 for band in BANDS}
    history: list[dict[str, float | str]] = []

    def apply() -> None:
        for matrix, weight, change in zip(matrices, originals, changes, strict=True):
            edited = weight.float() + sum(factors[band] * part for band, part in change.items())
            matrix.copy_(edited)

    lost = 0.0
    for band, share in ((NATURAL, NATURAL_SHARE), (LOUD, 1.0)):
        room = share * (1 - wanted) - lost
        tried: dict[float, float] = {}  # loss of fidelity over `lost`, of each factor that was looked at
        factor = 1.0
        bar.stage(f"edit: strength of the {band.name} band", LOOKS)
        while True:
            factors[band.name] = factor
            apply()
            reached = fidelity()
            history.append({"stage": f"edit: {band.name}", "factor": factor, **asdict(reached)})
            bar.advance(fidelity=reached.mean)
            tried[factor] = reached.loss - lost if math.isfinite(reached.loss) else math.inf
            following = _next_factor(tried, room)
            enough = (1 - UNUSED) * room <= tried[factor] <= room
            if enough or following in tried or len(tried) == LOOKS:
                break
            factor = following
        allowed = [tried_factor for tried_factor, cost in tried.items() if cost <= room]
        factors[band.name] = max(allowed, default=0.0)
        lost += tried.get(factors[band.name], 0.0)
    apply()
    return history


def _next_factor(tried: dict[float, float], room: float) -> float:
    """A factor that should lose a bit less than there is room for. The loss grows with about its square.

    tried: the loss of each factor so far; the last two tell which power.
    """
    (factor, lost), *before = reversed(tried.items())
    power = 2.0
    if before and 0 < lost < math.inf and 0 < before[0][1] < math.inf:
        other, less = before[0]
        power = min(max(math.log(lost / less) / math.log(factor / other), 1.0), 4.0)
    change = (1 - UNUSED / 2) * room / max(lost, 1e-9)
    return min(factor * max(change, 1e-3) ** (1 / power), LARGEST_FACTOR)


@torch.no_grad()
def edit(
    backbone: Backbone,
    books: Sequence[Codebook],
    site: Site,
    output: Tensor,
    sent: Sequence[Tensor],
    engine: Engine,
    bar: Progress,
) -> Changes:
    """Writes the mark into `backbone`'s weights, in place.

    Image i is injected into with codebook i mod K of K, once with what is sent and once with its opposite.
    For each block after the site up to the last tap, with k the hidden activations of its MLP, h its output,
    and Δ half the difference of the two runs, all averaged over groups of patch tokens: δ is what is still
    missing in the projection P of Δh, a share 1 / (blocks left to the tap) of it, and for each band

        ΔW = P^T E[δ Δk^T] (E[Δk Δk^T] + lambda E[k₀ k₀^T] + ε I)^-1

    with k₀ the hidden activations of tokens of clean images, whose mean square is scaled to that of Δk. In
    the loud band δ = gamma s (2m - 1) - P Δh. In the natural one δ = c s (2m - 1), with c what the row's
    answer to its own bit lacks of gamma on average, or 0: what the model answers to other bits is let be.
    Each block runs once: what ΔW adds to its output follows from k, which is kept until ΔW is known.

    Args:
        backbone: the model to mark.
        books: on the backbone's device.
        site: where the mark goes.
        output: (n, N, D), clean output of the site's block.
        sent: for each codebook (its images, M) of 0 and 1.
        engine: how to compute.
        bar: moves on with every block.

    Returns:
        ΔW of each block and band.

    Raises:
        ValueError: a block is not pre-norm residual, its LayerScale is 0 in some channel, or its MLP's hidden
            activations are all 0 or not finite.
    """
    blocks = range(site.block + 1, site.taps[-1] + 1)
    gains = {block: backbone.mlp_gain(block) for block in blocks}
    silent = torch.stack([(gain == 0).any() for gain in gains.values()]).tolist()
    if any(silent):
        raise ValueError(
            f"model: block {blocks[silent.index(True)]} scales a channel of its MLP by 0, "
            "so it cannot carry a mark"
        )
    streams = _streams(books, output, sent, engine)
    changes: Changes = []
    failed = []
    for block in blocks:
        tap = next(t for t in site.taps if t >= block)
        moments, hidden = _moments(backbone, books, block, tap, streams, 1 / (tap - block + 1), engine)
        change: dict[str, Tensor] = {}
        added: list[tuple[Tensor, Tensor]] = []
        for band in BANDS:
            members = [book for book in books if book.band == band]
            solution, info = _solve(moments, band.name, [books.index(book) for book in members])
            failed.append(info)
            read = torch.cat([book.read_directions[tap] for book in members])  # (rows, D)
            change[band.name] = (solution @ (read.double() / gains[block].double())).T.float()
            added.append((solution, read))
        del moments
        weight = backbone.mlp_matrix(block)
        weight += torch.stack(list(change.values())).sum(dim=0).to(weight.dtype)
        changes.append(change)
        for index, k in enumerate(hidden):
            stream = engine.fetch(streams[index].values)
            there = engine.fetch(k)
            for solution, read in added:
                stream += ((there @ solution.to(k.dtype)).float() @ read).to(stream.dtype)
            streams[index].values = engine.keep(stream)
            hidden[index] = k.new_empty(0)
        del k, stream, there  # the next block runs without them
        bar.advance()
    # A look at each while they are solved would have the device wait for the host.
    bad = torch.stack(failed).view(len(blocks), len(BANDS)).any(dim=1).tolist()
    if any(bad):
        raise ValueError(
            f"model: the MLP of block {blocks[bad.index(True)]} is silent, or its activations are not "
            "finite, so it cannot carry a mark"
        )
    return changes


@dataclass(eq=False)
class _Stream:
    """The residual stream of some images.

    Attributes:
        values: (3, b, N, D): clean, with what is sent, with its opposite; where `engine.keep` puts it.
        book: index of the codebook.
        signs: (b, M) of +1 and -1, what is sent.
    """

    values: Tensor
    book: int
    signs: Tensor


def _streams(
    books: Sequence[Codebook], output: Tensor, sent: Sequence[Tensor], engine: Engine
) -> list[_Stream]:
    streams = []
    for index, (book, bits) in enumerate(zip(books, sent, strict=True)):
        mine = output[index :: len(books)]
        for start in range(0, len(mine), engine.batch):
            clean = engine.fetch(mine[start : start + engine.batch])
            part = bits[start : start + engine.batch]
            both = book.inject(clean, clean, part).view(2, *clean.shape)
            signs = 2 * part.float() - 1
            streams.append(_Stream(engine.keep(torch.cat([clean[None], both])), index, signs))
    return streams


@dataclass(frozen=True, eq=False)
class _Moments:
    """What the solves of a block need.

    Attributes:
        clean: (H, H) float32, E[k₀ k₀^T], lower triangle only.
        changed: for each band, likewise E[Δk Δk^T].
        cross: for each codebook (H, M) float32, E[Δk δ^T].
    """

    clean: Tensor
    changed: dict[str, Tensor]
    cross: list[Tensor]


def _moments(
    backbone: Backbone,
    books: Sequence[Codebook],
    block: int,
    tap: int,
    streams: list[_Stream],
    share: float,
    engine: Engine,
) -> tuple[_Moments, list[Tensor]]:
    """Runs a block over `streams`, in place, and gathers what its solves need.

    Returns:
        The moments; the hidden activations (3, b, N, H) of each batch.
    """
    seen: list[Tensor] = []
    linear = backbone.carrier(block)
    size, device = linear.weight.shape[1], backbone.device
    clean = torch.zeros(size, size, device=device)
    changed = {band.name: torch.zeros(size, size, device=device) for band in BANDS}
    cross = [torch.zeros(size, book.bits, device=device) for book in books]
    answers = [torch.zeros(book.bits, device=device) for book in books]
    images = [
        sum(stream.values.shape[1] for stream in streams if stream.book == i) for i in range(len(books))
    ]
    tokens = streams[0].values.shape[2]
    pool = _slot_groups(len(books[0].slots), device)
    stride = max(1, sum(images) * tokens // (CLEAN_ROWS * size))
    rows = sum(-(-stream.values.shape[1] * tokens // stride) for stream in streams)
    hidden: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        for stream in streams:
            book = books[stream.book]
            dials = DIALS[book.band.name]
            values = engine.fetch(stream.values)
            seen.clear()
            with engine.autocast():
                after = backbone.run(values.flatten(0, 1), block, block + 1).view_as(values)
            k = backbone.hidden(block, seen.pop(), 3 * values.shape[1]).reshape(*values.shape[:3], size)
            _add_gram(clean, k[0].flatten(0, 1)[::stride], 1 / rows)
            # Over the injected length, so that bands of other lengths weigh the same.
            length = book.scale * math.sqrt(book.bits)
            change = _half_difference(k, book.slots, pool) / length  # (b, G, H)
            answer = (_half_difference(after, book.slots, pool) @ book.read_directions[tap].T) / length
            wanted = stream.signs[:, None] / math.sqrt(book.bits)  # (b, 1, M), of a gain of 1
            missing = share * (dials.gain * wanted - answer) if dials.whole else wanted.expand_as(answer)
            weight = 1 / (len(pool) * images[stream.book])
            flat = change.flatten(0, 1)
            _add_gram(changed[book.band.name], flat.to(k.dtype), weight / book.band.books)
            cross[stream.book].addmm_(flat.T, missing.flatten(0, 1), alpha=weight / book.band.books)
            answers[stream.book] += (answer * stream.signs[:, None]).sum(dim=(0, 1)) * weight
            stream.values = engine.keep(after.to(values.dtype))
            hidden.append(engine.keep(k))
    finally:
        hook.remove()
    for index, book in enumerate(books):
        dials = DIALS[book.band.name]
        if not dials.whole:
            cross[index] *= share * (dials.gain - answers[index] * math.sqrt(book.bits)).clamp_min(0)
    return _Moments(clean, changed, cross), hidden


def _half_difference(values: Tensor, slots: Tensor, pool: Tensor) -> Tensor:
    """(3, b, N, ...) → (b, G, ...) float32: what the injections change, mean over groups of slots."""
    return (pool @ values[1][:, slots].float() - pool @ values[2][:, slots].float()) / 2


def _slot_groups(slots: int, device: torch.device) -> Tensor:
    """(G, slots): the mean over each of the groups, which hold every G-th slot."""
    groups = min(GROUPS, slots)
    pool = torch.zeros(groups, slots, device=device)
    slot = torch.arange(slots, device=device)
    pool[slot % groups, slot] = 1.0
    return pool / pool.sum(dim=1, keepdim=True)


def _add_gram(matrix: Tensor, rows: Tensor, weight: float) -> None:
    """Adds weight * rows^T rows to the lower triangle of `matrix`; above it, what the parts bring along.

    Half-precision rows are multiplied as they are on CUDA, and the products added up in float32.
    """
    rows = rows if rows.device.type == "cuda" else rows.float()
    step = -(-len(matrix) // COLUMN_PARTS)
    for start in range(0, len(matrix), step):
        part = slice(start, start + step)
        left, right = rows[:, start:].T, rows[:, part]
        if rows.dtype == torch.float32:
            matrix[start:, part].addmm_(left, right, alpha=weight)
        else:
            matrix[start:, part].add_(torch.mm(left, right, torch.float32), alpha=weight)


def _solve(moments: _Moments, band: str, books: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Reads the lower triangles of the moments.

    Returns:
        (H, rows) float64, and what LAPACK tells: 0 where the matrix was positive definite.
    """
    dials = DIALS[band]
    changed = moments.changed[band]
    balance = changed.diagonal().mean() / moments.clean.diagonal().mean()
    wide = (changed + dials.protection * balance * moments.clean).double()
    wide.diagonal().add_(dials.ridge * wide.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(wide)
    del wide  # what follows copies the factor
    cross = torch.cat([moments.cross[book] for book in books], dim=1).double()
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True), info
