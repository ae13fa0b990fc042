"""Codecs: how a message is written into a residual stream and read off again."""

from activemark_fast.codec.keyed import KeyedCodec
from activemark_fast.codec.learned import LearnedCodec
from activemark_fast.codec.protocol import Codec

CODECS: dict[str, type[KeyedCodec] | type[LearnedCodec]] = {
    codec.name: codec for codec in (KeyedCodec, LearnedCodec)
}

__all__ = ["CODECS", "Codec", "KeyedCodec", "LearnedCodec"]
