"""compare: whether two models have a common origin, by their weights alone. No key, no mark, no images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from activemark_fast.descent.basis import from_the_stem, pair_blocks, refined
from activemark_fast.descent.exact import chance_of_agreement
from activemark_fast.descent.matching import (
    CORRELATED,
    MIN_PAIRS,
    UNITS,
    Pairs,
    Units,
    head_likeness,
    moved,
    moved_heads,
    nearest,
    rank_correlation,
    runners_up,
)
from activemark_fast.descent.result import DECISIONS, Basis, BlockDescent, Descent, State, Traits
from activemark_fast.descent.weights import Block, Source, Weights

TESTS = 4
"""Two tests (units, heads) in two bases: what the p-value pays for."""
FIT_BLOCKS = 4
"""Blocks whose units fit the map to a rotated residual stream, which is then judged by other blocks."""
ROUNDS = 2
MIN_HEADS = 2
ALIKE = 0.1
"""A matrix is the other's, changed, if its units' own partners are more alike than the runners-up by this."""
NOISE_EDGE = 1.05
"""A matrix whose largest singular value is at most this multiple of a random one's is as if never trained."""


def compare(a: Source, b: Source) -> Descent:
    """Tells whether the weights of `a` and `b` have a common origin.

    The MLP units of each pair of blocks are matched by what they read and write, and the attention heads by
    what they compute; it is counted how many are matched to their own number. If B was trained from a start
    of its own, its units could have been numbered in any order, so the count is that of a random numbering,
    whose distribution is known exactly: the p-value (see `ASSUMPTION`). A thief can renumber units for
    nothing, and rotate the residual stream; so the score says how much more a unit agrees with its partner
    than with the next best of another kind, whatever their numbers, and if nothing is found as the models
    are, B is looked at again with its residual stream rotated back. The score is no p-value, but neither a
    renumbering by a thief lowers it nor one by a forger raises it.

    Args:
        a: a plain ViT: a module, a model string, or the path of a checkpoint, a file or a folder.
        b: another of the same width.

    Raises:
        TypeError: an argument is of another type.
        CheckpointError: a model cannot be read.
        ValueError: the models are of different widths.
    """
    with ExitStack() as stack, torch.no_grad():
        first, second = (stack.enter_context(Weights(model)) for model in (a, b))
        if first.width != second.width:
            raise ValueError(
                f"a, b: wanted models of one width, got {first.width} channels in {first.name} and "
                f"{second.width} in {second.name}"
            )
        vectors = [torch.stack([w.block(i).vectors for i in range(w.depth)]) for w in (first, second)]
        pairs = pair_blocks(*vectors)
        plain = _judged(first, second, "same", [(i, j, None) for i, j in pairs])
        if plain.decision == "descent":
            return plain
        if first.depth == second.depth:
            pairs = [(i, i) for i in range(first.depth)]
        known = [(vectors[0][i], vectors[1][j]) for i, j in pairs if first.depth == second.depth]
        fit = from_the_stem(first.width, first.stem, second.stem, known)
        basis = fit.matrix()
        if first.depth != second.depth:
            pairs = pair_blocks(vectors[0], vectors[1] @ basis)
        halves = [pairs[0::2][:FIT_BLOCKS], pairs[1::2][:FIT_BLOCKS]]

        def partners(index: int, found: Tensor) -> tuple[Tensor, Tensor]:
            return _partners(first.block(pairs[index][0]), second.block(pairs[index][1]), found)

        maps = [
            refined(fit, [pairs.index(pair) for pair in half], partners, ROUNDS) for half in reversed(halves)
        ]
        moved_pairs = [(i, j, maps[place % 2]) for place, (i, j) in enumerate(pairs)]
        rotated = _judged(first, second, "rotated", moved_pairs, plain.traits)
        return min(plain, rotated, key=lambda one: DECISIONS.index(one.decision))


