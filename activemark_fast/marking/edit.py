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
from activemark_fast.marking.quality import Quality, QualityCheck
from activemark_fast.marking.suffix import BATCH, Autocast
from activemark_fast.progress import Progress
from activemark_fast.site import Site

RIDGE = 1e-4
"""Identity term of the solve, over the mean diagonal of its matrix."""
PROTECTIONS = (10.0, 30.0, 100.0)
LARGEST_GAIN = 2.0
TRIAL_IMAGES = 64
FINAL_EDITS = 3


@dataclass(frozen=True)
class EditStrength:
    """The two dials of the edit.

    Attributes:
        gain: what a slot should read for each unit that was injected: gamma in `edit`.
        protection: weight of the clean activations, which the edit should not react to: lambda in `edit`.
    """

    gain: float
    protection: float


@torch.no_grad()
def search_edit(
    backbone: Backbone,
    codec: KeyedCodec,
    site: Site,
    output: Tensor,
    messages: Tensor,
    check: QualityCheck,
    fidelity: float,
    autocast: Autocast,
    bar: Progress,
) -> tuple[Quality, list[dict[str, float | str]]]:
    """Edits `backbone` in place with the dials that give the largest margin at the fidelity asked for.

    What an edit costs, 1 - cosine, grows with about the square of its gain. So for each of a few protections
    one trial on 64 images tells the gain that just meets the fidelity, and a second trial what margin that
    gives; the best pair is then used on all images, its gain lowered once or twice more where the fidelity is
    missed.

    Args:
        backbone: the model to mark.
        codec: on the backbone's device.
        site: where the mark goes.
        output: (n, N, D), clean output of the site's block.
        messages: (r, n, M), r random messages for each image.
        check: measures the edited model.
        fidelity: lowest mean cosine to the original's features.
        autocast: mixed precision of the forward passes.
        bar: shows the edits.

    Returns:
        The quality of the edit that is in the model, and the dials and the quality of every edit tried.
    """
    linears = [backbone.mlp_out(block) for block in range(site.block + 1, site.taps[-1] + 1)]
    originals = [linear.weight.clone() for linear in linears]
    history: list[dict[str, float | str]] = []

    def tried(stage: str, strength: EditStrength, images: int) -> Quality:
        for linear, weight in zip(linears, originals, strict=True):
            linear.weight.copy_(weight)
        edit(backbone, codec, site, output[:images], messages[:, :images], strength, autocast)
        quality = check()
        history.append({"stage": stage, **asdict(strength), **asdict(quality)})
        bar.advance(margin=quality.margin, fidelity=quality.fidelity, bit_error=quality.bit_error)
        return quality

    def affordable(strength: EditStrength, quality: Quality) -> EditStrength:
        allowance = (1 - fidelity) / max(1 - quality.fidelity, 1e-9)
        return replace(strength, gain=min(strength.gain * allowance**0.5, LARGEST_GAIN))

    bar.stage("edit: search", 2 * len(PROTECTIONS))
    trials: list[tuple[Quality, EditStrength]] = []
    for protection in PROTECTIONS:
        first = EditStrength(1.0, protection)
        strength = affordable(first, tried("edit trial", first, TRIAL_IMAGES))
        trials.append((tried("edit trial", strength, TRIAL_IMAGES), strength))
    finite = [trial for trial in trials if math.isfinite(trial[0].margin)] or trials
    _, strength = max(finite, key=lambda trial: trial[0].margin)

    bar.stage("edit", 1)
    for _ in range(FINAL_EDITS):
        quality = tried("edit", strength, len(output))
        if quality.fidelity >= fidelity:
            break
        lower = affordable(strength, quality)
        strength = replace(lower, gain=0.97 * lower.gain)
    return quality, history


