from __future__ import annotations

from activemark_fast.ops.magnitude.op import Magnitudes, magnitudes

__all__ = ["Magnitudes", "magnitudes"]