def _judged(
    first: Weights,
    second: Weights,
    basis: Basis,
    pairs: Sequence[tuple[int, int, Tensor | None]],
    known_traits: tuple[Traits, Traits] | None = None,
) -> Descent:
    blocks, units, heads = [], [], []
    traits: tuple[list[Traits], list[Traits]] = ([], [])
    for i, j, matrix in pairs:
        mine, theirs = first.block(i), second.block(j)
        if known_traits is None:
            traits[0].append(_traits(mine))
            traits[1].append(_traits(theirs))
        block, unit_pairs, head_pairs = _compared(i, j, mine, theirs, matrix)
        blocks.append(block)
        units.append(unit_pairs)
        if head_pairs is not None:
            heads.append(head_pairs)
    known = first.heads_known and second.heads_known
    chances = [_chance(group) for group in ([units, heads] if known else [units]) if group]
    stem = {}
    for name in first.stem.keys() & second.stem.keys():
        ours, theirs_stem = first.stem[name], second.stem[name]
        if ours.shape == theirs_stem.shape:
            aligned = theirs_stem if pairs[0][2] is None else theirs_stem @ pairs[0][2]
            stem[name] = float((ours * aligned).sum() / (ours.norm() * aligned.norm()).clamp_min(1e-30))
    return Descent(
        a=first.name,
        b=second.name,
        p_value=min([1.0, *(TESTS * chance for chance in chances)]),
        basis=basis,
        depths=(first.depth, second.depth),
        blocks=tuple(blocks),
        stem=stem,
        units=_total(units),
        heads=_total(heads),
        heads_known=known,
        traits=known_traits or (_mean_traits(traits[0]), _mean_traits(traits[1])),
    )


def _traits(block: Block) -> Traits:
    matrices = [matrix.float() for matrix in block.raw.values()]
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices) / sum(matrix.numel() for matrix in matrices)
    narrow = all(torch.equal(matrix, matrix.bfloat16().float()) for matrix in matrices)
    return Traits(zeros, narrow, sum(_kurtosis(matrix) for matrix in matrices) / len(matrices))


def _kurtosis(matrix: Tensor) -> float:
    squares = (matrix - matrix.mean()).square()
    return float(squares.square().mean() / squares.mean().square().clamp_min(1e-30)) - 3


def _mean_traits(blocks: Sequence[Traits]) -> Traits:
    count = max(len(blocks), 1)
    return Traits(
        sum(block.zeros for block in blocks) / count,
        all(block.bfloat16 for block in blocks),
        sum(block.kurtosis for block in blocks) / count,
    )


def _chance(blocks: Sequence[Pairs]) -> float:
    """Of as many agreements, whichever of the two models it is whose numbers are random."""
    agreements = sum(pairs.agreements for pairs in blocks)
    return max(
        chance_of_agreement(groups, agreements)
        for groups in zip(*(pairs.groups for pairs in blocks), strict=True)
    )


def _total(groups: Sequence[Pairs]) -> tuple[int, int]:
    return sum(pairs.agreements for pairs in groups), sum(len(pairs.first) for pairs in groups)


def _compared(
    i: int, j: int, mine: Block, theirs: Block, basis: Tensor | None
) -> tuple[BlockDescent, Pairs, Pairs | None]:
    a, b = _units(mine, theirs, basis, i)
    by_reads, by_writes = _unit_likeness(a, b)
    both = by_reads + by_writes
    first, second = nearest(both)
    units = Pairs(a.numbers[first], b.numbers[second], a.looked_at, b.size)
    first, second = first[:CORRELATED], second[:CORRELATED]
    kinship = (b.reads[second] @ b.reads.T + b.writes[second] @ b.writes.T) / 2
    control = runners_up(both[first], kinship)
    alike = {
        "mlp.fc1": _likeness(by_reads, first, second, control),
        "mlp.fc2": _likeness(by_writes, first, second, control),
    }
    unit_score = _unit_score(a, b, first, second, control)
    heads, head_score = None, 0.0
    others = moved_heads(theirs, basis)
    if mine.heads is not None and others is not None:
        order = torch.randperm(len(others[0]), generator=torch.Generator().manual_seed(j))
        shuffled = tuple(part[order] for part in others)
        attends, moves = (head_likeness(mine.heads[k : k + 2], shuffled[k : k + 2]) for k in (0, 2))
        first, second = nearest(attends + moves)
        heads = Pairs(first, order[second], torch.arange(len(attends)), len(order))
        kin_q, kin_v = (head_likeness(shuffled[k : k + 2], shuffled[k : k + 2]) for k in (0, 2))
        control = runners_up((attends + moves)[first], (kin_q + kin_v)[second] / 2)
        alike["attn.qk"] = _likeness(attends, first, second, control)
        alike["attn.ov"] = _likeness(moves, first, second, control)
        if len(first) >= MIN_HEADS:
            mean = (attends + moves) / 2
            head_score = float((mean[first, second] - mean[first, control]).median())
    states: dict[str, State] = {
        name: "tuned" if value - control >= ALIKE else "replaced" for name, (value, control) in alike.items()
    }
    if basis is None:
        _mark_frozen(states, mine, theirs, units, heads)
    _mark_untrained(states, theirs)
    block = BlockDescent(
        a=i,
        b=j,
        units=(units.agreements, len(units.first)),
        heads=(0, 0) if heads is None else (heads.agreements, len(heads.first)),
        unit_score=unit_score,
        head_score=head_score,
        likeness={name: value for name, (value, _) in alike.items()},
        states=states,
    )
    return block, units, heads


