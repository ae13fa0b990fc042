"""The hold-out images: the images on which a mark is embedded and later looked for.

They are the owner's (a folder, a tensor, a data loader) or, without any, are drawn from the key: crops of the
photographs that the package ships, which the owner can cut again from the key alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from activemark_fast.ops.native import load_native
from activemark_fast.photographs import Photographs, shipped_photographs

MIN_IMAGES = 16
MIN_SYNTHETIC_SIDE = 8  # pixels: below it no leaf fits
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

IMAGES_IN_WORK = 32
"""Synthetic images that are painted side by side."""

_Image = npt.NDArray[np.uint8]  # (3, h, w), contiguous
_Lattice = tuple[int, int, npt.NDArray[np.float64]]


class ImageMismatchError(ValueError):
    """The hold-out images are not those on which the mark was embedded."""


@dataclass(frozen=True)
class Preprocess:
    """How source images become model input.

    Raises TypeError or ValueError for a field that is not as described.
    """

    size: tuple[int, int]  # height, width of the model's input in pixels
    mean: tuple[float, float, float]  # of red, green, blue, on the scale 0 to 1
    std: tuple[float, float, float]  # likewise, above 0

    def __post_init__(self) -> None:
        _check_size("size", self.size)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, tuple) or not all(isinstance(v, (int, float)) for v in values):
                raise TypeError(f"{name}: wanted a tuple of 3 numbers, got {values!r}")
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name}: wanted 3 finite numbers, got {values!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std: wanted numbers above 0, got {self.std!r}")

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) uint8 → (B, 3, H, W) float32.

        Scaled so that the image just covers H by W (for a square: the shorter side is fitted; bicubic
        with antialiasing, values kept within 0 … 255), cropped at the centre, divided by 255, less mean,
        over std. An image that has the right size already is not resampled.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            raise TypeError(f"images: wanted a uint8 tensor, got {_kind(images)}")
        if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ValueError(f"images: wanted shape (B, 3, h, w), got {tuple(images.shape)}")
        height, width = self.size
        h, w = images.shape[2:]
        pixels = images.float()
        if (h, w) != (height, width):
            wide = w * height >= h * width
            covering = (height, w * height // h) if wide else (h * width // w, width)
            pixels = interpolate(pixels, covering, mode="bicubic", antialias=True).clamp(0, 255)
            top, left = round((covering[0] - height) / 2), round((covering[1] - width) / 2)
            pixels = pixels[:, :, top : top + height, left : left + width]
        mean = torch.tensor(self.mean, dtype=torch.float32, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=images.device).view(3, 1, 1)
        return (pixels / 255 - mean) / std


@dataclass(frozen=True, eq=False)
class HoldOut:
    """The hold-out images as the model takes them, and what identifies them."""

    pixels: Tensor  # (n, 3, H, W) float32 on the CPU, model input
    digests: tuple[bytes, ...]  # n HMAC-SHA256 under the key: dtype, shape and bytes of the image as given
    source: str  # "tensor" | "folder" | "iterable" | "key"


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
        images: in any form `holdout_images` takes, at least 16; None: the shipped photographs alone.
        preprocess: how they become the model's input.
        fitted: most images to solve on.
        held: most images to measure on; of the shipped photographs, from other photographs than `fitted`.

    Raises:
        TypeError, ValueError: as `holdout_images`, naming `clean`.
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


def photograph_crops(stream: KeyStream, count: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """`count` random crops of the shipped photographs but those that are held out, each (3, h, w) uint8.

    size: (h, w) of the crops, which have this shape's proportions and at least half a photograph's side.
    Photographs, corners, sides, mirroring, lightness and contrast are drawn from the stream.
    """
    photographs = shipped_photographs()
    shipped = photographs.images
    marking, _ = _split(photographs)
    chosen = marking[stream.integers(0, len(marking), count)]
    draws = stream.uniform((6, count))
    height, width = size
    side = shipped.shape[-1]
    for index in range(count):
        scale, down, across, mirror, lighter, contrast = draws[:, index].tolist()
        long = side * (SMALLEST_CROP + (1 - SMALLEST_CROP) * scale)
        h, w = (max(1, int(long * edge / max(size))) for edge in (height, width))
        top, left = int(down * (side - h + 1)), int(across * (side - w + 1))
        crop = shipped[int(chosen[index]), :, top : top + h, left : left + w].float()
        crop = interpolate(crop[None], size, mode="bicubic", antialias=True)[0]
        crop = crop.flip(2) if mirror < 0.5 else crop
        crop = (crop - 127.5) * (1 + CONTRASTIER * (2 * contrast - 1)) + 127.5
        yield (crop + 255 * LIGHTER * (2 * lighter - 1)).round().clamp(0, 255).to(torch.uint8)


def holdout_images(
    images: object, key: Key, preprocess: Preprocess, count: int = 256, *, synthetic: bool = False
) -> HoldOut:
    """The first `count` hold-out images of `images`; fewer where it holds fewer, but at least 16.

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
    if isinstance(images, HoldOut):
        return images

    def drawn() -> Iterator[Tensor]:
        if synthetic:
            return iter(synthetic_images(key.stream(_SYNTHETIC), count, preprocess.size))
        return photograph_crops(key.stream("triggers/photographs"), count, preprocess.size)

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
    return HoldOut(torch.stack(pixels), tuple(digests), source)


