"""How blocks are called and what they return, as hooks see it while a tower runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, eq=False)
class Call:
    """How a block was called: its residual stream, by position or by name, and what else."""

    stream: str | None
    more: tuple[Any, ...]
    named: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Call]:
        """The stream that a block is called with, and the rest."""
        if args:
            return args[0], cls(None, args[1:], kwargs)
        name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
        rest = {key: value for key, value in kwargs.items() if key != name}
        return None if name is None else kwargs[name], cls(name, (), rest)

    def tensors(self) -> Iterator[Tensor]:
        """All that a block is called with besides its stream."""
        return tensors_in([self.more, self.named])

    def run(self, block: Callable[..., Any], stream: Tensor) -> Tensor:
        """What the block makes of another stream."""
        if self.stream is None:
            return hidden_of(block(stream, *self.more, **self.named))
        return hidden_of(block(**{self.stream: stream}, **self.named))


@contextmanager
def removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Takes hooks away at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_of(output: Any) -> Any:
    """The stream of what a block or a layer returned: it may stand first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in what may be nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


@contextmanager
def bypassing(
    blocks: Sequence[nn.Module], packed: Sequence[tuple[Any, ...] | None], stream: Tensor | None
) -> Iterator[None]:
    """Blocks return what they are given for a while, the last one `stream` if there is one.

    packed: of each block, what it returns beside the stream, as `Visit.packed`.
    """

    def passing(block: nn.Module, beside: tuple[Any, ...] | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            value = Call.of(args, kwargs)[0]
            if stream is not None and block is blocks[-1]:
                value = stream
            return value if beside is None else (value, *beside)

        return forward

    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, beside in zip(blocks, packed, strict=True):
            block.__dict__["forward"] = passing(block, beside)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward
