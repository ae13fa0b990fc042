"""The state of an interrupted training, in one file: weights, optimiser, steps taken, what was measured."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from activemark_fast.files import write_whole
from activemark_fast.key import Key

SAVE_EVERY = 60.0
"""Seconds between two savings, at least."""
_HEADER = "activemark_fast training state"
_FORMAT = 1

History = list[dict[str, float | str]]


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Where a training was.

    Attributes:
        step: steps taken.
        tensors: whatever the training needs to go on, by name.
        history: what was measured so far.
    """

    step: int
    tensors: dict[str, Tensor]
    history: History


class TrainingFile:
    """A file that a training is saved to every so often, and that goes when it has ended.

    It holds neither key nor messages. It says of which inputs it is the state, by a MAC under the key, and
    is used for no others.
    """

    def __init__(self, path: Path, key: Key, inputs: dict[str, object]) -> None:
        """inputs: all that the training depends on besides the key, as JSON types.

        Raises ValueError if `path` is a folder, or lies in none that can be written to.
        """
        if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
            raise ValueError(f"checkpoint: wanted a file in a folder to write to, got {str(path)!r}")
        self._path = path
        self._inputs = key.mac("training state", json.dumps(inputs, sort_keys=True).encode()).hex()
        self._saved = time.monotonic()

    def load(self) -> TrainingState | None:
        """The state that was saved; None if there is no file.

        Raises:
            ValueError: the file is something else, or the state of another embedding.
        """
        if not self._path.exists():
            return None
        data = self._path.read_bytes()
        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_HEADER])
            tensors = load(data)
            made_by, inputs, step, history = (header[k] for k in ("format", "inputs", "step", "history"))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"checkpoint: {self._path} is no state of an embedding, or damaged") from error
        if (made_by, inputs) != (_FORMAT, self._inputs):
            raise ValueError(
                "checkpoint: wanted the state of an embedding with this model, key, images and settings, got "
                f"another's: {self._path}"
            )
        return TrainingState(step, tensors, history)

    def due(self) -> bool:
        """Whether enough time has passed since the state was saved."""
        return time.monotonic() - self._saved >= SAVE_EVERY

    def save(self, state: TrainingState) -> None:
        """Writes the state, whole or not at all."""
        header = {
            "format": _FORMAT,
            "inputs": self._inputs,
            "step": state.step,
            "history": state.history,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        write_whole(self._path, save(tensors, metadata={_HEADER: json.dumps(header)}))
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Deletes the file, if there is one."""
        self._path.unlink(missing_ok=True)
