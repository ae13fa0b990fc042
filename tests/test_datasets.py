from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from activemark_fast.datasets import DataError, Labelled, load_task, synthetic_task
from activemark_fast.normalisation import Preprocess

PREPROCESS = Preprocess((16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", size, colour).save(written, "JPEG", quality=95)
    return written.getvalue()


def archive(path: Path, per_class: int = 6, dense: bool = False, **changed: np.ndarray) -> Path:
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        labels = np.repeat(np.arange(3, dtype=np.uint8), per_class)
        files = [jpeg(COLOURS[label], (32, 16) if dense else (16, 16)) for label in labels]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{split}_offset"] = np.cumsum([0, *map(len, files)])
        if dense:
            arrays[f"{split}_mask"] = np.repeat(np.repeat(labels[:, None, None], 16, 1), 32, 2)
        else:
            arrays[f"{split}_label"] = labels
    np.savez(path, **(arrays | changed))
    return path


def brightest(task: Labelled) -> torch.Tensor:
    return task.images.mean(dim=(2, 3)).argmax(dim=1)


def test_an_archive_gives_images_with_their_labels(tmp_path: Path) -> None:
    task = load_task(archive(tmp_path / "a.npz"), PREPROCESS, 12, 100)
    assert len(task.train) == 12
    assert len(task.test) == 18
    assert task.train.images.dtype == torch.float32
    for split in (task.train, task.test):
        assert torch.equal(brightest(split), split.labels)
        assert not split.dense
        assert split.classes == 3
    assert len(task.train.labels[:6].unique()) > 1, "classes are mixed"
    two = load_task(tmp_path / "a.npz", PREPROCESS, 100, 100, classes=2)
    assert two.train.classes == 2
    assert len(two.train) == 12


def test_masks_are_scaled_and_cropped_as_images_are(tmp_path: Path) -> None:
    wide = np.zeros((18, 16, 32), dtype=np.uint8)
    wide[:, :, 8:24] = 1  # the middle square, which is what the model sees
    wide[:, :8, 8:24] = 2
    path = archive(tmp_path / "a.npz", dense=True, train_mask=wide)
    task = load_task(path, PREPROCESS, 4, 4)
    assert task.train.dense
    assert task.train.labels.shape == (4, 16, 16)
    assert (task.train.labels[:, :8] == 2).all()
    assert (task.train.labels[:, 8:] == 1).all()
    double = Preprocess((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    larger = load_task(path, double, 4, 4).train.labels
    assert (larger[:, :16] == 2).all()
    assert (larger[:, 16:] == 1).all()


@pytest.mark.parametrize("split", [False, True])
def test_a_folder_of_class_folders(tmp_path: Path, split: bool) -> None:
    for part in ("train", "test") if split else ("",):
        for name, colour in zip("abc", COLOURS, strict=True):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(5):
                (tmp_path / part / name / f"{index}.jpg").write_bytes(jpeg(colour))
            (tmp_path / part / name / "notes.txt").write_text("no image")
    task = load_task(tmp_path, PREPROCESS, 100, 100)
    assert (len(task.train), len(task.test)) == ((15, 15) if split else (12, 3))
    assert torch.equal(brightest(task.train), task.train.labels)
    assert sorted(task.test.labels.unique().tolist()) == [0, 1, 2]


def test_made_images_have_three_classes() -> None:
    task = synthetic_task(PREPROCESS, 40, 20)
    assert task.train.labels.bincount().tolist() == [10, 20, 10]
    assert not torch.equal(task.train.images[:20], task.test.images)
    assert torch.equal(synthetic_task(PREPROCESS, 40, 20).train.images, task.train.images)


def test_data_errors(tmp_path: Path) -> None:
    def load(path: Path) -> None:
        load_task(path, PREPROCESS, 4, 4)

    with pytest.raises(DataError, match="there is neither"):
        load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.npz: not a readable \.npz archive"):
        load(tmp_path / "text.npz")
    np.savez(tmp_path / "pickled.npz", train_jpeg=np.array([{}], dtype=object))
    with pytest.raises(DataError):
        load(tmp_path / "pickled.npz")
    np.savez(tmp_path / "bare.npz", train_jpeg=np.zeros(3))
    with pytest.raises(DataError, match="wanted train_jpeg, train_offset and train_label or train_mask"):
        load(tmp_path / "bare.npz")
    broken = archive(tmp_path / "a.npz", train_jpeg=np.zeros(100_000, dtype=np.uint8))
    with pytest.raises(DataError, match=r"image \d+ of train: cannot be decoded"):
        load(broken)
    with pytest.raises(DataError, match="wanted 19 offsets for 18 labels, got 2"):
        load(archive(tmp_path / "b.npz", train_offset=np.array([0, 5])))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="wanted at least 2 folders, one a class, got 0"):
        load(tmp_path / "folder")
    with pytest.raises(ValueError, match="images, labels: wanted as many of each, got 2, 3"):
        Labelled(torch.zeros(2, 3, 4, 4), torch.zeros(3))
