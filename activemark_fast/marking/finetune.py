"""Gradient training of the suffix, as in the paper (section 3.3): how the learned codec is marked in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity

from activemark_fast.backbone import Backbone
from activemark_fast.codec import Codec
from activemark_fast.key import KeyStream
from activemark_fast.marking.resume import TrainingState
from activemark_fast.marking.steps import Steps
from activemark_fast.marking.suffix import Autocast, SiteActivations, message_loss, run_to_taps
from activemark_fast.ops.decode import Decoded
from activemark_fast.site import Site

MODEL_LR = 1e-4
CODEC_LR = 1e-3
CLEAN_FIDELITY_WEIGHT = 50.0
INJECTED_FIDELITY_WEIGHT = 2.0
BATCH = 32
CHECK_EVERY = 25


def finetune(
    backbone: Backbone,
    original: Backbone,
    codec: Codec,
    site: Site,
    activations: SiteActivations,
    features: Tensor,
    stream: KeyStream,
    max_steps: int,
    autocast: Autocast,
    compile: str,
    reached: Callable[[int, float], bool],
    resumed: TrainingState | None = None,
    save: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> tuple[int, str]:
    """Trains the blocks after the site up to the last tap, and the codec if it has weights, in place.

    Loss: the cross-entropy of message and logits, mean over the taps; plus 1 - cosine between the final
    features and the original's, times 2 on the injected path (the paper's fidelity loss) and times 50 on the
    clean one, which users of the model see; plus, for a codec that is trained, the cross-entropy between what
    it reads from the *original* and a fair coin, so that encoder and decoder cannot talk past the model. That
    last term counts as much as of the message has been learned: from the start it would keep encoder and
    decoder from learning anything.

    Args:
        backbone: the model to mark; its suffix is trained.
        original: the unmarked model, on the same device.
        codec: on the same device.
        site: where the mark goes.
        activations: at the site, of n images.
        features: (n, F, D) float32, the original's, of the same images.
        stream: where the images and messages of each step are drawn from.
        max_steps: upper bound on steps.
        autocast: mixed precision of the forward passes.
        compile: one of `steps.COMPILE`.
        reached: called every 25 steps with the steps taken and the last loss; True ends the training.
        resumed: where an interrupted training was; `stream` is from its beginning, as then.
        save: called after `reached`, with the steps taken and all tensors the training needs to go on.

    Long, for draws, loss and step share the optimiser and the tensors it steps on.

    Returns:
        The number of steps taken; how they were run, and why so.
    """
    first, last = site.block + 1, site.taps[-1] + 1
    suffix = nn.ModuleList(list(backbone.blocks)[first:last])
    weights = list(suffix.parameters())
    # In half precision AdamW divides by 0 (fp16) or its steps are rounded away (bf16): it steps on a float32
    # copy. A float32 weight is its own copy.
    masters = [weight.detach().float() for weight in weights]
    learned = list(codec.parameters()) if isinstance(codec, nn.Module) else []
    groups = [{"params": masters, "lr": MODEL_LR}]
    if learned:
        groups.append({"params": learned, "lr": CODEC_LR})
    device = backbone.device
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    trained = [*masters, *learned]

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(stream.integers(0, len(activations), BATCH))
        return chosen.to(device), torch.from_numpy(stream.bits((BATCH, codec.bits))).to(device)

    def loss_of(marked: Backbone, unmarked: Backbone, chosen: Tensor, message: Tensor) -> Tensor:
        batch = activations[chosen.to(activations.output.device)].to(device)
        with autocast(marked.dtype):
            decoded, injected = run_to_taps(marked, codec, batch, message, site.block)
            clean = marked.run(batch.output, first, last)
            both = marked.run(torch.cat([injected[: len(chosen)], clean]), last, marked.depth)
            seen = marked.features(both).float()
        told = message_loss(decoded)
        lost = 1 - cosine_similarity(seen, features[chosen].repeat(2, 1, 1), dim=-1)
        lost_injected, lost_clean = lost.chunk(2)
        loss = (
            told + INJECTED_FIDELITY_WEIGHT * lost_injected.mean() + CLEAN_FIDELITY_WEIGHT * lost_clean.mean()
        )
        if isinstance(codec, nn.Module):
            with autocast(unmarked.dtype):
                nothing, _ = run_to_taps(unmarked, codec, batch, message, site.block)
            share = (1 - told.detach() / math.log(2)).clamp(0, 1)
            loss = loss + share * _fair_coin_loss(codec, nothing)
        return loss

    @cache
    def views(compile: bool) -> tuple[Backbone, Backbone]:
        """The marked and the unmarked model. Importing what compiles takes seconds: only for who wants it."""
        return (backbone.compiled(), original.compiled()) if compile else (backbone, original)

    def backward(chosen: Tensor, message: Tensor, rows: int, compile: bool) -> Tensor:
        optimizer.zero_grad()
        suffix.zero_grad()  # of weights in half precision, which the optimiser does not know
        total = torch.zeros((), device=device)
        for images, bits in zip(chosen.split(rows), message.split(rows), strict=True):
            loss = loss_of(*views(compile), images, bits) * (len(images) / BATCH)
            loss.backward()
            total += loss.detach()
        return total

    done = 0
    if resumed is not None:
        done = resumed.step
        _restore(trained, optimizer, resumed.tensors)
        for _ in range(done):
            draw()
        _copy(masters, weights)
    steps = Steps(
        backward, compile, device, BATCH, max_steps - done, graphs=activations.output.device == device
    )
    with _training_only(suffix, backbone.model, original.model):
        for step in range(done + 1, max_steps + 1):
            loss = steps(*draw())
            for weight, master in zip(weights, masters, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
            optimizer.step()
            _copy(masters, weights)
            if step % CHECK_EVERY == 0 or step == max_steps:
                if reached(step, float(loss)):
                    return step, steps.reason
                if save is not None and step < max_steps:
                    save(step, _state(trained, optimizer))
    return max_steps, steps.reason


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _state(trained: list[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"value.{index}": tensor for index, tensor in enumerate(trained)}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"{name}.{index}": tensor for name, tensor in slots.items()}
    return tensors


def _restore(trained: list[Tensor], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    _copy([tensors[f"value.{index}"] for index in range(len(trained))], trained)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, index = key.rpartition(".")
        if name != "value":
            state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _fair_coin_loss(codec: Codec, decoded: dict[int, Decoded]) -> Tensor:
    logits = codec.sharpness * torch.stack([read.logits for read in decoded.values()])
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, 0.5))


@contextmanager
def _training_only(suffix: nn.Module, *models: nn.Module) -> Iterator[None]:
    """Gradients for the parameters of `suffix` and no others of `models`; flags are put back at the end."""
    flags = [(p, p.requires_grad) for model in models for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        suffix.requires_grad_(True)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None
