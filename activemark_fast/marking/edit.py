"""The closed-form edit: places a keyed mark in the suffix's MLPs, without a gradient.

The suffix has to learn one linear map of rank M, from the injected directions U to the read-out P. As in
linear model editing (ROME, Meng et al. 2022; MEMIT, Meng et al. 2023) it is written into the last linear
layer of each block's MLP, block after block, each closing its share of what is still missing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.codec import KeyedCodec
from activemark_fast.marking.engine import GROUPS, Engine, halving
from activemark_fast.marking.quality import Quality, QualityCheck
from activemark_fast.progress import Progress
from activemark_fast.site import Site

RIDGE = 1e-2
"""Identity term of the solve, over the mean diagonal of its matrix."""
LARGEST_GAIN = 2.0
CLEAN_ROWS = 8
"""Rows of clean hidden activations in the solve, at least, for each of its unknowns (where there are any)."""
COLUMN_PARTS = 4
LOOKS = 4
"""Most strengths whose fidelity is measured."""
UNUSED = 0.1
"""How much of the loss of fidelity that is allowed may be left."""


@dataclass(frozen=True)
class EditStrength:
    """The two dials of the edit.

    Attributes:
        gain: what a slot should read for each unit that was injected: gamma in `edit`.
        protection: weight of the clean activations, which the edit should not react to: lambda in `edit`.
    """

    gain: float
    protection: float


FIRST_STRENGTH = EditStrength(gain=0.65, protection=15.0)


@torch.no_grad()
def search_edit(
    backbone: Backbone,
    codec: KeyedCodec,
    site: Site,
    output: Tensor,
    messages: Tensor,
    check: QualityCheck,
    fidelity: float,
    engine: Engine,
    bar: Progress,
) -> tuple[Quality, list[dict[str, float | str]]]:
    """Edits `backbone` in place with the gain that just keeps the fidelity asked for.

    One edit is solved for. The change of the weights is then scaled: two looks at the clean features, mostly,
    tell the scale which the fidelity allows. The margin that comes with it hardly depends on the protection
    between 10 and 30.

    Args:
        backbone: the model to mark.
        codec: on the backbone's device.
        site: where the mark goes.
        output: (n, N, D), clean output of the site's block.
        messages: (r, n, M), r random messages for each image.
        check: measures the edited model.
        fidelity: lowest mean cosine to the original's features.
        engine: how to compute.
        bar: shows the steps.

    Returns:
        The quality of the edit that is in the model; the dials of every scale tried, and what was measured.
    """
    linears = [backbone.mlp_out(block) for block in range(site.block + 1, site.taps[-1] + 1)]
    originals = [linear.weight.clone() for linear in linears]
    strength = FIRST_STRENGTH

    def solved(batch: int) -> list[Tensor]:
        for linear, weight in zip(linears, originals, strict=True):
            linear.weight.copy_(weight)  # an earlier try may have run out of memory half way
        bar.stage("edit", len(linears))
        return edit(backbone, codec, site, output, messages, strength, replace(engine, batch=batch), bar)

    changes = halving(solved, engine.batch)

    def scale(gain: float) -> None:
        for linear, weight, change in zip(linears, originals, changes, strict=True):
            scaled = change * (gain / FIRST_STRENGTH.gain)
            linear.weight.copy_(weight + scaled.to(weight.dtype))

    history: list[dict[str, float | str]] = []
    allowed = 1 - fidelity
    losses: dict[float, float] = {}  # 1 - fidelity, of each gain that was looked at
    bar.stage("edit: strength", LOOKS)
    while True:
        gain = strength.gain
        reached = check.fidelity()
        history.append({"stage": "edit scale", **asdict(strength), "fidelity": reached})
        bar.advance(fidelity=reached)
        losses[gain] = 1 - reached if math.isfinite(reached) else math.inf
        wanted = _next_gain(losses, allowed)
        if (1 - UNUSED) * allowed <= losses[gain] <= allowed or wanted in losses or len(losses) == LOOKS:
            break
        strength = replace(strength, gain=wanted)
        scale(wanted)
    kept = [tried for tried, lost in losses.items() if lost <= allowed]
    if losses[gain] > allowed and kept:
        strength = replace(strength, gain=max(kept))
        scale(strength.gain)
        reached = 1 - losses[strength.gain]
    quality = check(fidelity=reached)
    history.append({"stage": "edit", **asdict(strength), **asdict(quality)})
    bar.advance(margin=quality.margin, fidelity=quality.fidelity, bit_error=quality.bit_error)
    return quality, history


def _next_gain(losses: dict[float, float], allowed: float) -> float:
    """A gain that should lose a bit less than is allowed. The loss grows with about the square of the gain.

    losses: of each gain so far; the last two tell which power.
    """
    (gain, lost), *before = reversed(losses.items())
    power = 2.0
    if before and 0 < lost < math.inf and 0 < before[0][1] < math.inf:
        other, less = before[0]
        power = min(max(math.log(lost / less) / math.log(gain / other), 1.0), 4.0)
    change = (1 - UNUSED / 2) * allowed / max(lost, 1e-9)
    return min(gain * max(change, 1e-2) ** (1 / power), LARGEST_GAIN)


@torch.no_grad()
def edit(
    backbone: Backbone,
    codec: KeyedCodec,
    site: Site,
    output: Tensor,
    messages: Tensor,
    strength: EditStrength,
    engine: Engine,
    bar: Progress,
) -> list[Tensor]:
    """Writes the mark into `backbone`'s weights, in place.

    For each block after the site up to the last tap, with k the hidden activations of its MLP at the slots:
    Δk is what the injection changes in k, δ = (gamma s (2m - 1) - P Δh) / (blocks left to the tap) what is
    still missing in the projection P of the block's output, both averaged over groups of slots, and

        ΔW = P^T E[δ Δk^T] (E[Δk Δk^T] + lambda E[k₀ k₀^T] + ε I)^-1

    with k₀ the hidden activations of tokens of clean images. Each block runs once: what ΔW adds to its output
    follows from k, which is kept until ΔW is known.

    Args:
        backbone: the model to mark.
        codec: on the backbone's device.
        site: where the mark goes.
        output: (n, N, D), clean output of the site's block.
        messages: (r, n, M), r random messages for each image.
        strength: the dials.
        engine: how to compute.
        bar: moves on with every block.

    Returns:
        ΔW of each block, (D, H) float32.

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
    signs = 2 * messages.float() - 1
    streams = []  # of some images each: (1 + r, b, N, D), the clean one first
    for start in range(0, len(output), engine.batch):
        part = slice(start, start + engine.batch)
        clean = engine.fetch(output[part])
        stream = clean.repeat(1 + len(messages), 1, 1, 1)
        codec.inject_once_(stream[1:].view(-1, *clean.shape[1:]), messages[:, part].flatten(0, 1))
        streams.append(engine.keep(stream))

    changes, failed = [], []
    for block in blocks:
        tap = next(t for t in site.taps if t >= block)
        share = 1 / (tap - block + 1)
        target = strength.gain * codec.scale * signs
        matrix, cross, hidden = _moments(
            backbone, codec, block, tap, streams, target, share, strength.protection, engine
        )
        solution, info = _solve(matrix, cross)  # (H, M)
        del matrix
        failed.append(info)
        read = codec.read_directions[tap]  # (M, D)
        change = (solution @ (read.double() / gains[block].double())).T
        weight = backbone.mlp_out(block).weight
        weight += change.to(weight.dtype)
        changes.append(change.float())
        for index, k in enumerate(hidden):
            stream = engine.fetch(streams[index])
            stream += ((engine.fetch(k) @ solution.to(k.dtype)).float() @ read).to(stream.dtype)
            streams[index] = engine.keep(stream)
            hidden[index] = k.new_empty(0)
        del k, stream  # the next block runs without them
        bar.advance()
    # A look at each while they are solved would have the device wait for the host.
    bad = torch.stack(failed).tolist()
    if any(bad):
        block = next(block for block, info in zip(blocks, bad, strict=True) if info)
        raise ValueError(
            f"model: the MLP of block {block} is silent, or its activations are not finite, so it cannot "
            "carry a mark"
        )
    return changes


