"""Reading suspects: model strings, files of all kinds, and which of their tensors is which."""

from activemark_fast.checkpoints.architectures import architecture_of, build_model
from activemark_fast.checkpoints.errors import CheckpointError, NotAModelError, UnreadFormError
from activemark_fast.checkpoints.models import load_model, load_weights, save_model

__all__ = [
    "CheckpointError",
    "NotAModelError",
    "UnreadFormError",
    "architecture_of",
    "build_model",
    "load_model",
    "load_weights",
    "save_model",
]
