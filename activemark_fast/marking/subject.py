"""The model that is being marked: a copy, and what is known of it before a weight changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from activemark_fast.backbone import Backbone
from activemark_fast.codec.codebooks import BANDS, MEASURED_IMAGES, SiteMeasure
from activemark_fast.dress import fixed_weight
from activemark_fast.marking.cosine import FidelityCheck
from activemark_fast.marking.edit import Step, edit_steps
from activemark_fast.marking.engine import Engine, plan_engine
from activemark_fast.marking.memory import halving
from activemark_fast.marking.quality import Quality
from activemark_fast.marking.scratch import Scratch, made
from activemark_fast.marking.settings import Settings
from activemark_fast.marking.suffix import BATCH, Autocast, SiteActivations, site_activations
from activemark_fast.profiling import measure
from activemark_fast.progress import Progress
from activemark_fast.ranks import Ranks
from activemark_fast.runtime import resolve_autocast
from activemark_fast.site import Placement
from activemark_fast.tracing import Register
from activemark_fast.triggers import CleanImages, TriggerImages

PROFILED_IMAGES = 16
FITTED_IMAGES, HELD_IMAGES = 192, 64
"""Clean images that a mark is solved on, and that its cost is measured on, at most."""
CHECKED_IMAGES = 16
"""Trigger images that the mark is read on before it is released."""
MESSAGES_PER_IMAGE = 2
"""An image runs with a message and with its opposite."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What `prepare` found.

    Attributes:
        backbone: a view of the copy that is marked.
        original: a view of the model that was given.
        placement: where the mark goes, and why.
        steps: the layers that an edit changes; none where gradient steps are taken.
        fitted: activations of the clean images that the mark is solved on.
        carriers: of the first trigger images, which the mark is read on before it is released.
        measured: how tokens vary at the site, on trigger images.
        fidelity: compares the copy with what it was.
        autocast: mixed precision of the forward passes.
        engine: how an edit is computed.
    """

    backbone: Backbone
    original: Backbone
    placement: Placement
    steps: list[Step]
    fitted: SiteActivations
    carriers: SiteActivations
    measured: SiteMeasure
    fidelity: FidelityCheck
    autocast: Autocast
    engine: Engine


@dataclass(frozen=True, eq=False)
class Marked:
    """What marking a subject told; the mark itself is in the subject's weights.

    Attributes:
        quality: how the mark and the model do on images that were kept from marking.
        history: of the tries of an edit, or of the checks of a training.
        engine: how it was computed.
        steps: gradient steps taken.
        state: of the codec, for the watermark.
        register: of the copies' recipients; None without any.
    """

    quality: Quality
    history: list[dict[str, float | str]]
    engine: Engine
    steps: int
    state: dict[str, Tensor]
    register: Register | None


def check_writable(backbone: Backbone) -> None:
    """Refuses a model with a block that a mark could not be written to, or would say nothing in."""
    made = next((name for name, p in backbone.encoder.named_parameters() if p.is_inference()), None)
    if made is not None:
        raise ValueError(f"model: {made} was made in inference mode: build or load the model outside of it")
    for block in range(1, backbone.depth - 1):
        fixed = fixed_weight(backbone.carrier(block))
        if fixed is not None:
            raise ValueError(f"model: the weight of the last linear layer of block {block} {fixed}")
        backbone.mlp_gain(block)
    norms = [module for module in backbone.encoder.modules() if isinstance(module, BatchNorm)]
    if norms and all(map(_unseen, norms)):
        raise ValueError(
            "model: its batch norms have never seen an image (all means 0, all variances 1): load trained "
            "weights"
        )


def _unseen(norm: BatchNorm) -> bool:
    """Whether the statistics of a batch norm are those that it starts with."""
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and bool((mean == 0).all() & (variance == 1).all())


def _own(tower: nn.Module, weights: Sequence[Tensor], engine: Engine) -> None:
    """Gives a tower that shares its parameters its own of these."""
    own = {
        id(weight): nn.Parameter(engine.offload(weight.detach().clone()), weight.requires_grad)
        for weight in weights
    }
    for module in tower.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in own:
                module.register_parameter(name, own[id(parameter)])


def prepare(
    original: Backbone,
    settings: Settings,
    triggers: TriggerImages,
    natural: CleanImages,
    device: torch.device,
    shared: bool,
    scratch: Scratch | None,
    ranks: Ranks,
    bar: Progress,
) -> Subject:
    """Copies the model, profiles the copy, finds the site and runs all images up to it.

    Args:
        original: a view of the model, which is left alone.
        settings: what was asked for.
        triggers: the trigger images.
        natural: clean images.
        device: where the copy goes.
        shared: the copy has its own of those parameters only that an edit may change.
        scratch: where activations wait on disk.
        ranks: the processes that run them together.
        bar: shows the progress.

    Raises:
        ValueError: the model's activations are constant or not finite.
        SiteError: it has no room for a mark.
    """
    backbone = original.of_copy(device, shared)
    autocast = resolve_autocast(settings.precision, device)
    bar.stage("profile", 1)
    with autocast(backbone.dtype):
        profile = measure(backbone, natural.fitted[:PROFILED_IMAGES], ranks=ranks)
    placement = profile.site(block=settings.block)
    site = placement.site
    bar.stage("prefix", 3)

    def at_site(name: str, pixels: Tensor) -> SiteActivations:
        read = partial(site_activations, backbone, pixels, site.block, autocast, ranks=ranks)
        found = SiteActivations(**made(scratch, name, lambda: vars(halving(read, BATCH))))
        bar.advance()
        return found

    shown = triggers.some(range(min(MEASURED_IMAGES, triggers.count)))
    carriers = at_site("carriers", shown)
    measured = SiteMeasure.of(carriers.output, site.prefix_tokens)
    fidelity = FidelityCheck(backbone, at_site("held", natural.held).output, site.block, autocast, ranks)
    if not measured.usable:
        raise ValueError("model: wanted finite activations that vary, got constant or non-finite ones")
    fitted = at_site("fitted", natural.fitted)
    steps: list[Step] = []
    if settings.keyed:
        steps = edit_steps(backbone, site)
        fitted = SiteActivations(fitted.output, fitted.output)  # an edit takes no more
    own = [step.layer.weight for step in steps]
    held = own if shared else [*backbone.model.parameters(), *backbone.model.buffers()]
    held += [] if original.device == device else own
    engine = plan_engine(
        backbone,
        site,
        settings.precision,
        sum(tensor.nbytes for tensor in held),
        shown.nbytes if triggers.source == "key" else triggers.count * shown[0].nbytes,
        len(fitted),
        len(natural.held),
        MEASURED_IMAGES,
        sum(band.books for band in BANDS),
        settings.bits,
        MESSAGES_PER_IMAGE,
        scratch,
        ranks,
    )
    if shared:
        _own(backbone.model, own, engine)
    return Subject(
        backbone,
        original,
        placement,
        steps,
        fitted,
        carriers[:CHECKED_IMAGES],
        measured,
        fidelity,
        autocast,
        engine,
    )
