"""The trigger images: the images on which a mark is embedded and later looked for.

They are the owner's (a folder, a tensor, a data loader) or, without any, are drawn from the key: crops of the
photographs that the package ships, which the owner can cut again from the key alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from activemark_fast.key import Key, KeyStream
from activemark_fast.normalisation import Preprocess, kind_of
from activemark_fast.photographs import Photographs, shipped_photographs
from activemark_fast.synthetic import synthetic_images

MIN_IMAGES = 16
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# The images of `public_images` are no secret.
_EVERYBODY = Key(b"activemark_fast: everybody's images")
_SYNTHETIC = "triggers/synthetic"

SMALLEST_CROP = 0.5
"""Least side of a photograph's crop, over the photograph's."""
LIGHTER, CONTRASTIER = 0.15, 0.2
"""How much lighter or darker, and of how much more or less contrast a crop may be."""
HELD_OUT_EVERY = 4
"""Of the clean images every fourth, and of the shipped photographs every fourth photograph, is kept from
marking, to measure what the mark costs."""
SHIPPED_SHARE = 3
"""One in so many clean images, at least, is a shipped photograph."""


class ImageMismatchError(ValueError):
    """The trigger images are not those on which the mark was embedded."""


@dataclass(frozen=True, eq=False)
class TriggerImages:
    """The trigger images as the model takes them, and what identifies them.

    Attributes:
        count: n.
        image: of an index (3, H, W) float32 on the CPU, model input; crops of photographs are made only then.
        digests: HMAC-SHA256 under the key of each image's dtype, shape and bytes as given; none of crops.
        source: "tensor", "folder", "iterable" or "key".
    """

    count: int
    image: Callable[[int], Tensor]
    digests: tuple[bytes, ...]
    source: str

    @property
    def pixels(self) -> Tensor:
        """(n, 3, H, W), all of them."""
        return self.some(range(self.count))

    def some(self, indices: Iterable[int]) -> Tensor:
        """(k, 3, H, W), those of the indices."""
        return torch.stack([self.image(index) for index in indices])


@dataclass(frozen=True, eq=False)
class CleanImages:
    """Images that tell what a model does for its users: none carries a message."""

    fitted: Tensor  # (n, 3, H, W) float32 on the CPU, model input: what a mark is solved on
    held: Tensor  # (k, 3, H, W), what it costs is measured on
    source: str  # where they come from, in words


def clean_images(images: object, preprocess: Preprocess, fitted: int, held: int) -> CleanImages:
    """Natural images for marking: the photographs that the package ships, and images of the owner's own.

    Where images are given, at least a third of each set are still shipped photographs, more where there are
    few: images of one kind do not show what a mark does to others.

    Args:
        images: in any form `trigger_images` takes, at least 16; None: the shipped photographs alone.
        preprocess: how they become the model's input.
        fitted: most images to solve on.
        held: most images to measure on; of the shipped photographs, from other photographs than `fitted`.

    Raises:
        TypeError, ValueError: as `trigger_images`, naming `clean`.
    """
    shipped = shipped_photographs()
    most_fitted, most_held = (count - count // SHIPPED_SHARE for count in (fitted, held))
    own: list[Tensor] = []
    if images is not None:
        most = HELD_OUT_EVERY * max(-(-most_fitted // (HELD_OUT_EVERY - 1)), most_held)
        _, singles = _open(images, lambda: iter(()), most, "clean")
        own = [
            _model_input(image, preprocess, index, "clean")
            for index, image in enumerate(islice(singles, most))
        ]
        if len(own) < MIN_IMAGES:
            raise ValueError(f"clean: wanted at least {MIN_IMAGES} images, got {len(own)}")

    def filled(given: list[Tensor], count: int, crops: npt.NDArray[np.int64]) -> Tensor:
        chosen = crops[: count - len(given)].tolist()
        return torch.stack([*given, *(preprocess(shipped.images[i, None])[0] for i in chosen)])

    marking, apart = _split(shipped)
    solved_on = [image for index, image in enumerate(own) if index % HELD_OUT_EVERY]
    source = "the photographs that the package ships"
    return CleanImages(
        filled(solved_on[:most_fitted], fitted, marking),
        filled(own[::HELD_OUT_EVERY][:most_held], held, apart),
        f"the images given, beside {source}" if own else source,
    )


def _split(shipped: Photographs) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of the crops that a mark may know, and of those of photographs that are held out."""
    apart = shipped.sources.numpy() % HELD_OUT_EVERY == 0
    return np.flatnonzero(~apart), np.flatnonzero(apart)