def public_images(images: object, preprocess: Preprocess, count: int) -> Tensor:
    """The first `count` of `images` as model input, for work that needs no key.

    images: as in `holdout_images`, but one is enough; None: `count` synthetic images, the same for everybody.

    Returns (n, 3, H, W) float32 on the CPU, n <= count.

    Raises TypeError or ValueError as `holdout_images` does.
    """

    def drawn() -> Iterator[Tensor]:
        return iter(synthetic_images(_EVERYBODY.stream(_SYNTHETIC), count, preprocess.size))

    _, singles = _open(images, drawn, count)
    pixels = [_model_input(image, preprocess, index) for index, image in enumerate(islice(singles, count))]
    if not pixels:
        raise ValueError("images: wanted at least 1, got none")
    return torch.stack(pixels)


def check_digests(holdout: HoldOut, expected: Sequence[bytes]) -> None:
    """Raises ImageMismatchError unless the digests of `holdout` are `expected`, in the same order."""
    if len(holdout.digests) != len(expected):
        raise ImageMismatchError(
            f"images: wanted the {len(expected)} images the mark was embedded on, got {len(holdout.digests)}"
        )
    for index, (digest, wanted) in enumerate(zip(holdout.digests, expected, strict=True)):
        if digest != wanted:
            raise ImageMismatchError(
                f"images: image {index} is not the one the mark was embedded on (or the key is another)"
            )


def synthetic_images(stream: KeyStream, count: int, size: tuple[int, int]) -> Tensor:
    """Images with the statistics of natural ones, (count, 3, h, w) uint8.

    size: (h, w), at least 8 pixels each.

    By turns dead leaves (opaque discs which hide one another: edges and flat surfaces at every scale),
    clouds (power between 1/f² and 1/f⁴), dead leaves with a texture, clouds. The first n of a larger
    count are the same images. They are the same to the bit on every machine: only integers, comparison
    and float64 +, -, *, /, sqrt are used, in a fixed order.
    """
    _check_size("size", size)
    if min(size) < MIN_SYNTHETIC_SIDE:
        raise ValueError(f"size: wanted at least {MIN_SYNTHETIC_SIDE} pixels a side, got {size}")
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count: wanted int, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"count: wanted at least 1, got {count}")
    images = np.empty((count, 3, *size), dtype=np.uint8)

    # One after another the images take their numbers from the stream; they are painted side by side.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, count, IMAGES_IN_WORK):
            part = images[start : start + IMAGES_IN_WORK]
            painters = [
                _clouds(stream, size) if index % 2 else _dead_leaves(stream, size, index % 4 == 2)
                for index in range(start, start + len(part))
            ]
            for _ in pool.map(lambda paint, image: paint(image), painters, part):
                pass
    return torch.from_numpy(images)


