"""Vaccination: random vectors go in as a mark's message does, and the model unlearns to answer them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from activemark_fast.attacks.adaptive.parts import clean_images, victim
from activemark_fast.attacks.adaptive.spectral import principal
from activemark_fast.attacks.matrices import block_matrices
from activemark_fast.backbone import Backbone, evaluating
from activemark_fast.datasets import Labelled
from activemark_fast.runtime import resolve_autocast

ANSWERS = ("pass", "nothing")
DIRECTIONS = 32
"""Random directions of one injection: the bits of a message."""
LENGTHS = (0.5, 3.0)
"""An injection is so many times as long as the median token."""
SHARES = (0.1, 1.0)
"""It goes into this share of the patch tokens."""
INJECTED = 8
"""Images of a batch that are injected into; they run twice."""
SMALL = 0.01
"""An answer with this share of the injection's energy is still to be made smaller."""
ENERGY = 0.99
"""Share of the variance that the subspace of clean activations holds, where injections stay within it."""


def vaccinate(
    model: nn.Module,
    data: Labelled | Tensor,
    seed: int,
    strength: float,
    *,
    answer: str = "pass",
    clean_weight: float = 10.0,
    within: bool = False,
    lr: float = 2e-3,
    batch_size: int = 16,
    images: int | None = None,
    first_block: int | None = None,
    on_step: Callable[[float], None] | None = None,
) -> nn.Module:
    """A copy of `model` that was trained not to answer vectors injected as a mark is.

    At each step a random block is drawn, random orthonormal directions, random signs, a random length and
    random patch tokens; a few images run with the vector v and with its opposite. What is read of a mark is
    the mean over those tokens of (h+ - h-) / 2: after each later block it is to be v ("pass") or 0
    ("nothing"), by the loss log(1 + |mean - wanted|^2 / |v|^2 / 0.01), which the smallest answers still
    count in. The other term is the distance of clean features to `model`'s own
    (1 - cosine, of every token after the final norm). AdamW on the matrices, cosine decay to 0, in mixed
    precision where the device multiplies bf16.

    Long, for draws, loss and step share the optimiser and the models it steps on.

    Args:
        model: a plain ViT.
        data: clean images.
        seed: of all that is random.
        strength: steps.
        answer: "pass" or "nothing".
        clean_weight: of the distance of clean features; with 0 it is left out.
        within: draw the directions from the subspace of the block's clean activations.
        lr: peak learning rate.
        batch_size: images a step.
        images: most images to use; by default all.
        first_block: first block to inject after and to train; by default a quarter of the depth.
        on_step: called with the loss after every step.

    Raises:
        ValueError: `strength` is below 1, `answer` neither of the two, `clean_weight` below 0, there is no
            such block or none after it, or less than a batch of images.
    """
    if strength < 1:
        raise ValueError(f"strength: wanted at least 1 step, got {strength}")
    if answer not in ANSWERS:
        raise ValueError(f"answer: wanted one of {', '.join(ANSWERS)}, got {answer!r}")
    if clean_weight < 0:
        raise ValueError(f"clean_weight: wanted 0 or more, got {clean_weight}")
    pixels = clean_images(data, images, batch_size)
    attacked, student, first = victim(model, first_block)
    _, teacher, _ = victim(model)
    if first > student.depth - 2:
        raise ValueError(f"first_block: wanted at most {student.depth - 2}, got {first}")
    generator = torch.Generator().manual_seed(seed)
    flags = {name: p.requires_grad for name, p in attacked.named_parameters()}
    attacked.requires_grad_(False)
    inside = {m for block in student.blocks[first:] for m in block.modules()}
    trained = [getattr(m, name) for m, name in block_matrices(student) if m in inside]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, round(strength))
    autocast = resolve_autocast("auto", teacher.device)

    def run(view: Backbone, stream: Tensor, start: int, stop: int) -> Tensor:
        # In a context of its own: what autocast has cast it keeps, without gradients, and while weights move.
        with autocast(view.dtype):
            return view.run(stream, start, stop)

    def answered(start: Tensor) -> Tensor:
        site = int(torch.randint(first, student.depth - 1, (), generator=generator))
        with torch.no_grad():
            output = run(student, start[:INJECTED], first, site + 1)
            vectors, taken = _injection(student, output, within, generator)
            injected = torch.zeros_like(output)
            injected[:, taken] = vectors[:, None]
        pair = torch.cat([output + injected, output - injected])
        wanted = vectors if answer == "pass" else torch.zeros_like(vectors)
        losses = []
        for block in range(site + 1, student.depth):
            pair = run(student, pair, block, block + 1)
            plus, minus = pair.chunk(2)
            answers = (plus - minus)[:, taken].mean(dim=1) / 2 - wanted
            ratios = answers.square().sum(dim=1) / vectors.square().sum(dim=1)
            losses.append(torch.log1p(ratios / SMALL).mean())
        return torch.stack(losses).mean()

    with evaluating(attacked), evaluating(teacher.model):
        for _ in range(round(strength)):
            chosen = torch.randint(len(pixels), (batch_size,), generator=generator)
            batch = pixels[chosen].to(teacher.device, teacher.dtype)
            with torch.no_grad():
                start = run(teacher, teacher.stem(batch), 0, first)
            loss = answered(start)
            if clean_weight > 0:
                with torch.no_grad():
                    features = teacher.norm(run(teacher, start, first, teacher.depth))
                found = student.norm(run(student, start, first, student.depth))
                loss = loss + clean_weight * (1 - cosine_similarity(found, features, dim=-1).mean())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(float(loss.detach()))
    for name, parameter in attacked.named_parameters():
        parameter.requires_grad_(flags[name])
        parameter.grad = None
    return attacked


def _injection(
    backbone: Backbone, output: Tensor, within: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random vectors with a random message for each image, (B, D), and which tokens they go into."""
    width, count = backbone.width, min(DIRECTIONS, backbone.width)
    if within:
        rows = output.float().flatten(0, 1)
        rows = rows - rows.mean(dim=0)
        basis = principal((rows.T @ rows).double(), ENERGY).float()
    else:
        basis = torch.eye(width, device=output.device)
    size = basis.shape[1]
    mixed = torch.randn(size, min(count, size), generator=generator).to(output.device)
    directions = basis @ torch.linalg.qr(mixed).Q  # (D, k)
    signs = torch.randint(0, 2, (len(output), directions.shape[1]), generator=generator) * 2 - 1
    vectors = signs.to(output.device, directions.dtype) @ directions.T / directions.shape[1] ** 0.5
    low, high = LENGTHS
    length = low + (high - low) * float(torch.rand((), generator=generator))
    patches = output.shape[1] - backbone.prefix_tokens
    share = SHARES[0] + (SHARES[1] - SHARES[0]) * float(torch.rand((), generator=generator))
    chosen = torch.randperm(patches, generator=generator)[: max(1, round(share * patches))]
    scale = length * output.norm(dim=-1).median()
    return (scale * vectors).to(output.dtype), (backbone.prefix_tokens + chosen).to(output.device)
