"""Reading suspects: model strings, files of all kinds, and which of their tensors is which."""

from activemark_fast.checkpoints.models import (
    CheckpointError,
    architecture_of,
    build_model,
    load_model,
    load_weights,
    read_tensors,
    save_model,
)

__all__ = [
    "CheckpointError",
    "architecture_of",
    "build_model",
    "load_model",
    "load_weights",
    "read_tensors",
    "save_model",
]