def _dead_leaves(stream: KeyStream, size: tuple[int, int], textured: bool) -> Callable[[_Image], None]:
    """Paints (3, h, w): one-coloured discs of radius density ∝ r^-3, lit aslant."""
    h, w = size
    smallest, largest = max(1.5, min(size) / 100), min(size) / 3
    # A disc's mean area is 2π ln(largest / smallest) smallest², so discs cover the image about 3 to 6 times.
    n = int(h * w / (4 * smallest * smallest))
    draws = stream.uniform((10, n))
    r = 1 / np.sqrt(
        1 / (smallest * smallest) - draws[0] * (1 / (smallest * smallest) - 1 / (largest * largest))
    )
    x = draws[1] * (w + 2 * r) - r
    y = draws[2] * (h + 2 * r) - r
    # The background is the leaf below all others: it is as large as the image.
    r[0], x[0], y[0] = max(size), w / 2, h / 2
    centre, spread, warmth = stream.uniform(3).tolist()
    lightness = 85 + 85 * centre + (70 + 60 * spread) * (draws[3] + draws[4] - 1)
    yellow, red = 30 * (warmth - 0.5) + 36 * (draws[5] - 0.5), 40 * (draws[6] - 0.5)
    slope_x, slope_y = 40 * (draws[7] - 0.5) / r, 40 * (draws[8] - 0.5) / r
    # Disc by disc, as csrc/paint.hpp wants them.
    discs = np.array([x, y, r, lightness, yellow, red, slope_x, slope_y, 90 * draws[9]]).T.copy()
    lattices = _lattices(stream, 1, size, coarsest=16) if textured else []

    def paint(image: _Image) -> None:
        load_native().paint_leaves(
            height=h,
            width=w,
            discs=discs.ctypes.data,
            disc_count=n,
            octaves=_octaves(lattices),
            image=image.ctypes.data,
        )

    return paint


def _clouds(stream: KeyStream, size: tuple[int, int]) -> Callable[[_Image], None]:
    """Paints (3, h, w): a random field in lightness, fainter ones in colour.

    From one octave to the next coarser the field's amplitude grows by a gain. The area of the frequency plane
    grows as f², so a gain of 1, equal power an octave, makes a power spectrum of 1/f², and a gain of 2 one of
    1/f⁴: natural images lie between.
    """
    h, w = size
    centre, contrast, warmth, smoothness = stream.uniform(4).tolist()
    lattices = _lattices(stream, 3, size, coarsest=max(size))

    def paint(image: _Image) -> None:
        load_native().paint_clouds(
            height=h,
            width=w,
            octaves=_octaves(lattices),
            gain=1 + smoothness,
            lightness=(85 + 85 * centre, 60 + 60 * contrast),
            yellow=(30 * (warmth - 0.5), 15),
            red=(0, 15),
            image=image.ctypes.data,
        )

    return paint


def _lattices(stream: KeyStream, channels: int, size: tuple[int, int], coarsest: int) -> list[_Lattice]:
    """For each octave of a random field, from the finest: its shift down and across, and its values.

    Their steps are 1, 2, 4, … pixels, up to the first power of two not below `coarsest`.
    """
    h, w = size
    lattices = []
    for octave in range((coarsest - 1).bit_length() + 1):
        step = 1 << octave
        shift_y, shift_x = stream.integers(0, step, 2).tolist()
        shape = (channels, (h - 1 + shift_y) // step + 2, (w - 1 + shift_x) // step + 2)
        values = stream.uniform(shape)
        values -= 0.5
        lattices.append((shift_y, shift_x, values))
    return lattices


def _octaves(lattices: list[_Lattice]) -> list[tuple[int, int, int]]:
    return [(values.ctypes.data, shift_y, shift_x) for shift_y, shift_x, values in lattices]


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
            f"{name}: wanted a uint8 or floating tensor, a PIL image or a uint8 array, got {_kind(item)}"
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


def _check_size(name: str, size: tuple[int, int]) -> None:
    if not isinstance(size, tuple) or not all(isinstance(v, int) and not isinstance(v, bool) for v in size):
        raise TypeError(f"{name}: wanted a tuple of 2 ints, got {size!r}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name}: wanted (height, width), both at least 1, got {size!r}")


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