def photograph_crops(stream: KeyStream, count: int, size: tuple[int, int]) -> Callable[[int], Tensor]:
    """Cuts `count` random crops of the shipped photographs but those that are held out.

    Photographs, corners, sides, mirroring, lightness and contrast are drawn from the stream.

    Args:
        stream: of the key.
        count: of the crops.
        size: (h, w), whose proportions the crops have, and at least half a photograph's side.

    Returns:
        Of the index of a crop, from 0, the crop: (3, h, w) uint8.
    """
    photographs = shipped_photographs()
    shipped = photographs.images
    marking, _ = _split(photographs)
    chosen = marking[stream.integers(0, len(marking), count)]
    draws = stream.uniform((6, count))
    side = shipped.shape[-1]

    def cut(index: int) -> Tensor:
        scale, down, across, mirror, lighter, contrast = draws[:, index].tolist()
        long = side * (SMALLEST_CROP + (1 - SMALLEST_CROP) * scale)
        h, w = (max(1, int(long * edge / max(size))) for edge in size)
        top, left = int(down * (side - h + 1)), int(across * (side - w + 1))
        crop = shipped[int(chosen[index]), :, top : top + h, left : left + w].float()
        crop = interpolate(crop[None], size, mode="bicubic", antialias=True)[0]
        crop = crop.flip(2) if mirror < 0.5 else crop
        crop = (crop - 127.5) * (1 + CONTRASTIER * (2 * contrast - 1)) + 127.5
        return (crop + 255 * LIGHTER * (2 * lighter - 1)).round().clamp(0, 255).to(torch.uint8)

    return cut


def trigger_images(
    images: object, key: Key, preprocess: Preprocess, count: int = 256, *, synthetic: bool = False
) -> TriggerImages:
    """The first `count` trigger images of `images`; fewer where it holds fewer, but at least 16.

    images:
    - None: `count` crops of the shipped photographs, drawn from the key; or, for marks of older formats
      (`synthetic`), `count` synthetic images.
    - a tensor: (n, 3, H, W) of a floating type, already model input, finite; or (n, 3, h, w) uint8.
    - a folder (str or os.PathLike): its files with an image suffix (bmp, jpeg, jpg, png, ppm, tif, tiff,
      webp), in the order of their names, decoded to RGB. Subfolders are not searched.
    - an iterable, read until `count` is reached, of: (3, H, W) floating or (3, h, w) uint8 tensors, batches
      of them (n, 3, …), PIL images, (h, w, 3) uint8 arrays, or tuples and lists which begin with one of
      these, such as the (images, labels) of a DataLoader.
    - what this function returned: the same again, for an iterable that can be read only once.

    An image has one digest, whether it comes as a file, a PIL image, an array or a uint8 tensor; a decoder
    that gives other pixels for the same file gives another.

    Raises TypeError or ValueError, naming `images` and the image or file at fault, for anything else: a
    wrong type, shape or size, NaN or infinity, a file that cannot be decoded, fewer than 16 images.
    """
    if not isinstance(key, Key):
        raise TypeError(f"key: wanted a Key, got {type(key).__name__}")
    if not isinstance(preprocess, Preprocess):
        raise TypeError(f"preprocess: wanted a Preprocess, got {type(preprocess).__name__}")
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count: wanted int, got {type(count).__name__}")
    if count < MIN_IMAGES:
        raise ValueError(f"count: wanted at least {MIN_IMAGES} images, got {count}")
    if isinstance(images, TriggerImages):
        return images
    if images is None and not synthetic:
        cut = photograph_crops(key.stream("triggers/photographs"), count, preprocess.size)
        return TriggerImages(count, lambda index: preprocess(cut(index)[None])[0], (), "key")

    def drawn() -> Iterator[Tensor]:
        return iter(synthetic_images(key.stream(_SYNTHETIC), count, preprocess.size))

    source, singles = _open(images, drawn, count)
    pixels, digests = [], []
    for index, image in enumerate(islice(singles, count)):
        pixels.append(_model_input(image, preprocess, index))
        digests.append(_digest(image, key))
    if len(pixels) < MIN_IMAGES:
        raise ValueError(
            f"images: wanted at least {MIN_IMAGES}, got {len(pixels)}: with fewer, neither the mark nor the "
            "detection rate can be estimated"
        )
    return TriggerImages(len(pixels), pixels.__getitem__, tuple(digests), source)


def public_images(images: object, preprocess: Preprocess, count: int) -> Tensor:
    """The first `count` of `images` as model input, for work that needs no key.

    images: as in `trigger_images`, but one is enough; None: `count` synthetic images, the same for everybody.

    Returns (n, 3, H, W) float32 on the CPU, n <= count.

    Raises TypeError or ValueError as `trigger_images` does.
    """

    def drawn() -> Iterator[Tensor]:
        return iter(synthetic_images(_EVERYBODY.stream(_SYNTHETIC), count, preprocess.size))

    _, singles = _open(images, drawn, count)
    pixels = [_model_input(image, preprocess, index) for index, image in enumerate(islice(singles, count))]
    if not pixels:
        raise ValueError("images: wanted at least 1, got none")
    return torch.stack(pixels)


