"""What `embed` was asked for, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from activemark_fast.backbone import Backbone
from activemark_fast.codec import CODECS, KeyedCodec
from activemark_fast.codec.codebooks import max_bits
from activemark_fast.freedoms import BITS
from activemark_fast.marking.steps import COMPILE
from activemark_fast.site import check_block
from activemark_fast.tracing import check_names


@dataclass(frozen=True)
class Settings:
    """What `embed` was asked for, as it says there; `work` and `group`: whether there is any.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    codec: str
    bits: int
    axis: str
    block: int | None
    fidelity: float
    max_steps: int
    architecture: str | None
    precision: str
    compile: str
    recipients: Sequence[str] | None = None
    work: bool = False
    group: bool = False

    def __post_init__(self) -> None:
        for name, text, choices in (
            ("codec", self.codec, sorted(CODECS)),
            ("axis", self.axis, ["token", "channel"]),
            ("compile", self.compile, list(COMPILE)),
        ):
            if not isinstance(text, str):
                raise TypeError(f"{name}: wanted one of {choices}, got {type(text).__name__}")
            if text not in choices:
                raise ValueError(f"{name}: wanted one of {choices}, got {text!r}")
        if self.axis != "token" and self.codec == KeyedCodec.name:
            raise ValueError(f"axis: the keyed codec injects at tokens, wanted 'token', got {self.axis!r}")
        for name, number in (("bits", self.bits), ("block", self.block), ("max_steps", self.max_steps)):
            if name == "block" and number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{name}: wanted int, got {type(number).__name__}")
        if self.bits not in BITS:
            raise ValueError(
                f"bits: wanted a multiple of {BITS.step}, {BITS[0]} to {BITS[-1]}, got {self.bits}"
            )
        if self.max_steps < 0:
            raise ValueError(f"max_steps: wanted 0 or more, got {self.max_steps}")
        if not isinstance(self.fidelity, (int, float)):
            raise TypeError(f"fidelity: wanted a number, got {type(self.fidelity).__name__}")
        if not 0 < self.fidelity < 1:
            raise ValueError(f"fidelity: wanted a cosine above 0 and below 1, got {self.fidelity}")
        if self.recipients is not None:
            if not self.keyed:
                raise ValueError(f"recipients: wanted the keyed codec with them, got {self.codec!r}")
            check_names(self.recipients)
        if self.work and not self.keyed:
            raise ValueError(f"work: wanted the keyed codec with it, got {self.codec!r}")
        if self.group and (not self.keyed or self.work):
            raise ValueError("group: wanted the keyed codec and no work with it")
        if self.architecture is not None and not isinstance(self.architecture, str):
            raise TypeError(f"architecture: wanted a string, got {type(self.architecture).__name__}")

    @property
    def keyed(self) -> bool:
        """Whether the mark is edited in; else it is trained."""
        return self.codec == KeyedCodec.name

    @property
    def inputs(self) -> list[object]:
        """What two trainings of one resume file must have in common."""
        return [
            *(self.codec, self.bits, self.axis, self.block, self.fidelity, self.max_steps),
            *(self.architecture, self.precision, self.compile),
        ]

    def check_for(self, original: Backbone, device: torch.device) -> None:
        """Raises ValueError for what this model, or the device, has no room for."""
        check_block(self.block, original.depth)
        if self.compile == "graph" and device.type != "cuda":
            raise ValueError(f"compile: 'graph' needs a CUDA device, got {str(device)!r}")
        most = max_bits(original.width)
        if self.keyed and self.bits > most:
            raise ValueError(
                f"bits: wanted at most {most} for a model of width {original.width}, got {self.bits}"
            )
