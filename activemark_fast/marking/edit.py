"""The closed-form edit: places a keyed mark in the suffix's weights, without a gradient.

The suffix has to learn linear maps of rank M, from the injected directions U to the read-out P. As in
linear model editing (ROME, Meng et al. 2022; MEMIT, Meng et al. 2023) it is written into the linear layers
that add to the residual stream, one after the other, each closing its share of what is still missing: both
bands into the last one of each block's MLP, the natural band also into attention's output. A model may do
without its late MLPs, but then not without its attention. Where an MLP is gated, the loud band is written
into attention too: what a product of two layers answers to an injection averages out over tokens.

Long, for the streams, the moments gathered from them and the solves are one computation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone, Layer
from activemark_fast.codec.codebooks import BANDS, LOUD, NATURAL, TRACED, Codebook
from activemark_fast.codec.passive import PASSIVE, Moments, Rows, inputs_and_answers
from activemark_fast.dress import fixed_weight
from activemark_fast.marking.engine import GROUPS, Engine
from activemark_fast.progress import Progress
from activemark_fast.ranks import Ranks, Task
from activemark_fast.site import Site
from activemark_fast.towers import Stop

CLEAN_ROWS = 8
"""Rows of clean hidden activations in the solve, at least, for each of its unknowns (where there are any)."""
COLUMN_PARTS = 4
ATTENTION_WEIGHT = 4.0
"""Attention's output closes so many times the share of the natural band that an MLP does: a thief who zeroes
all MLPs, or fits new ones, leaves attention as it is."""


@dataclass(frozen=True)
class Dials:
    """How the edit of one band with injections is solved.

    Attributes:
        gain: what a reading should show for each unit that was injected: gamma in `edit`.
        protection: weight of the clean activations, which the edit should not react to: lambda in `edit`.
        ridge: identity term of the solve, over the mean diagonal of its matrix. A small one hides the edit in
            directions that clean images hardly use.
        answer: what the edit adds to a row's answer to its own bit: "lack" what that lacks of the gain on
            average; "all" the gain, whatever the model answers by itself.
    """

    gain: float
    protection: float
    ridge: float
    answer: Literal["lack", "all"]


DIALS = {
    LOUD.name: Dials(gain=0.65, protection=15.0, ridge=0.01, answer="lack"),
    NATURAL.name: Dials(gain=0.3, protection=15.0, ridge=0.5, answer="lack"),
    TRACED.name: Dials(gain=0.3, protection=15.0, ridge=0.5, answer="all"),
}
PASSIVE_GAIN = 8.0
"""What a row of the passive band should read, over the root mean square of what others do."""
PASSIVE_RIDGE = 0.01
"""Identity term of its solve, over the mean diagonal of its matrix."""


@dataclass(frozen=True, eq=False)
class Change:
    """What an edit adds to a matrix for one band: far fewer rows than the matrix has.

    Attributes:
        solution: (H, rows) float64.
        read: (rows, D) float64.
    """

    solution: Tensor
    read: Tensor

    @property
    def matrix(self) -> Tensor:
        """(D, H) float32."""
        return self.read.float().T @ self.solution.to(self.read.device).float().T


Changes = list[dict[str, Change]]
"""Of each step, by band."""


@dataclass(frozen=True, eq=False)
class Step:
    """One layer that the edit changes.

    Attributes:
        block: where it is.
        tap: what is written here is read after this block.
        layer: the live layer.
        gain: (D,), what one unit of its output adds to the stream.
        shares: for each band that is written here, the share of what is still missing that it closes.
        last: no layer of the block is changed after it.
    """

    block: int
    tap: int
    layer: Layer
    gain: Tensor
    shares: dict[str, float]
    last: bool

    @property
    def matrix(self) -> Tensor:
        """(D, H), a live view of the layer's weight."""
        return self.layer.weight.flatten(1)