def _units(mine: Block, theirs: Block, basis: Tensor | None, seed: int) -> tuple[Units, Units]:
    """Some units of A, chosen at random, and all of B, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(mine.reads), generator=generator)[:UNITS]
    order = torch.randperm(len(theirs.reads), generator=generator)
    return Units(mine.reads, mine.writes, chosen), Units(*moved(theirs, basis), order)


def _unit_likeness(a: Units, b: Units) -> tuple[Tensor, Tensor]:
    """(s, t) cosines of what units read and of what they write; 0 where only one MLP is gated."""
    by_writes = a.writes @ b.writes.T
    if a.reads.shape[1] != b.reads.shape[1]:
        return torch.zeros_like(by_writes), by_writes
    return a.reads @ b.reads.T, by_writes


def _likeness(likeness: Tensor, first: Tensor, second: Tensor, control: Tensor) -> tuple[float, float]:
    """Median cosine of the pairs, and of A's with the runners-up."""
    if not len(first):
        return 0.0, 0.0
    return float(likeness[first, second].median()), float(likeness[first, control].median())


def _unit_score(a: Units, b: Units, first: Tensor, second: Tensor, control: Tensor) -> float:
    """How much better the ranks of what units read and write agree with partners' than with runners-up'."""
    if len(first) < MIN_PAIRS:
        return 0.0
    parts = [(a.writes, b.writes)]
    if a.reads.shape[1] == b.reads.shape[1]:
        parts.append((a.reads, b.reads))
    gained = [
        rank_correlation(ours[first], theirs[second]) - rank_correlation(ours[first], theirs[control])
        for ours, theirs in parts
    ]
    return float(torch.stack(gained).mean(dim=0).median())


def _partners(mine: Block, theirs: Block, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of A and of B, in their own bases, of units that the map makes each other's nearest."""
    a, b = _units(mine, theirs, basis, 0)
    by_reads, by_writes = _unit_likeness(a, b)
    first, second = nearest(by_reads + by_writes)
    ours, others = a.numbers[first], b.numbers[second]
    if a.reads.shape[1] != b.reads.shape[1]:
        return mine.writes[ours], theirs.writes[others]
    return (
        torch.cat([mine.reads[ours].flatten(0, 1), mine.writes[ours]]),
        torch.cat([theirs.reads[others].flatten(0, 1), theirs.writes[others]]),
    )


def _mark_frozen(
    states: dict[str, State], mine: Block, theirs: Block, units: Pairs, heads: Pairs | None
) -> None:
    """Calls frozen what is the same, whatever the order of units and heads."""
    if len(units.first) == len(units.looked_at):
        for name, axis in (("mlp.fc1", 0), ("mlp.fc2", 1)):
            a, b = mine.raw[name], theirs.raw[name]
            if a.shape == b.shape and _equal(
                a.index_select(axis, units.first), b.index_select(axis, units.second)
            ):
                states[name] = "frozen"
    if heads is None or len(heads.first) < len(heads.looked_at) or heads.agreements < len(heads.first):
        return
    inside, out = (
        mine.raw[name].shape == theirs.raw[name].shape and _equal(mine.raw[name], theirs.raw[name])
        for name in ("attn.qkv", "attn.proj")
    )
    if inside:
        states["attn.qk"] = "frozen"
    if inside and out:
        states["attn.ov"] = "frozen"


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, or would be if both were rounded to bfloat16 as one of them is."""
    a, b = a.float(), b.float()
    if torch.equal(a, b):
        return True
    first, second = a.bfloat16().float(), b.bfloat16().float()
    return torch.equal(first, second) and (torch.equal(a, first) or torch.equal(b, second))


def _mark_untrained(states: dict[str, State], theirs: Block) -> None:
    """Calls re-initialised what was replaced and has the spectrum of a random matrix."""
    matrices = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "attn.qk": "attn.qkv", "attn.ov": "attn.proj"}
    for name, state in states.items():
        if state == "replaced" and _as_if_random(theirs.raw[matrices[name]].float()):
            states[name] = "re-initialised"


def _as_if_random(matrix: Tensor) -> bool:
    """Whether its largest singular value is that of independent entries: std (sqrt(rows) + sqrt(columns))."""
    deviation = matrix.std()
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        vector = matrix.T @ (matrix @ (vector / vector.norm().clamp_min(1e-30)))
    largest = vector.norm().sqrt()
    edge = deviation * (matrix.shape[0] ** 0.5 + matrix.shape[1] ** 0.5)
    return bool(largest <= NOISE_EDGE * edge)
