"""Reading suspects: model strings, files of all kinds, and which of their tensors is which.

What is there: `folders` (which files), `files` (opening them: `Checkpoint`), `entries` (where tensors lie), a
module for each form (`safetensors`, `archives`, `torch_files`, `msgpack`, `onnx`), and `pickles` and
`pickled`, which read pickles without running them.

What of it is the model's: `names` (one vocabulary), `wanted` (what the model needs), `image_tower` (what a
tower of the file holds), `matching` (how each tensor is made), `stored` and `steps` (making it), `width`
(other widths), `plan` (all of that for a file), `fit` (the report of it).

Models: `architectures` (strings), `models` (load and save), `target` (one for one suspect after another),
`mapped` (weights that stay in their files).
"""

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