def edit_steps(backbone: Backbone, site: Site) -> list[Step]:
    """The layers that an edit changes, in order.

    Raises:
        ValueError: a block is not pre-norm residual, or its LayerScale is 0 in some channel.
    """
    steps = []
    for block in range(site.block + 1, site.taps[-1] + 1):
        tap = next(t for t in site.taps if t >= block)
        gain = backbone.mlp_gain(block)
        if bool((gain == 0).any()):
            raise ValueError(
                f"model: block {block} scales a channel of its MLP by 0, so it cannot carry a mark"
            )
        attention = backbone.attention_out(block)
        # What is computed from other tensors would lose what is written to it.
        if attention is not None and bool(attention[1].all()) and fixed_weight(attention[0]) is None:
            bands = BANDS if backbone.gated(block) else (NATURAL,)
            steps.append(Step(block, tap, *attention, {band.name: 1.0 for band in bands}, last=False))
        steps.append(
            Step(block, tap, backbone.carrier(block), gain, {band.name: 1.0 for band in BANDS}, last=True)
        )
    for band in BANDS:
        for tap in site.taps:
            left = 0.0
            for step in reversed(steps):
                if step.tap == tap and band.name in step.shares:
                    weight = ATTENTION_WEIGHT if band == NATURAL and not step.last else 1.0
                    left += weight
                    step.shares[band.name] = weight / left
    return steps


@torch.no_grad()
def edit(
    backbone: Backbone,
    books: Sequence[Codebook],
    passive: Mapping[int, Rows],
    steps: Sequence[Step],
    output: Tensor,
    sent: Sequence[Tensor],
    engine: Engine,
    bar: Progress,
) -> Changes:
    """Writes the mark into `backbone`'s weights, in place.

    Image i is injected into with codebook i mod K of K, once with what is sent and once with its opposite.
    For each step, with k the input of its layer, h the output of its block, and Δ half the difference of the
    two runs, all averaged over groups of patch tokens: δ is what is still missing in the projection P of Δh,
    a share 1 / (steps left to the tap) of it, and for each band

        ΔW = P^T E[δ Δk^T] (E[Δk Δk^T] + lambda E[k₀ k₀^T] + ε I)^-1

    with k₀ the input of the layer for tokens of clean images, whose mean square is scaled to that of Δk, and
    δ = c s (2m - 1), with c what the row's answer to its own bit lacks of gamma on average, or 0. What the
    model answers to other bits is let be: readings are cleared of it (`reading.without_crosstalk`).
    In the passive band (`codec.passive`) ΔW is the ridge regression of B x, on clean images, on k₀, with
    B = g L_y^-T (sum over rows of u v^T) L_x^-1: of all maps of x it raises the rows most for its size.
    Each block runs once a step. What the last step's ΔW adds to its output follows from k, which is kept
    until ΔW is known.

    Args:
        backbone: the model to mark.
        books: on the backbone's device.
        passive: what is read of each block without injection; written into its last step.
        steps: as `edit_steps` gives them.
        output: (n, N, D), clean output of the site's block.
        sent: for each codebook (its images, M) of 0 and 1.
        engine: how to compute.
        bar: moves on with every step.

    Returns:
        ΔW of each step and band.

    Raises:
        ValueError: the inputs of a step's layer are all 0 or not finite.
    """
    streams = _streams(books, output, sent, engine)
    changes: Changes = []
    failed = []

    def solved(step: Step) -> dict[str, Tensor]:
        """The step's solutions by band, what LAPACK tells, and where the streams go on."""
        rows = passive.get(step.block) if step.last else None
        still = None
        if rows is not None:
            still = Moments(backbone.width, step.matrix.shape[1], backbone.device)
        moments, hidden = _moments(backbone, books, step, streams, engine, still)
        found: dict[str, Tensor] = {}
        added: list[tuple[Tensor, Tensor]] = []
        bands = [(band, [book for book in books if book.band.name == band]) for band in step.shares]
        solves: list[Task] = [
            partial(_solve, moments, band, [books.index(book) for book in members]) for band, members in bands
        ]
        if rows is not None and still is not None:
            solves.append(partial(_solve_passive, moments, still, rows))
        solutions = list(engine.ranks.each(solves, backbone.device))
        infos = torch.stack([info for _, info, *_ in solutions])
        for (band, members), (solution, _) in zip(bands, solutions, strict=False):
            found[band] = solution
            added.append((solution, _read(members, step)))
        if rows is not None:
            solution, _, read = solutions[-1]
            found[PASSIVE], found[f"{PASSIVE} read"] = solution, read
            added.append((solution, read.float()))
        del moments, solves, still, solutions
        solution = torch.cat([part for part, _ in added], dim=1)
        read = torch.cat([part for _, part in added])
        moved = {}
        for index, k in hidden.items():
            stream = engine.fetch(streams[index].values)
            there = engine.fetch(k)
            stream += there @ solution.to(k.dtype) @ read.to(k.dtype)  # as precise as the block itself
            moved[f"stream {index}"] = streams[index].values = engine.offload(stream)
            hidden[index] = k = there = k.new_empty(0)  # the next step runs without them
        return {**found, "failed": infos.any(), **moved}

    for number, step in enumerate(steps):
        made = engine.made(f"step-{number}", partial(solved, step))
        failed.append(made["failed"])
        changes.append({band: _change(made[band], books, band, step) for band in step.shares})
        if PASSIVE in made:
            read = made[f"{PASSIVE} read"] / step.gain.double()
            changes[-1][PASSIVE] = Change(made[PASSIVE], read)
        weight = step.matrix
        added = torch.stack([change.matrix for change in changes[-1].values()]).sum(dim=0)
        weight += added.to(weight.device, weight.dtype)  # which may not be where it is computed with
        for index, stream in enumerate(streams):
            stream.values = made.get(f"stream {index}", stream.values)
        del made  # the next step lets go of one stream after another
        bar.advance()
    # A look at each while they are solved would have the device wait for the host.
    bad = torch.stack(failed).tolist()
    if any(bad):
        raise _silent(steps[bad.index(True)])
    return changes


