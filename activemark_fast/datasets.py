"""Labelled images for attacks and utility: an archive, a folder with one subfolder a class, or made ones."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from activemark_fast.key import Key
from activemark_fast.normalisation import Preprocess
from activemark_fast.synthetic import synthetic_images
from activemark_fast.triggers import IMAGE_SUFFIXES

TEST_EVERY = 5
"""In a folder without splits every fifth image of a class is a test image."""
# No secret: anybody may make these images.
_PUBLIC = Key(b"activemark_fast: everybody's labelled images")


class DataError(ValueError):
    """Labelled images cannot be read; the message says which and why."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images with labels.

    Attributes:
        images: (n, 3, H, W) float32, model input, on the CPU.
        labels: int64: (n,) classes from 0, or (n, H, W) a class for every pixel.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"images, labels: wanted as many of each, got {len(self.images)}, {len(self.labels)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return int(self.labels.max()) + 1

    @property
    def dense(self) -> bool:
        """Whether every pixel has a label (segmentation)."""
        return self.labels.ndim == 3


@dataclass(frozen=True, eq=False)
class Task:
    """A labelled set to train on, and one to test on."""

    train: Labelled
    test: Labelled


def load_task(path: Path, preprocess: Preprocess, train: int, test: int, classes: int | None = None) -> Task:
    """Reads a task from an archive or a folder.

    - A file (.npz) with arrays `train_jpeg` (bytes of all images, one after another), `train_offset` (where
      each begins, and the end) and `train_label` (n,) or `train_mask` (n, h, w); the same for `test`.
    - A folder with one subfolder of images a class, in the order of their names; or with `train` and `test`,
      each a folder of such subfolders. Without these, every fifth image of a class is a test image.

    Args:
        path: the file or folder.
        preprocess: how images become the model's input; masks are scaled and cropped likewise.
        train: most images to train on; drawn in a fixed order, so that classes are mixed.
        test: most images to test on, likewise.
        classes: use only the first classes; by default all.

    Raises:
        DataError: there is no such file or folder, or it is not as described.
    """
    if path.is_dir():
        return Task(*_read_folder(path, preprocess, (train, test), classes))
    if not path.is_file():
        raise DataError(f"{path}: wanted a .npz archive or a folder of class folders, there is neither")
    try:
        with np.load(path, allow_pickle=False) as archive:
            splits = [
                _read_split(archive, split, count, preprocess, classes, path)
                for split, count in (("train", train), ("test", test))
            ]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable .npz archive: {error}") from error
    return Task(*splits)


def synthetic_task(preprocess: Preprocess, train: int, test: int) -> Task:
    """Made images of three classes: plain leaves, clouds, textured leaves (`synthetic_images`)."""

    def split(purpose: str, count: int) -> Labelled:
        images = preprocess(synthetic_images(_PUBLIC.stream(purpose), count, preprocess.size))
        return Labelled(images, torch.tensor([0, 1, 2, 1])[torch.arange(count) % 4])

    return Task(split("train", train), split("test", test))


def _order(count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(count)


def _read_split(
    archive: np.lib.npyio.NpzFile,
    split: str,
    count: int,
    preprocess: Preprocess,
    classes: int | None,
    path: Path,
) -> Labelled:
    names = [f"{split}_jpeg", f"{split}_offset"]
    kinds = [kind for kind in ("label", "mask") if f"{split}_{kind}" in archive.files]
    if not set(names) <= set(archive.files) or not kinds:
        raise DataError(
            f"{path}: wanted {split}_jpeg, {split}_offset and {split}_label or {split}_mask, "
            f"got {', '.join(archive.files)}"
        )
    data, offsets = (archive[name] for name in names)
    labels = archive[f"{split}_{kinds[0]}"]
    if len(offsets) != len(labels) + 1:
        raise DataError(
            f"{path}: wanted {len(labels) + 1} offsets for {len(labels)} labels, got {len(offsets)}"
        )
    chosen = _order(len(labels))
    if classes is not None and labels.ndim == 1:
        chosen = chosen[labels[chosen] < classes]
    chosen = chosen[:count]
    images = (
        _decode(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes()), f"{path}: image {i} of {split}")
        for i in chosen
    )
    targets = torch.from_numpy(labels[chosen].astype(np.int64))
    if targets.ndim == 3:
        targets = _masks(targets, preprocess)
    return Labelled(_prepared(images, preprocess, f"{path}: {split}"), targets)


def _read_folder(
    path: Path, preprocess: Preprocess, counts: tuple[int, int], classes: int | None
) -> tuple[Labelled, Labelled]:
    split = (path / "train").is_dir() and (path / "test").is_dir()
    listed = [_list_classes(path / name, classes) for name in (("train", "test") if split else ("",))]
    if not split:
        listed = [
            [(file, label) for i, (file, label) in enumerate(listed[0]) if (i % TEST_EVERY == 0) == tested]
            for tested in (False, True)
        ]
    made = []
    for files, count in zip(listed, counts, strict=True):
        chosen = [files[i] for i in _order(len(files))[:count]]
        images = (_decode(file, str(file)) for file, _ in chosen)
        labels = torch.tensor([label for _, label in chosen], dtype=torch.int64)
        made.append(Labelled(_prepared(images, preprocess, str(path)), labels))
    return made[0], made[1]


def _list_classes(folder: Path, classes: int | None) -> list[tuple[Path, int]]:
    names = sorted(child for child in folder.iterdir() if child.is_dir())[:classes]
    if len(names) < 2:
        raise DataError(f"{folder}: wanted at least 2 folders, one a class, got {len(names)}")
    return [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted(name.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]


def _decode(source: Path | io.BytesIO, name: str) -> Tensor:
    try:
        with Image.open(source) as image:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # what PIL raises depends on the format and on what is broken
        raise DataError(f"{name}: cannot be decoded") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _prepared(images: Iterator[Tensor], preprocess: Preprocess, name: str) -> Tensor:
    made = [preprocess(image[None])[0] for image in images]
    if not made:
        raise DataError(f"{name}: wanted at least one image, got none")
    return torch.stack(made)


def _masks(masks: Tensor, preprocess: Preprocess) -> Tensor:
    """(n, h, w) → (n, H, W): the nearest pixel of what `Preprocess` shows, scaled to cover and cropped."""
    (height, width), (h, w) = preprocess.size, masks.shape[1:]
    scale = max(height / h, width / w)

    def places(size: int, source: int) -> Tensor:
        return (((torch.arange(size) + 0.5 - size / 2) / scale + source / 2).long()).clamp(0, source - 1)

    return masks[:, places(height, h)][:, :, places(width, w)]
