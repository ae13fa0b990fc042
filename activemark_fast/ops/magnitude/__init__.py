from __future__ import annotations

from activemark_fast.ops.magnitude.op import TopMagnitudes, top_magnitudes

__all__ = ["TopMagnitudes", "top_magnitudes"]
