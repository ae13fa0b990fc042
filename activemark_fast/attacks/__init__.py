"""Attacks: what is done to a marked model before it turns up as a suspect. Each returns a changed copy."""

from activemark_fast.attacks.finetune import finetune
from activemark_fast.attacks.prune import prune

__all__ = ["finetune", "prune"]
