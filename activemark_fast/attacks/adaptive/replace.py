"""Replacement: parts of the blocks are thrown away, and new ones learn from clean images what they did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from activemark_fast.attacks.adaptive.parts import clean_images, mlp_in, victim
from activemark_fast.attacks.matrices import reset_parameters
from activemark_fast.attacks.prune import attention_out
from activemark_fast.backbone import Backbone, evaluating
from activemark_fast.datasets import Labelled
from activemark_fast.runtime import resolve_autocast

PARTS = ("mlp", "attention", "block")
BATCH = 48
TOKENS = 1024
"""Tokens of a batch, at most, that an MLP is fitted to at a step."""
PASSES = 3
"""Steps on other tokens of the same batch, where MLPs are fitted: the old model's pass costs most."""
END_LR = 0.3
"""Learning rate of the steps end to end, over that of the fitting."""


def replace(
    model: nn.Module,
    data: Labelled | Tensor,
    seed: int,
    strength: float,
    *,
    parts: str = "mlp",
    end_share: float = 1 / 3,
    lr: float = 2e-3,
    batch_size: int = BATCH,
    images: int | None = None,
    first_block: int | None = None,
    on_step: Callable[[float], None] | None = None,
) -> nn.Module:
    """A copy of `model` with new MLPs, attention or blocks that were fitted to what the old ones do.

    First each new part learns, on what the old one was given on clean images, what it returned (mean squared
    error over the mean square of what it returned); an MLP on a random share of the tokens. All parts learn
    at once, from one pass of the old model. Then all learn together to give the old model's final features
    (1 - cosine, of every token after the final norm). AdamW, each stage with cosine decay to 0, in mixed
    precision where the device multiplies bf16.

    Long, for both stages share the models, the optimiser's parameters and the draws.

    Args:
        model: a plain ViT.
        data: clean images.
        seed: of the new weights, and of the order of images and tokens.
        strength: steps.
        parts: "mlp", "attention" (with the matrices that make queries, keys and values) or "block".
        end_share: share of the steps that are taken end to end.
        lr: peak learning rate of the first stage; the second's is 0.3 of it.
        batch_size: images a step; half as many end to end.
        images: most images to use; by default all.
        first_block: by default a quarter of the depth.
        on_step: called with the loss after every step.

    Raises:
        ValueError: `strength` is below 1 or `end_share` not within 0 and 1, `parts` is none of these or the
            model has no module for it, there is no such block, or less than a batch of images.
    """
    if strength < 1:
        raise ValueError(f"strength: wanted at least 1 step, got {strength}")
    if not 0 <= end_share <= 1:
        raise ValueError(f"end_share: wanted 0 to 1, got {end_share}")
    if parts not in PARTS:
        raise ValueError(f"parts: wanted one of {', '.join(PARTS)}, got {parts!r}")
    pixels = clean_images(data, images, batch_size)
    attacked, student, first = victim(model, first_block)
    _, teacher, _ = victim(model)
    blocks = range(first, student.depth)
    old, new = ([_part(view, index, parts) for index in blocks] for view in (teacher, student))
    generator = torch.Generator().manual_seed(seed)
    for module in new:
        reset_parameters(module, generator)
    flags = {name: p.requires_grad for name, p in attacked.named_parameters()}
    attacked.requires_grad_(False)
    for module in new:
        module.requires_grad_(True)
    trained = [p for module in new for p in module.parameters()]
    together = round(strength * end_share)
    autocast = resolve_autocast("auto", teacher.device)

    def batches(each: int) -> Iterator[Tensor]:
        while True:
            chosen = torch.randint(len(pixels), (each,), generator=generator)
            yield pixels[chosen].to(teacher.device, teacher.dtype)

    def stage(steps: int, rate: float, losses: Iterator[Tensor]) -> None:
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        for loss in islice(losses, steps):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(float(loss.detach()))

    def apart() -> Iterator[Tensor]:
        for batch in batches(batch_size):
            with autocast(teacher.dtype):
                seen = _seen(teacher, old, batch)
            for _ in range(PASSES if parts == "mlp" else 1):
                pairs = [_some(*pair, generator) for pair in seen] if parts == "mlp" else seen
                with autocast(teacher.dtype):  # anew each step: it keeps what it has cast
                    errors = [_error(module, *pair) for module, pair in zip(new, pairs, strict=True)]
                yield torch.stack(errors).mean()

    def end_to_end() -> Iterator[Tensor]:
        for batch in batches(max(1, batch_size // 2)):
            with torch.no_grad(), autocast(teacher.dtype):
                start = teacher.run(teacher.stem(batch), 0, first)
                wanted = teacher.norm(teacher.run(start, first, teacher.depth))
            with autocast(teacher.dtype):
                found = student.norm(student.run(start, first, student.depth))
            yield 1 - cosine_similarity(found, wanted, dim=-1).mean()

    with evaluating(attacked), evaluating(teacher.model):
        stage(round(strength) - together, lr, apart())
        stage(together, END_LR * lr, end_to_end())
    for name, parameter in attacked.named_parameters():
        parameter.requires_grad_(flags[name])
        parameter.grad = None
    return attacked


def _part(backbone: Backbone, index: int, part: str) -> nn.Module:
    """The smallest module that holds the first and the last layer of the MLP or attention; or the block.

    Raises:
        ValueError: it is the whole block.
    """
    block, last = backbone.blocks[index], backbone.mlp_out(index)
    if part == "block":
        return block
    within = [*mlp_in(block, last), last] if part == "mlp" else [attention_out(block)[0]]
    holders = [
        (len(list(module.modules())), module)
        for module in block.modules()
        if set(within) <= set(module.modules()) and not isinstance(module, nn.Linear)
    ]
    found = min(holders, key=lambda holder: holder[0])[1]
    if found is block:
        raise ValueError(f"parts: {type(block).__name__} has no module of its own for {part!r}")
    return found


@torch.no_grad()
def _seen(backbone: Backbone, modules: list[nn.Module], images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each module is given and returns on `images`, (B, N, D) each."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen[module] = args[0], output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(note).remove)
        backbone.run(backbone.stem(images), 0, backbone.depth)
    return [seen[module] for module in modules]


def _some(given: Tensor, returned: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    given, returned = given.flatten(0, 1), returned.flatten(0, 1)
    if len(given) <= TOKENS:
        return given, returned
    chosen = torch.randint(len(given), (TOKENS,), generator=generator).to(given.device)
    return given[chosen], returned[chosen]


def _error(module: nn.Module, given: Tensor, returned: Tensor) -> Tensor:
    found = module(given)
    found = found[0] if isinstance(found, tuple) else found
    found, returned = found.float(), returned.float()
    return (found - returned).square().mean() / returned.square().mean()