def _moments(
    backbone: Backbone,
    codec: KeyedCodec,
    block: int,
    tap: int,
    streams: list[Tensor],
    target: Tensor,
    share: float,
    protection: float,
    engine: Engine,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Runs a block over `streams`, in place, and gathers what its solve needs.

    Returns:
        The matrix (H, H) float32, lower triangle only; the right-hand sides E[Δk δ^T] (H, M) float32; the
        hidden activations (1 + r, b, N, H) of each batch.
    """
    seen: list[Tensor] = []
    linear = backbone.mlp_out(block)
    size, device = linear.in_features, target.device
    matrix = torch.zeros(size, size, device=device)
    cross = torch.zeros(size, codec.bits, device=device)
    images, tokens = target.shape[1], streams[0].shape[2]
    pool = _slot_groups(len(codec.slots), device)
    stride = max(1, images * tokens // (CLEAN_ROWS * size))
    rows = sum(-(-stream.shape[1] * tokens // stride) for stream in streams)
    samples = target.shape[0] * images * len(pool)
    hidden: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        start = 0
        for index, kept in enumerate(streams):
            stream = engine.fetch(kept)
            seen.clear()
            with engine.autocast():
                after = backbone.run(stream.flatten(0, 1), block, block + 1).view_as(stream)
            k = backbone.batch_first(seen.pop()).reshape(*stream.shape[:3], size)
            _add_gram(matrix, k[0].flatten(0, 1)[::stride], protection / rows)
            change = _changed(k, codec.slots, pool)  # (r, b, G, H)
            part = slice(start, start + stream.shape[1])
            there = _changed(after, codec.slots, pool) @ codec.read_directions[tap].T
            missing = share * (target[:, part, None] - there)  # (r, b, G, M)
            flat = change.flatten(0, 2)
            _add_gram(matrix, flat.to(k.dtype), 1 / samples)
            cross.addmm_(flat.T, missing.flatten(0, 2), alpha=1 / samples)
            streams[index], start = engine.keep(after.to(stream.dtype)), part.stop
            hidden.append(engine.keep(k))
    finally:
        hook.remove()
    return matrix, cross, hidden


def _changed(values: Tensor, slots: Tensor, pool: Tensor) -> Tensor:
    """(1 + r, b, N, ...) → (r, b, G, ...) float32: what the injections change, mean over groups of slots."""
    pooled = torch.stack([pool @ part[:, slots].float() for part in values])
    return pooled[1:] - pooled[:1]


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


def _solve(matrix: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Reads the lower triangle of `matrix`.

    Returns:
        (H, M) float64, and what LAPACK tells: 0 where the matrix was positive definite.
    """
    wide = matrix.double()
    wide.diagonal().add_(RIDGE * wide.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(wide)
    del wide  # what follows copies the factor
    half = torch.linalg.solve_triangular(factor, cross.double(), upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True), info
