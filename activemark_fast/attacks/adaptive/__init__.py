"""Adaptive attacks: a thief who knows the method and the source, and has clean images but no key.

The same calling shape as the other attacks. `data` may also be images without labels, (n, 3, H, W).
"""

from activemark_fast.attacks.adaptive.combine import overwrite_many, search, stack
from activemark_fast.attacks.adaptive.compress import compress, prune_width, slice_residual
from activemark_fast.attacks.adaptive.muddle import muddle
from activemark_fast.attacks.adaptive.replace import replace
from activemark_fast.attacks.adaptive.spectral import spectral
from activemark_fast.attacks.adaptive.vaccinate import vaccinate

__all__ = [
    "compress",
    "muddle",
    "overwrite_many",
    "prune_width",
    "replace",
    "search",
    "slice_residual",
    "spectral",
    "stack",
    "vaccinate",
]
