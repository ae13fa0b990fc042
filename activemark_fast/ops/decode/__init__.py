from __future__ import annotations

from activemark_fast.ops.decode.op import Decoded, decode_keyed, decode_learned

__all__ = ["Decoded", "decode_keyed", "decode_learned"]