def _read(books: Sequence[Codebook], step: Step) -> Tensor:
    """(rows, D) float32: the directions that some books are read along behind a step."""
    return torch.cat([book.read_directions[step.tap] for book in books])


def _change(solution: Tensor, books: Sequence[Codebook], band: str, step: Step) -> Change:
    read = _read([book for book in books if book.band.name == band], step)
    return Change(solution, read.double() / step.gain.double())


def _silent(step: Step) -> ValueError:
    """What is wrong with a model whose moments have no solution at `step`."""
    return ValueError(
        f"model: the {'MLP' if step.last else 'attention'} of block {step.block} is silent, or its "
        "activations are not finite, so it cannot carry a mark"
    )


@torch.no_grad()
def solve_rows(
    backbone: Backbone,
    books: Sequence[Codebook],
    steps: Sequence[Step],
    output: Tensor,
    sent: Sequence[Tensor],
    engine: Engine,
    bar: Progress,
) -> list[Tensor]:
    """What each row of the traced `books` needs of each step to answer more: `backbone` stays as it is.

    As in `edit`, but every step gives the same share of the gain, and none reckons with what those before it
    add: which rows answer more and which less is known only when a recipient's codeword is.

    Args:
        backbone: the model.
        books: all of them traced, on the backbone's device.
        steps: as `traced_steps` gives them.
        output: (n, N, D), clean output of the site's block.
        sent: for each codebook (its images, M) of 0 and 1.
        engine: how to compute.
        bar: moves on with every step.

    Returns:
        Of each step, (rows, H) float32 A: with R the rows of P at its tap, over its gain, and c a codeword of
        +1 and -1, the change of a copy is (c R)^T A.

    Raises:
        ValueError: a block's MLP is silent, or its activations are not finite.
    """
    streams = _streams(books, output, sent, engine)
    solutions = []
    for step in steps:
        moments, _ = _moments(backbone, books, step, streams, engine)
        solution, info = _solve(moments, TRACED.name, range(len(books)))
        if int(info) != 0:
            raise _silent(step)
        solutions.append(solution.T.float())
        bar.advance()
    return solutions


