"""What can be wrong with a checkpoint."""

from __future__ import annotations

import os


class CheckpointError(ValueError):
    """A checkpoint or a model string cannot be used; the message says which and why."""


class UnreadFormError(CheckpointError):
    """A checkpoint in a form that is not read: it may be sound, but its weights stay unseen."""


class NotAModelError(CheckpointError):
    """A file that lies beside checkpoints and is none."""


def shown(value: object) -> str:
    """A value from outside as it may stand in a message: quoted, and not endless."""
    text = repr(str(value) if isinstance(value, os.PathLike) else value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def reason(error: Exception) -> str:
    """An error of a library in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"
