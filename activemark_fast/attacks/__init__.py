"""Attacks: what is done to a marked model before it turns up as a suspect.

One shape for all: `attack(model, data, seed, strength) -> model`, with further settings by name. Each
returns a changed copy and leaves `model` as it was; the seed decides all that is random.
"""

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

__all__ = [
    "add_task",
    "average",
    "cast",
    "cut",
    "distil",
    "fine_prune",
    "finetune",
    "noise",
    "overwrite",
    "permute_inside",
    "permute_residual",
    "prune",
    "quantise",
    "reinitialise",
    "remove_head",
    "resize",
    "rotate_residual",
]
