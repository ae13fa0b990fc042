"""Models larger than memory: marked and verified over their files, a block at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from activemark_fast.checkpoints.mapped import map_model
from activemark_fast.embedding import Embedding, embed
from activemark_fast.following import following
from activemark_fast.key import Key
from activemark_fast.marking.scratch import held, kept
from activemark_fast.runtime import resolve_device
from activemark_fast.verdict import Verdict
from activemark_fast.verification import verify
from activemark_fast.watermark import Watermark, WatermarkError


def work_folder(out: Path) -> Path:
    """The folder beside `out` that an embedding waits in."""
    return out.parent / f".{out.name}.work"


def embed_stored(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    watermark: str | os.PathLike[str],
    key: Key | bytes | str | os.PathLike[str],
    images: object = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Embedding:
    """Marks a safetensors checkpoint: a file, or a folder of shards, and writes one of the same form.

    The mark is that of `embed` on the model in the dtypes of its files. In memory are the images, what the
    edit of one block solves for, and the system's own copies of what it reads; all else waits in a folder
    beside `out`, which goes at the end. A run that was cut off goes on from it, to the same files.

    Args:
        model: a model string that says where its weights are, or their path; it is not changed.
        out: where the marked checkpoint goes: a name that is free, on the file system of its folder.
        watermark: file that the watermark is written to.
        key: as in `embed`.
        images: as in `embed`.
        device: where to compute; the CPU by default. Weights stay in the files: those of a block go to a
            device when it runs.
        settings: more arguments of `embed`: clean, bits, block, fidelity, tower, precision, progress.

    Returns:
        The embedding; its model lies over the files of the original.

    Raises:
        CheckpointError: as `map_model` says.
        TypeError, ValueError, UnverifiedMarkError: as `embed` does; or `out` or `watermark` is there, or
            one within the other, or another process is at the same work.
        OSError: a file cannot be read or written.
    """
    out, watermark = Path(out), Path(watermark)
    work = work_folder(out)
    if os.path.lexists(out):
        raise ValueError(f"out: wanted a name that is free, got {out}, which is there")
    place = watermark.resolve()
    if not {out.resolve(), work.resolve()}.isdisjoint([place, *place.parents]):
        raise ValueError(f"watermark: wanted a file outside of {out} and {work}, got {watermark}")
    if watermark.exists() and not work.exists():  # with the folder, it is by a run that was cut off
        raise ValueError(f"watermark: wanted a name that is free, got {watermark}, which is there")
    device = resolve_device(device, torch.device("cpu"))
    stored = map_model(model)
    with held(work), following(device):
        embedding = embed(
            stored.model,
            key,
            images,
            inplace=True,
            architecture=stored.architecture,
            work=work,
            **settings,
        )
        if watermark.exists() and not _holds(watermark, embedding.watermark):
            raise ValueError(f"watermark: wanted a name that is free, got {watermark}, which is there")
        embedding.watermark.save(watermark)
        stored.write(out, work / "written")
        shutil.rmtree(work)
    return embedding


def _holds(path: Path, watermark: Watermark) -> bool:
    """Whether a file is this watermark's."""
    try:
        return Watermark.load(path).digest() == watermark.digest()
    except (WatermarkError, OSError):
        return False


def verify_stored(
    suspect: str | os.PathLike[str],
    watermark: Watermark,
    key: Key | bytes | str | os.PathLike[str],
    images: object = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Verdict:
    """Verifies a safetensors checkpoint as `verify` does the model, whose weights stay in the files.

    Args:
        suspect: a model string that says where its weights are, or their path. They have to be those of the
            architecture, all of them; what is not stored as the model has it is computed into a temporary
            folder.
        watermark: as in `verify`.
        key: as in `verify`.
        images: as in `verify`.
        device: as in `embed_stored`.
        settings: more arguments of `verify`.

    Raises:
        CheckpointError: as `map_model` says.
        TypeError, ValueError: as `verify` does.
        OSError: a file cannot be read, or the temporary folder has no room.
    """
    device = resolve_device(device, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="activemark-") as folder, following(device):
        stored = map_model(suspect, lambda tensor: kept(tensor, Path(folder)))
        return verify(stored.model, watermark, key, images, **settings)
