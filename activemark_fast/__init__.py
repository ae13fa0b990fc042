"""Proof of ownership for visual foundation models: mark before release, verify suspects later."""

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
