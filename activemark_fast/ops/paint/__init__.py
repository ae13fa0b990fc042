from __future__ import annotations

from activemark_fast.ops.paint.op import Octave, paint_clouds, paint_leaves

__all__ = ["Octave", "paint_clouds", "paint_leaves"]
