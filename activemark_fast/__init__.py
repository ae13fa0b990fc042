"""Proof of ownership for visual foundation models: mark before release, verify suspects later.

The public names are imported when they are first asked for, so that help, usage errors and interrupts of the
command line need not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activemark_fast.bulk import SuspectResult, verify_many
    from activemark_fast.checkpoints import load_model, save_model
    from activemark_fast.commitment import Commitment
    from activemark_fast.descent import Descent, compare
    from activemark_fast.embedding import Embedding, embed
    from activemark_fast.key import Key
    from activemark_fast.profiling import Profile, profile
    from activemark_fast.tracing import Register
    from activemark_fast.verdict import Verdict
    from activemark_fast.verification import verify
    from activemark_fast.watermark import Watermark

__version__ = "0.1.0"

__all__ = [
    "Commitment",
    "Descent",
    "Embedding",
    "Key",
    "Profile",
    "Register",
    "SuspectResult",
    "Verdict",
    "Watermark",
    "compare",
    "embed",
    "load_model",
    "profile",
    "save_model",
    "verify",
    "verify_many",
]

_MODULES = {
    "bulk": ("SuspectResult", "verify_many"),
    "checkpoints": ("load_model", "save_model"),
    "commitment": ("Commitment",),
    "descent": ("Descent", "compare"),
    "embedding": ("Embedding", "embed"),
    "key": ("Key",),
    "profiling": ("Profile", "profile"),
    "tracing": ("Register",),
    "verdict": ("Verdict",),
    "verification": ("verify",),
    "watermark": ("Watermark",),
}
"""Where each public name is."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
