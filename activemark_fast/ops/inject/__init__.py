from __future__ import annotations

from activemark_fast.ops.inject.op import inject_keyed, inject_keyed_, inject_learned, inject_learned_

__all__ = ["inject_keyed", "inject_keyed_", "inject_learned", "inject_learned_"]