def check_digests(triggers: TriggerImages, expected: Sequence[bytes]) -> None:
    """Raises ImageMismatchError unless the digests of `triggers` are `expected`, in the same order."""
    if len(triggers.digests) != len(expected):
        raise ImageMismatchError(
            f"images: wanted the {len(expected)} images the mark was embedded on, got {len(triggers.digests)}"
        )
    for index, (digest, wanted) in enumerate(zip(triggers.digests, expected, strict=True)):
        if digest != wanted:
            raise ImageMismatchError(
                f"images: image {index} is not the one the mark was embedded on (or the key is another)"
            )


def _open(
    images: object, drawn: Callable[[], Iterator[Tensor]], count: int, name: str = "images"
) -> tuple[str, Iterator[Tensor]]:
    """The name of the source and its images one by one, each (3, h, w); `drawn` makes what is not given.

    name: of the argument.
    """
    if images is None:
        return "key", drawn()
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise ValueError(f"{name}: wanted a tensor of shape (n, 3, h, w), got {tuple(images.shape)}")
        return "tensor", _unpack(images[:count], name)
    if isinstance(images, (str, os.PathLike)):
        return "folder", _decode_folder(Path(images), name)
    if isinstance(images, Iterable) and not isinstance(images, (bytes, bytearray, memoryview)):
        return "iterable", _unpack_items(images, name)
    raise TypeError(
        f"{name}: wanted None, a tensor, a folder or an iterable of images, got {type(images).__name__}"
    )


def _unpack_items(items: Iterable[object], name: str) -> Iterator[Tensor]:
    for index, item in enumerate(items):
        if isinstance(item, (tuple, list)) and item:
            item = item[0]
        yield from _unpack(item, f"{name}: item {index}")


def _unpack(item: object, name: str) -> Iterator[Tensor]:
    """The images in one item, each (3, h, w), uint8 or floating, on the CPU."""
    if isinstance(item, Image.Image):
        item = np.array(item.convert("RGB"))
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8:
            raise TypeError(f"{name}: wanted a uint8 array, got {item.dtype}")
        if item.ndim != 3 or item.shape[2] != 3:
            raise ValueError(f"{name}: wanted an array of shape (h, w, 3), got {item.shape}")
        item = torch.from_numpy(item.transpose(2, 0, 1).copy())
    if not isinstance(item, Tensor) or not (item.dtype == torch.uint8 or item.is_floating_point()):
        raise TypeError(
            f"{name}: wanted a uint8 or floating tensor, a PIL image or a uint8 array, got {kind_of(item)}"
        )
    batch = item[None] if item.dim() == 3 else item
    if batch.dim() != 4 or batch.shape[1] != 3 or 0 in batch.shape[2:]:
        raise ValueError(f"{name}: wanted shape (3, h, w) or (n, 3, h, w), got {tuple(item.shape)}")
    yield from batch.detach().cpu()


def _decode_folder(folder: Path, name: str) -> Iterator[Tensor]:
    if not folder.is_dir():
        raise ValueError(f"{name}: wanted a folder, got {str(folder)!r}, which is none")
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=lambda p: p.name)
    if not paths:
        raise ValueError(
            f"{name}: wanted files {', '.join(sorted(IMAGE_SUFFIXES))} in {str(folder)!r}, got none"
        )
    for path in paths:
        try:
            with Image.open(path) as image:
                decoded = image.convert("RGB")
        except Exception as error:  # what PIL raises depends on the format and on what is broken
            raise ValueError(
                f"{name}: wanted an image file, got {str(path)!r}, which cannot be decoded"
            ) from error
        yield from _unpack(decoded, f"{name}: {str(path)!r}")


def _model_input(image: Tensor, preprocess: Preprocess, index: int, name: str = "images") -> Tensor:
    if image.dtype == torch.uint8:
        return preprocess(image[None])[0]
    if tuple(image.shape[1:]) != preprocess.size:
        raise ValueError(
            f"{name}: wanted floating images, which are model input already, of size {preprocess.size}, got "
            f"{tuple(image.shape[1:])} for image {index}"
        )
    pixels = image.float()
    if not torch.isfinite(pixels).all():
        raise ValueError(f"{name}: wanted finite float32 values, got NaN or infinity in image {index}")
    return pixels


def _digest(image: Tensor, key: Key) -> bytes:
    header = f"{image.dtype} {tuple(image.shape)}\n".encode()
    return key.mac("triggers/digest", header + image.contiguous().view(torch.uint8).numpy().tobytes())
