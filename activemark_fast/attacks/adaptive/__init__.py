"""Adaptive attacks: a thief who knows the method and the source, and has clean images but no key.

The same calling shape as the other attacks. `data` may also be images without labels, (n, 3, H, W).
"""

from activemark_fast.attacks.adaptive.replace import replace
from activemark_fast.attacks.adaptive.spectral import clean_energy, loudest, ridge_refit
from activemark_fast.attacks.adaptive.vaccinate import vaccinate

__all__ = ["clean_energy", "loudest", "replace", "ridge_refit", "vaccinate"]
