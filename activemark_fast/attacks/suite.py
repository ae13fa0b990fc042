"""The robustness suites: which attacks at which strengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import nn

from activemark_fast.attacks.adaptive import (
    compress,
    muddle,
    overwrite_many,
    prune_width,
    replace,
    search,
    slice_residual,
    spectral,
    stack,
    vaccinate,
)
from activemark_fast.attacks.adaptive.compress import IMAGES as CALIBRATION_IMAGES
from activemark_fast.attacks.adaptive.parts import KINDS
from activemark_fast.attacks.adaptive.spectral import IMAGES as CLEAN_IMAGES
from activemark_fast.attacks.cut import cut, reinitialise, remove_head
from activemark_fast.attacks.distil import distil
from activemark_fast.attacks.finetune import finetune
from activemark_fast.attacks.merge import add_task, average
from activemark_fast.attacks.noise import noise
from activemark_fast.attacks.overwrite import overwrite
from activemark_fast.attacks.prune import fine_prune, prune
from activemark_fast.attacks.quantise import cast, quantise
from activemark_fast.attacks.resize import resize
from activemark_fast.attacks.symmetry import permute_inside, permute_residual, rotate_residual

SUITES = ("quick", "full", "adaptive")
BATCH_SIZE = 16
"""Of fine-tuning: the fewer images a step, the more steps an attacker takes with the same images."""
TaskName = Literal["similar", "dissimilar", "segmentation"]


@dataclass(frozen=True)
class Attack:
    """One row of a suite.

    Attributes:
        family: what kind of attack it is.
        name: what exactly is done; unique within the suite.
        run: `attack(model, data, seed, strength, **settings)`; None leaves the model as it was released.
        strength: see `run`.
        settings: see `run`; JSON types.
        task: which labelled images it trains on.
        other: which other model takes part: the unmarked original, or a sibling under another key.
        removes: the mark is expected to go with the weights that carry it, so that no match is claimed.
        timm_only: it knows the models of timm only.
        adds_mark: the suspect ends up with a mark under the other key as well.
        quick: whether the quick suite has it, too; of adaptive attacks, whether the suite has it.
        images: most clean images that it takes; None if that is not told.
        steps: gradient steps that it takes; None if that is not told.
    """

    family: str
    name: str
    run: Callable[..., nn.Module] | None
    strength: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    task: TaskName = "similar"
    other: Literal["original", "sibling"] | None = None
    removes: bool = False
    timm_only: bool = False
    adds_mark: bool = False
    quick: bool = False
    images: int | None = None
    steps: int | None = None


def suite(name: str, depth: int) -> list[Attack]:
    """The attacks of a suite on a model of `depth` blocks.

    "quick" and "full" are what may happen to any model; "adaptive" is what a thief does who knows the method.
    There a family is one attack at several strengths.

    Raises:
        ValueError: there is no suite of this name.
    """
    if name not in SUITES:
        raise ValueError(f"suite: wanted one of {', '.join(SUITES)}, got {name!r}")
    if name == "adaptive":
        return [RELEASED, *(attack for attack in adaptive_attacks() if attack.quick)]
    return [attack for attack in _all(depth) if attack.quick or name == "full"]


RELEASED = Attack("none", "as released", None, 0, quick=True, images=0, steps=0)


def _all(depth: int) -> list[Attack]:
    return [
        RELEASED,
        *_fine_tuning(),
        *_pruning(),
        Attack(
            "quantisation", "int8 weights and activations", quantise, 8, {"activations": True}, quick=True
        ),
        Attack("quantisation", "int4 weights in groups of 32", quantise, 4, quick=True),
        Attack("quantisation", "fp8 weights", cast, 8, quick=True),
        Attack("quantisation", "bf16 weights", cast, 16, quick=True),
        *(
            Attack("noise", f"weights + {share:.0%} noise", noise, share, quick=share == 0.3)
            for share in (0.05, 0.1, 0.2, 0.3, 0.5)
        ),
        *(
            Attack(
                "merging",
                f"{1 - share:.0%} of it, {share:.0%} of the original",
                average,
                share,
                other="original",
                quick=share == 0.5,
            )
            for share in (0.25, 0.5, 0.75)
        ),
        Attack("merging", "task vector of the original added", add_task, 1, other="original", quick=True),
        Attack(
            "merging",
            "collusion: mean with a sibling under another key",
            average,
            0.5,
            other="sibling",
            adds_mark=True,
            quick=True,
        ),
        Attack("overwriting", "second mark, features to 0.996", overwrite, 0.004, adds_mark=True, quick=True),
        Attack("overwriting", "second mark, features to 0.98", overwrite, 0.02, adds_mark=True),
        Attack("late blocks", "last block re-initialised", reinitialise, 1, quick=True),
        Attack(
            "late blocks", f"last {depth // 4} blocks re-initialised", reinitialise, depth // 4, quick=True
        ),
        Attack("late blocks", f"last {depth // 4} blocks cut off", cut, depth // 4, quick=True),
        Attack("late blocks", "head removed", remove_head, 1, quick=True),
        Attack("resolution", "images 1.5 times as large", resize, 1.5, timm_only=True, quick=True),
        *(
            Attack("symmetry", name, run, 1, timm_only=True, quick=quick)
            for name, run, quick in (
                ("residual stream permuted", permute_residual, True),
                ("residual stream rotated", rotate_residual, True),
                ("heads and units permuted and scaled", permute_inside, False),
            )
        ),
        Attack("replacement", "distilled into a fresh model", distil, 3, removes=True, quick=True),
        Attack("replacement", "all blocks re-initialised", reinitialise, depth, removes=True, quick=True),
    ]


def _fine_tuning() -> list[Attack]:
    def tuned(
        name: str, lr: float, task: TaskName = "similar", quick: bool = False, **settings: float | str
    ) -> Attack:
        settings = {"batch_size": BATCH_SIZE} | settings
        return Attack("fine-tuning", name, finetune, lr, settings, task=task, quick=quick)

    return [
        tuned("head only, 1e-3", 1e-3, quick=True, layers="head", epochs=1),
        tuned("last quarter, 1e-4", 1e-4, quick=True, layers="last"),
        tuned("last quarter, 1e-3", 1e-3, layers="last"),
        tuned("all, 1e-5", 1e-5),
        tuned("all, 3e-5", 3e-5),
        tuned("all, 1e-4", 1e-4, quick=True),
        tuned("all, 3e-4", 3e-4, quick=True),
        tuned("all, 1e-3", 1e-3, quick=True),
        tuned("all, 1e-4, no weight decay", 1e-4, weight_decay=0.0),
        tuned("all, 1e-4, weight decay 0.3", 1e-4, weight_decay=0.3),
        tuned("all, 1e-4, 1 epoch", 1e-4, epochs=1),
        tuned("all, 1e-4, 10 epochs", 1e-4, epochs=10),
        tuned("all, 3e-5, from a linear probe", 3e-5, probe_first=True),
        tuned("all, 1e-4, layer-wise decay 0.75", 1e-4, layer_decay=0.75),
        tuned("LoRA, 1e-4", 1e-4, layers="lora"),
        tuned("LoRA, 1e-3", 1e-3, quick=True, layers="lora"),
        tuned("dissimilar task, all, 1e-4", 1e-4, "dissimilar", quick=True),
        tuned("dissimilar task, all, 3e-4", 3e-4, "dissimilar"),
        tuned("segmentation, all, 1e-4", 1e-4, "segmentation", quick=True),
        tuned("segmentation, all, 3e-4", 3e-4, "segmentation"),
        tuned("segmentation, last quarter, 1e-3", 1e-3, "segmentation", layers="last"),
    ]


def _pruning() -> list[Attack]:
    names = {"global": "weights", "layer": "weights of each matrix", "heads": "heads", "units": "MLP units"}
    shares = {"global": (0.2, 0.4, 0.6, 0.8), "layer": (0.2, 0.4, 0.6, 0.8)}
    quick = {("global", 0.4), ("global", 0.6), ("layer", 0.6), ("heads", 0.25), ("units", 0.25)}
    return [
        *(
            Attack(
                "pruning",
                f"{share:.0%} of {names[scope]}",
                prune,
                share,
                {"scope": scope},
                quick=(scope, share) in quick,
            )
            for scope in names
            for share in shares.get(scope, (0.25, 0.5))
        ),
        Attack("pruning", "fine-pruning of 25% of MLP units", fine_prune, 0.25, quick=True),
        Attack("pruning", "fine-pruning of 50% of MLP units", fine_prune, 0.5),
    ]


HOLDS = frozenset({"Wanda, 50%", "SparseGPT, 50%", "GPTQ, 4 bits", "width pruning with refit, 10%"})
"""Adaptive attacks after which the mark is claimed to be there. Of the others nothing is claimed."""


def adaptive_attacks() -> list[Attack]:
    """What a thief does who knows the method: each attack at several strengths; the suite has some.

    Long, for it is a table.
    """

    def curve(
        family: str,
        run: Callable[..., nn.Module],
        strengths: Sequence[float],
        form: str,
        quick: Sequence[float] = (),
        images: int = CLEAN_IMAGES,
        steps: int | None = 0,
        trained: bool = False,
        **settings: Any,
    ) -> list[Attack]:
        return [
            Attack(
                family,
                name := f"{family}, {_told(strength, form)}",
                run,
                strength,
                settings,
                removes=name not in HOLDS,
                quick=strength in quick,
                images=images,
                steps=round(strength) if trained else steps,
            )
            for strength in strengths
        ]

    every = list(KINDS)
    calibrated = CALIBRATION_IMAGES
    tuned = partial(finetune, batch_size=BATCH_SIZE)
    return [
        *curve("loudest of fc2", spectral, (8, 16, 32, 64, 128, 256, 384), "d", (64, 128)),
        *curve(
            "loudest of fc2 and attention",
            spectral,
            (32, 64, 96, 192, 288),
            "d",
            (64, 96),
            matrices=["fc2", "attention"],
        ),
        *curve("loudest of all", spectral, (8, 16, 32, 64), "d", (32,), matrices=every),
        *curve("energy of fc2", spectral, (0.99, 0.95, 0.9), ".0%", (0.95,), method="energy"),
        *curve("energy of all", spectral, (0.99, 0.95, 0.9), ".0%", (0.95,), method="energy", matrices=every),
        *curve("ridge refit of fc2", spectral, (0.1, 0.5, 2), "g", (2,), method="ridge"),
        *curve("ridge refit of all", spectral, (0.1, 0.5, 2), "g", (0.5,), method="ridge", matrices=every),
        *curve("Wanda", compress, (0.5, 0.6), ".0%", (0.5,), calibrated),
        *curve("SparseGPT", compress, (0.5, 0.6, 0.7), ".0%", (0.5,), calibrated, method="sparsegpt"),
        *curve("GPTQ", compress, (4, 3), "d bits", (4,), calibrated, method="gptq"),
        *curve("low rank", compress, (0.2, 0.3, 0.4), ".0%", (0.3,), calibrated, method="low rank"),
        *curve("width pruning with refit", prune_width, (0.1, 0.25, 0.5), ".0%", (0.1,), calibrated),
        *curve("slicing", slice_residual, (0.25, 0.5), ".0%", (0.5,), calibrated),
        *curve("replaced MLPs", replace, (30, 100, 300, 1500, 6000), "d steps", (30, 100), trained=True),
        *curve("replaced attention", replace, (100, 300, 1500), "d steps", trained=True, parts="attention"),
        *curve("replaced blocks", replace, (100, 300), "d steps", (100,), trained=True, parts="block"),
        *curve("vaccination", vaccinate, (50, 200), "d steps", (200,), trained=True),
        *curve("vaccination at 3e-4", vaccinate, (200, 1000), "d steps", trained=True, lr=3e-4),
        *curve("vaccination at 1e-4", vaccinate, (200, 1000), "d steps", trained=True, lr=1e-4),
        *curve("vaccination at 3e-5", vaccinate, (200, 1000), "d steps", trained=True, lr=3e-5),
        *curve(
            "vaccination to nothing",
            vaccinate,
            (100, 200),
            "d steps",
            trained=True,
            answer="nothing",
        ),
        *curve(
            "vaccination within clean activations",
            vaccinate,
            (100, 200),
            "d steps",
            trained=True,
            within=True,
        ),
        *curve(
            "vaccination without clean loss",
            vaccinate,
            (100, 200),
            "d steps",
            trained=True,
            clean_weight=0.0,
        ),
        *curve("muddling", muddle, (1, 3, 10, 30), "g", (10,)),
        *curve(
            "vaccination in 200 steps, then muddling",
            partial(stack, before=[(vaccinate, 200)], attack=muddle),
            (3, 10),
            "g",
            steps=200,
        ),
        *curve("overwriting", overwrite_many, (4, 16), "d keys", (4,), 0),
        *curve(
            "loudest 32 of fc2, then replaced MLPs",
            partial(stack, before=[(spectral, 32)], attack=replace),
            (100, 300),
            "d steps",
            (100,),
            trained=True,
        ),
        *curve(
            "vaccination in 100 steps, then fine-tuning",
            partial(stack, before=[(vaccinate, 100)], attack=tuned),
            (1e-4,),
            "g",
            (1e-4,),
            steps=None,
        ),
        *curve(
            "loudest of fc2, as many as cost",
            partial(search, attack=spectral, gentle=0, harsh=128),
            (1, 2),
            "d of 100 points",
            (1,),
        ),
    ]


def _told(strength: float, form: str) -> str:
    """A strength in words; `form` is how numbers are formatted, and what follows them."""
    number, _, unit = form.partition(" ")
    return f"{strength:{number}} {unit}".rstrip()