@torch.no_grad()
def edit(
    backbone: Backbone,
    codec: KeyedCodec,
    site: Site,
    output: Tensor,
    messages: Tensor,
    strength: EditStrength,
    autocast: Autocast,
) -> None:
    """Writes the mark into `backbone`'s weights, in place.

    For each block after the site up to the last tap, with k the hidden activations of its MLP at the slots:
    Δk is what the injection changes in k, δ = (gamma s (2m - 1) - P Δh) / (blocks left to the tap) what is
    still missing in the projection P of the block's output, and

        ΔW = P^T E[δ Δk^T] (E[Δk Δk^T] + lambda E[k₀ k₀^T] + ε I)^-1

    with k₀ the hidden activations of all tokens of clean images.

    Args:
        backbone: the model to mark.
        codec: on the backbone's device.
        site: where the mark goes.
        output: (n, N, D), clean output of the site's block.
        messages: (r, n, M), r random messages for each image.
        strength: the dials.
        autocast: mixed precision of the forward passes.

    Raises:
        ValueError: a block is not pre-norm residual, its LayerScale is 0 in some channel, or its MLP's hidden
            activations are all 0 or not finite.
    """
    signs = 2 * messages.float() - 1
    clean = output.clone()
    injected = []
    for message in messages:
        one = output.clone()
        one[:, codec.slots] += codec.injection(message)[:, None].to(one.dtype)
        injected.append(one)

    for block in range(site.block + 1, site.taps[-1] + 1):
        tap = next(t for t in site.taps if t >= block)
        share = 1 / (tap - block + 1)
        target = strength.gain * codec.scale * signs
        matrix, cross = _moments(
            backbone, codec, block, tap, clean, injected, target, share, strength.protection, autocast
        )
        matrix.diagonal().add_(RIDGE * matrix.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            raise ValueError(
                f"model: the MLP of block {block} is silent, or its activations are not finite, so it cannot "
                "carry a mark"
            )
        solution = torch.cholesky_solve(cross, factor)  # (H, M)
        gain = backbone.mlp_gain(block)
        if not bool((gain != 0).all()):
            raise ValueError(
                f"model: block {block} scales a channel of its MLP by 0, so it cannot carry a mark"
            )
        write = codec.read_directions[tap].double() / gain.double()  # (M, D)
        weight = backbone.mlp_out(block).weight
        weight += (solution @ write).T.to(weight.dtype)
        for stream in (clean, *injected):
            for part in stream.split(BATCH):
                with autocast():
                    part.copy_(backbone.run(part, block, block + 1))


def _moments(
    backbone: Backbone,
    codec: KeyedCodec,
    block: int,
    tap: int,
    clean: Tensor,
    injected: list[Tensor],
    target: Tensor,
    share: float,
    protection: float,
    autocast: Autocast,
) -> tuple[Tensor, Tensor]:
    """The matrix (H, H) and the right-hand sides E[Δk δ^T] (H, M) of a block's solve, float64."""
    hidden: list[Tensor] = []
    linear = backbone.mlp_out(block)
    hook = linear.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))

    def through(stream: Tensor) -> tuple[Tensor, Tensor]:
        hidden.clear()
        with autocast():
            after = backbone.run(stream, block, block + 1)
        batch, tokens = after.shape[:2]
        return after[:, codec.slots].float(), backbone.batch_first(hidden[0]).reshape(
            batch, tokens, -1
        ).float()

    size = linear.in_features
    device = clean.device
    changed = torch.zeros(size, size, dtype=torch.float64, device=device)
    kept = torch.zeros_like(changed)
    cross = torch.zeros(size, codec.bits, dtype=torch.float64, device=device)
    projection = codec.read_directions[tap].T
    try:
        for start in range(0, len(clean), BATCH):
            part = slice(start, start + BATCH)
            after_clean, k_clean = through(clean[part])
            flat = k_clean.flatten(0, 1)
            kept += flat.T @ flat
            for stream, wanted in zip(injected, target, strict=True):
                after, k = through(stream[part])
                missing = share * (wanted[part][:, None] - (after - after_clean) @ projection)
                change = (k - k_clean)[:, codec.slots].flatten(0, 1)
                changed += change.T @ change
                cross += change.T @ missing.flatten(0, 1)
    finally:
        hook.remove()
    samples = len(injected) * len(clean) * len(codec.slots)
    return changed / samples + protection * kept / (len(clean) * clean.shape[1]), cross / samples
