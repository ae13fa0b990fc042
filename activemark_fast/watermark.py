"""The artefact: everything a verification needs besides the key, in one file."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from activemark_fast.codec import CODECS, Codec, KeyedCodec
from activemark_fast.codec.codebooks import max_bits
from activemark_fast.dress import unwrapped
from activemark_fast.files import write_whole
from activemark_fast.freedoms import BITS
from activemark_fast.key import Key
from activemark_fast.normalisation import Preprocess
from activemark_fast.site import Site, taps_after
from activemark_fast.triggers import MIN_IMAGES

FORMAT_VERSION = 3
"""1: without `alignment`. 2: with it. 3: a keyed mark in bands (`codec.codebooks`); the file holds
nothing that follows from something else, and `freedoms.FIELDS` says of what kind each field is."""
IN_BANDS = 3
"""The first format of marks in bands."""
TRIGGER_IMAGES = 128
"""Images from the key that a mark in bands is read on."""
DEEPEST = 4096
MAX_HASHED_AT_ONCE = 8
"""Tensors of a model, all of them in memory."""
_METADATA_KEY = "activemark_watermark"
_UNSET = "0" * 64
"""Stands where the checksum will stand while the checksum of the file is taken."""


class WatermarkError(ValueError):
    """A watermark file that cannot be used, or not with this key."""


@dataclass(frozen=True, eq=False)
class Watermark:
    """What `embed` leaves behind for `verify`. It holds no key, no message and no image.

    Attributes:
        codec: name of the codec.
        bits: message length M.
        axis: "token" or "channel": what the codec injects at.
        site: where the mark is.
        preprocess: how images become the model's input.
        digests: one 32-byte keyed digest for each trigger image, in order; none for images made from the
            key, but in older formats.
        image_source: "key" (made from the key), "tensor", "folder" or "iterable".
        state: the codec's tensors (`Codec.state`).
        fingerprint: `fingerprint` of the marked model.
        architecture: model string of the marked model (`load_model`), or None if it is not known.
        mac: HMAC-SHA256 of all of the others under the key.
        alignment: (n, D) float16, the original's activations at the site on images of their own
            (`align.site_sample`), or None where there are none to go by.
        version: format the watermark was made in.
    """

    codec: str
    bits: int
    axis: str
    site: Site
    preprocess: Preprocess
    digests: tuple[bytes, ...]
    image_source: str
    state: dict[str, Tensor]
    fingerprint: str
    architecture: str | None
    mac: bytes
    alignment: Tensor | None = None
    version: int = FORMAT_VERSION

    @classmethod
    def seal(cls, key: Key, **fields: Any) -> Watermark:
        """A watermark with these `fields` (all but `mac`), authenticated under `key`."""
        unsealed = cls(**fields, mac=b"")
        return cls(**fields, mac=key.mac("watermark", unsealed._body()))

    @property
    def in_bands(self) -> bool:
        """Whether it is a keyed mark in bands (format 3)."""
        return self.codec == KeyedCodec.name and self.version >= IN_BANDS

    @property
    def images(self) -> int:
        """Number of trigger images."""
        return len(self.digests) or TRIGGER_IMAGES

    def check(self, key: Key) -> None:
        """Raises WatermarkError unless the watermark was made with `key`, and says what `embed` could say."""
        if not hmac.compare_digest(self.mac, key.mac("watermark", self._body())):
            raise WatermarkError("key: wanted the key this watermark was made with, got another one")
        self._check_fields()

    def digest(self) -> bytes:
        """SHA-256 over all of it: every setting, the marked model's fingerprint, the MAC."""
        return hashlib.sha256(self._body() + self.mac).digest()

    def restore_codec(self, key: Key) -> Codec:
        """The codec, on the CPU."""
        return CODECS[self.codec].restore(key, self.site, self.bits, self.state, self.axis)

    def _check_fields(self) -> None:
        """Raises WatermarkError for what no `embed` writes: whatever need not be chosen may not be."""
        if type(self.version) is not int or not 1 <= self.version <= FORMAT_VERSION:
            raise WatermarkError(f"version: wanted a format from 1 to {FORMAT_VERSION}, got {self.version!r}")
        if self.version < IN_BANDS:
            return
        site, made = self.site, "no embed writes"
        if not 3 <= site.depth <= DEEPEST:
            raise WatermarkError(f"site.depth: {made} {site.depth}: wanted 3 to {DEEPEST} blocks")
        if not 0 <= site.block <= site.depth - 3:
            raise WatermarkError(f"site.block: {made} block {site.block} of {site.depth}")
        if site.taps != taps_after(site.block, site.depth):
            wanted = taps_after(site.block, site.depth)
            raise WatermarkError(f"site.taps: {made} {site.taps}: wanted {wanted} for block {site.block}")
        if not 0 <= site.prefix_tokens < site.num_tokens:
            raise WatermarkError(
                f"site.prefix_tokens: {made} {site.prefix_tokens} of {site.num_tokens} tokens"
            )
        if (self.image_source == "key") != (not self.digests):
            raise WatermarkError(
                f"digests: {made} {len(self.digests)} for image_source {self.image_source!r}"
            )
        if self.digests and not MIN_IMAGES <= len(self.digests) <= TRIGGER_IMAGES:
            raise WatermarkError(
                f"digests: {made} {len(self.digests)}: wanted {MIN_IMAGES} to {TRIGGER_IMAGES}"
            )
        if not self.in_bands:
            return
        if self.bits not in BITS or self.bits > max_bits(site.width):
            raise WatermarkError(f"bits: {made} {self.bits} for a width of {site.width}")
        if self.axis != "token":
            raise WatermarkError(f"axis: {made} {self.axis!r} for a keyed mark")
        for name in ("massive_tokens", "massive_channels"):
            if getattr(site, name):
                raise WatermarkError(f"site.{name}: {made} any for a mark in bands")
        if self.state:
            raise WatermarkError(f"state: {made} {', '.join(sorted(self.state))} for a keyed mark")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, whole or not at all."""
        header = self._header() | {"mac": self.mac.hex(), "checksum": _UNSET}
        data = save(self._tensors(), metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)})
        data = _with_checksum(data, _UNSET, hashlib.sha256(data).hexdigest())
        write_whole(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Watermark:
        """Reads a file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            WatermarkError: it is truncated or damaged, no watermark, or of a newer format.
        """
        data = Path(path).read_bytes()
        header = _read_header(data, path)
        version = header.get("version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise WatermarkError(
                f"{path}: watermark of format {version}, this release reads formats up to {FORMAT_VERSION}: "
                "update activemark_fast"
            )
        checksum = header.get("checksum")
        if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
            raise WatermarkError(f"{path}: not a watermark, or damaged: it has no checksum")
        if hashlib.sha256(_with_checksum(data, checksum, _UNSET)).hexdigest() != checksum:
            raise WatermarkError(f"{path}: the watermark is damaged: its checksum does not match its content")
        try:
            tensors = load(data)
            version = header["version"]
            alignment = tensors.pop("alignment", None)
            none = None if version < IN_BANDS else torch.empty(0, 32, dtype=torch.uint8)
            digests = tensors.pop("digests") if none is None else tensors.pop("digests", none)
            if (
                digests.dtype != torch.uint8
                or digests.ndim != 2
                or (digests is not none and 0 in digests.shape)
            ):
                raise ValueError(f"digests: wanted uint8 rows, got {digests.dtype} {tuple(digests.shape)}")
            place: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in header["site"].items()
            }
            if version >= IN_BANDS:
                place["taps"] = taps_after(place["block"], place["depth"])
            watermark = cls(
                codec=header["codec"],
                bits=header["bits"],
                axis=header["axis"],
                site=Site(**place),
                preprocess=Preprocess(**{k: tuple(v) for k, v in header["preprocess"].items()}),
                digests=tuple(row.tobytes() for row in digests.numpy()),
                image_source=header["image_source"],
                state={name.removeprefix("codec."): tensor for name, tensor in tensors.items()},
                fingerprint=header["fingerprint"],
                architecture=header["architecture"],
                mac=bytes.fromhex(header["mac"]),
                alignment=alignment,
                version=version,
            )
            known = watermark.codec in CODECS
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise WatermarkError(f"{path}: not a watermark: {type(error).__name__} in its content") from error
        if not known:
            raise WatermarkError(f"{path}: not a watermark: no codec is called {watermark.codec!r}")
        return watermark

    def _header(self) -> dict[str, Any]:
        site = asdict(self.site)
        del site["depth" if self.version < IN_BANDS else "taps"]  # the taps follow from block and depth
        return {
            "version": self.version,
            "codec": self.codec,
            "bits": self.bits,
            "axis": self.axis,
            "site": site,
            "preprocess": asdict(self.preprocess),
            "image_source": self.image_source,
            "fingerprint": self.fingerprint,
            "architecture": self.architecture,
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        if self.digests:
            rows = np.frombuffer(b"".join(self.digests), dtype=np.uint8).reshape(len(self.digests), -1)
            tensors["digests"] = torch.from_numpy(rows.copy())
        if self.alignment is not None:
            tensors["alignment"] = self.alignment
        return tensors | {f"codec.{name}": tensor for name, tensor in self.state.items()}

    def _body(self) -> bytes:
        """What the MAC is taken over, written out here: no release of a library may change it."""
        parts: list[bytes | memoryview] = [json.dumps(self._header(), sort_keys=True).encode()]
        for name, tensor in sorted(self._tensors().items()):
            parts += [json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode(), _bytes(tensor)]
        return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _read_header(data: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The watermark's header, from the metadata of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise WatermarkError(f"{path}: the watermark is truncated, or no watermark at all")
    try:
        outer = json.loads(data[8 : 8 + length])
        header = json.loads(outer["__metadata__"][_METADATA_KEY])
        ends = [int(entry["data_offsets"][1]) for name, entry in outer.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise WatermarkError(f"{path}: not a watermark, or damaged: no readable header") from error
    if not isinstance(header, dict):
        raise WatermarkError(f"{path}: not a watermark, or damaged: no readable header")
    if 8 + length + max(ends, default=0) > len(data):
        raise WatermarkError(f"{path}: the watermark is truncated")
    return header


def _with_checksum(data: bytes, old: str, new: str) -> bytes:
    """The file with another checksum in its place, which is JSON in JSON."""
    entry = r"\"checksum\": \"{}\""
    return data.replace(entry.format(old).encode(), entry.format(new).encode(), 1)


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's values, C-ordered, little-endian."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and SHA-256 of the bytes of every tensor in the model's state dict."""
    return fingerprint_of(
        (name, tensor.dtype, tuple(tensor.shape), partial(_bytes, tensor))
        for name, tensor in sorted(unwrapped(model).state_dict().items())
    )


def fingerprint_of(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], Callable[[], bytes | memoryview]]],
) -> str:
    """`fingerprint` of a model whose tensors are these, in the order of names; as hexadecimal.

    tensors: name, dtype, shape, and what returns the bytes. Several are hashed at a time.
    """

    def line(tensor: tuple[str, torch.dtype, tuple[int, ...], Callable[[], bytes | memoryview]]) -> str:
        name, dtype, shape, content = tensor
        return f"{name}|{dtype}|{shape}|{hashlib.sha256(content()).hexdigest()}\n"

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_HASHED_AT_ONCE)) as pool:
        return hashlib.sha256("".join(pool.map(line, tensors)).encode()).hexdigest()