@dataclass(eq=False)
class _Stream:
    """The residual stream of some images.

    Attributes:
        values: (3, b, N, D): clean, with what is sent, with its opposite; where `engine.offload` puts it. On
            "meta" where another process runs them.
        book: index of the codebook.
        signs: (b, M) of +1 and -1, what is sent.
    """

    values: Tensor
    book: int
    signs: Tensor


def _streams(
    books: Sequence[Codebook], output: Tensor, sent: Sequence[Tensor], engine: Engine
) -> list[_Stream]:
    streams: list[_Stream] = []
    for index, (book, bits) in enumerate(zip(books, sent, strict=True)):
        mine = output[index :: len(books)]
        for start in range(0, len(mine), engine.batch):
            clean = engine.fetch(mine[start : start + engine.batch])
            part = bits[start : start + engine.batch]
            signs = 2 * part.float() - 1
            if len(streams) % engine.ranks.count == engine.ranks.rank:
                both = book.inject(clean, clean, part).view(2, *clean.shape)
                values = engine.offload(torch.cat([clean[None], both]))
            else:
                values = clean.new_empty(3, *clean.shape, device="meta")
            streams.append(_Stream(values, index, signs))
    return streams


def _column_parts(size: int, ranks: Ranks) -> list[tuple[slice, int]]:
    """Parts of so many columns, and the process that adds each up: the same parts however many there are."""
    step = -(-size // COLUMN_PARTS)
    columns = [slice(start, min(start + step, size)) for start in range(0, size, step)]
    turns = cycle(range(2 * ranks.count))
    return [(part, min(turn, 2 * ranks.count - 1 - turn)) for part, turn in zip(columns, turns, strict=False)]


class _Gram:
    """A symmetric (H, H) float32 matrix: of each of a few parts of its columns, what is not above the part.

    Attributes:
        parts: the columns of each, and the process that adds it up; of two, as much each.
        blocks: of each part, (H - its start, its columns); what is above the diagonal counts for nothing.
    """

    def __init__(self, size: int, device: torch.device, ranks: Ranks) -> None:
        self.parts = _column_parts(size, ranks)
        self.blocks = [
            torch.zeros(size - part.start, part.stop - part.start, device=device) for part, _ in self.parts
        ]

    def add(self, rows: Tensor, weight: float, ranks: Ranks) -> None:
        """Adds weight * rows^T rows to this process's parts.

        Half-precision rows are multiplied as they are on CUDA, and the products added up in float32.
        """
        rows = rows if rows.device.type == "cuda" else rows.float()
        for block, (part, owner) in zip(self.blocks, self.parts, strict=True):
            if owner != ranks.rank:
                continue
            left, right = rows[:, part.start :].T, rows[:, part]
            if rows.dtype == torch.float32:
                block.addmm_(left, right, alpha=weight)
            else:
                block.add_(torch.mm(left, right, torch.float32), alpha=weight)

    def exchange(self, ranks: Ranks) -> None:
        """Gives every process the parts that others have added up."""
        if ranks.count > 1:
            self.blocks = [
                ranks.sent(owner, [block], block.device)[0]
                for block, (_, owner) in zip(self.blocks, self.parts, strict=True)
            ]

    def mean(self) -> Tensor:
        """(), of the diagonal."""
        diagonal = torch.cat([block.diagonal() for block in self.blocks])
        # With a stride it is summed in the order of a whole matrix's diagonal: marks keep their bits.
        return diagonal[:, None].expand(-1, 2).contiguous()[:, 0].mean()


@dataclass(frozen=True, eq=False)
class _Moments:
    """What the solves of a step need.

    Attributes:
        clean: E[k₀ k₀^T].
        changed: for each band E[Δk Δk^T].
        cross: for each codebook (H, M) float32, E[Δk δ^T].
        rows: tokens that the clean ones are of.
    """

    clean: _Gram
    changed: dict[str, _Gram]
    cross: list[Tensor]
    rows: int


def _moments(
    backbone: Backbone,
    books: Sequence[Codebook],
    step: Step,
    streams: list[_Stream],
    engine: Engine,
    still: Moments | None = None,
) -> tuple[_Moments, dict[int, Tensor]]:
    """Runs a block over `streams` and gathers what a step's solves need. The last step moves them on.

    Of a step before the last, the block runs as far as its layer, and Δh is taken from behind it.
    Of several processes each runs some of the streams, and adds up some columns of the matrices.

    Long, for the run of a stream and the sums over all share their matrices.

    At a last step `still` takes what the passive band needs.

    Returns:
        The moments; of the last step, its layer's inputs (3, b, N, H) for each of the streams run here.
    """
    layer, tap = step.layer, step.tap
    size, device = step.matrix.shape[1], backbone.device
    ranks = engine.ranks
    clean = _Gram(size, device, ranks)
    changed = {band: _Gram(size, device, ranks) for band in step.shares}
    cross = [torch.zeros(size, book.bits, device=device) for book in books]
    answers = [torch.zeros(book.bits, device=device) for book in books]
    images = [
        sum(stream.values.shape[1] for stream in streams if stream.book == i) for i in range(len(books))
    ]
    tokens = streams[0].values.shape[2]
    still_parts = _column_parts(backbone.width, ranks)
    own_parts = [part for part, owner in still_parts if owner == ranks.rank]
    pool = _slot_groups(len(books[0].slots), tokens, device)
    # Those of a band that is not written here run only to be moved on.
    running = [stream for stream in streams if step.last or books[stream.book].band.name in step.shares]
    count = sum(stream.values.shape[1] for stream in running)
    stride = max(1, count * tokens // (CLEAN_ROWS * size))
    rows = sum(-(-stream.values.shape[1] * tokens // stride) for stream in running)
    hidden: dict[int, Tensor] = {}

    def of_patches(count: int) -> Tensor:
        """Which of the rows that are looked at of so many images are patch tokens; on the CPU."""
        token = torch.arange(0, count * tokens, stride) % tokens
        return token >= tokens - len(books[0].slots)

    with backbone.inputs_of(layer, stop=not step.last) as seen:

        def run(index: int) -> list[Tensor]:
            """Rows of clean inputs; what injections change in inputs (b, G, H), and in answers (b, G, M)."""
            stream = running[index]
            book = books[stream.book]
            values = engine.fetch(stream.values)
            seen.clear()
            with engine.autocast(backbone.dtype), suppress(Stop):
                after = backbone.run(values.flatten(0, 1), step.block, step.block + 1).view_as(values)
            k = backbone.hidden(layer, seen.pop(), 3 * values.shape[1]).reshape(*values.shape[:3], size)
            if not step.last:  # the block ran no further than the layer
                with engine.autocast(backbone.dtype):
                    written = torch.nn.functional.linear(k, step.matrix, layer.bias)
                after = values + written * step.gain.to(written.dtype)
            # Over the injected length, so that bands of other lengths weigh the same.
            length = book.scale * math.sqrt(book.bits)
            change = _half_difference(k, pool) / length
            answer = (_half_difference(after, pool) @ book.read_directions[tap].T) / length
            if step.last:
                stream.values = engine.offload(after.to(values.dtype))
                hidden[streams.index(stream)] = engine.offload(k)
            some = k[0].flatten(0, 1)[::stride]
            if still is None:
                return [some, change, answer]
            patches = of_patches(len(k[0]))
            before, behind = (part[0].flatten(0, 1)[::stride][patches] for part in (values, after))
            return [some, change, answer, *inputs_and_answers(before, behind)]

        tasks = [partial(run, index) for index in range(len(running))]
        owners = [streams.index(stream) % ranks.count for stream in running]
        for stream, (some, change, answer, *pair) in zip(
            running, ranks.each(tasks, device, owners), strict=True
        ):
            book = books[stream.book]
            clean.add(some, 1 / rows, ranks)
            if still is not None:
                x, y = pair
                still.add(x, y, some[of_patches(stream.values.shape[1])], own_parts)
            wanted = stream.signs / math.sqrt(book.bits)  # (b, M), of a gain of 1
            weight = 1 / (len(pool) * images[stream.book])
            flat = change.flatten(0, 1)
            changed[book.band.name].add(flat.to(some.dtype), weight / book.band.books, ranks)
            cross[stream.book].addmm_(change.sum(dim=1).T, wanted, alpha=weight / book.band.books)
            answers[stream.book] += (answer * stream.signs[:, None]).sum(dim=(0, 1)) * weight
    for gram in (clean, *changed.values()):
        gram.exchange(ranks)
    if still is not None and ranks.count > 1:
        for product in still.products:
            for part, owner in still_parts:
                (product[:, part],) = ranks.sent(owner, [product[:, part]], device)
    for index, book in enumerate(books):
        dials, share = DIALS[book.band.name], step.shares.get(book.band.name, 0.0)
        lacking = torch.full_like(answers[index], dials.gain)
        if dials.answer == "lack":
            lacking -= answers[index] * math.sqrt(book.bits)
        cross[index] *= share * lacking.clamp_min(0)
    return _Moments(clean, changed, cross, rows), hidden


def _half_difference(values: Tensor, pool: Tensor) -> Tensor:
    """(3, b, N, ...) → (b, G, ...) float32: what the injections change, mean over groups of slots."""
    return (pool @ values[1].float() - pool @ values[2].float()) / 2


def _slot_groups(slots: int, tokens: int, device: torch.device) -> Tensor:
    """(G, N): the mean over each of the groups, which hold every G-th of the slots, the last of N tokens."""
    groups = min(GROUPS, slots)
    pool = torch.zeros(groups, tokens, device=device)
    slot = torch.arange(slots, device=device)
    pool[slot % groups, tokens - slots + slot] = 1.0
    return pool / pool.sum(dim=1, keepdim=True)


def _solve_passive(moments: _Moments, still: Moments, rows: Rows) -> list[Tensor]:
    """The passive band's change of a block; lets go of the clean moments.

    Returns:
        As `_solve`; and (R, D) float64, what is added for each of the R.
    """
    clean = moments.clean
    size, device = len(clean.blocks[0]), clean.blocks[0].device
    factor = torch.empty(size, size, dtype=torch.float64, device=device).T
    for part, _ in clean.parts:
        factor[part.start :, part] = clean.blocks.pop(0)
    white = still.whitened(rows)
    # What B with a gain of 1 adds to a row: g is such that rows read PASSIVE_GAIN.
    added = (white.answers @ white.answers.T) * (white.inputs @ still.inputs @ white.inputs.T)
    gain = PASSIVE_GAIN * still.size / added.sum(dim=1).mean()
    cross = still.hidden @ white.inputs.T * (still.count / moments.rows)
    solution, info = _ridge(factor, PASSIVE_RIDGE, cross)
    info += ~torch.isfinite(gain)  # the block adds nothing
    return [solution, info, gain * white.answers]


def _solve(moments: _Moments, band: str, books: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Lets go of the band's moments.

    Returns:
        (H, rows) float64, and what LAPACK tells: 0 where the matrix was positive definite.
    """
    dials = DIALS[band]
    clean, changed = moments.clean, moments.changed.pop(band)
    balance = changed.mean() / clean.mean()
    size, device = len(clean.blocks[0]), clean.blocks[0].device
    factor = torch.empty(size, size, dtype=torch.float64, device=device).T  # by columns, as LAPACK wants it
    for (part, _), block in zip(changed.parts, clean.blocks, strict=True):
        moved = changed.blocks.pop(0)
        factor[part.start :, part] = (dials.protection * balance * block).add_(moved)
    del moved
    cross = torch.cat([moments.cross[book] for book in books], dim=1).double()
    return _ridge(factor, dials.ridge, cross)


def _ridge(matrix: Tensor, ridge: float, cross: Tensor) -> tuple[Tensor, Tensor]:
    """(matrix + ridge * its mean diagonal * I)^-1 cross, and what LAPACK tells.

    Of `matrix`, float64 and laid out by columns as LAPACK wants it, the lower triangle counts; it is lost.
    """
    matrix.diagonal().add_(ridge * matrix.diagonal().mean())
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))  # in its place
    half = torch.linalg.solve_triangular(matrix, cross, upper=False)
    return torch.linalg.solve_triangular(matrix.T, half, upper=True), info
