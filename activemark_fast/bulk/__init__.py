"""verify_many: which of many suspects descend from the marked model?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from activemark_fast.bulk.engines import run_local, run_ray
from activemark_fast.bulk.journal import Journal, JournalError, journal_line, read_journal
from activemark_fast.bulk.result import SuspectResult
from activemark_fast.bulk.suspects import Suspect, find_suspects
from activemark_fast.bulk.sweep import SweepSettings
from activemark_fast.commitment import Commitment
from activemark_fast.defaults import ALPHA
from activemark_fast.key import Key
from activemark_fast.tracing import Register
from activemark_fast.watermark import Watermark

__all__ = [
    "JournalError",
    "Suspect",
    "SuspectResult",
    "find_suspects",
    "journal_line",
    "memory_limit",
    "read_journal",
    "verify_many",
]


def verify_many(
    suspects: object,
    watermark: Watermark,
    key: Key | bytes | str | os.PathLike[str],
    model: nn.Module | str | None = None,
    images: object = None,
    *,
    alpha: float = ALPHA,
    tau: int | None = None,
    power: float | None = 0.999,
    align: bool | None = None,
    commitment: Commitment | None = None,
    register: Register | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    max_bytes: int | None = None,
    timeout: float | None = None,
    in_order: bool = False,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    engine: str = "local",
) -> Iterator[SuspectResult]:
    """Verifies many suspects, each loaded into the marked architecture.

    While one suspect is judged the next is read, and only the tensors up to the last tap. What is wrong with
    a suspect is in its result: a checkpoint that cannot be read at all is an error there, one of which too
    little fits the marked model is inconclusive.

    Args:
        suspects: paths, globs, folders, loaded modules, or an iterable of these (see `find_suspects`);
            checkpoints are files and folders of any form and naming that `checkpoints` knows (docs/forms.md).
        watermark: as in `verify`.
        key: as in `verify`.
        model: the marked architecture: a model string (`build_model`) or a model, of which a copy is used; by
            default what the watermark names.
        images: as in `verify`.
        alpha: as in `verify`.
        tau: as in `verify`.
        power: images are read only until a verdict is settled, and a mark as faint as `sequential` has it is
            missed with a probability of at most 1 - `power` by that; the p-value stays exact. None reads all
            images of every suspect.
        align: as in `verify`.
        commitment: as in `verify`.
        register: as in `verify`; with the engine "local" only, for it is a secret.
        device: where to compute; by default where `model` is, or the CPU.
        precision: as in `verify`.
        max_bytes: most bytes of one suspect in memory; what needs more is an error. Two are in memory at a
            time. By default an eighth of the machine's memory.
        timeout: seconds after which a suspect is given up, at the next step of its reading; that is an error
            in its result. Without, none is. It does not count for loaded modules.
        in_order: results come in the order of the suspects, not as they finish.
        journal: a file to which each result is written, safely, before it is returned.
        resume: go on with the journal that is there: suspects that it has are skipped.
        engine: "local", or "ray": the workers of a Ray cluster, to which the paths must mean the same; `key`
            must then be a key file (a path), which each worker reads: no secret goes through Ray.

    Returns:
        An iterator over the results.

    Raises:
        TypeError, ValueError, WatermarkError, RegisterError, ImageMismatchError: an argument is not as
            described.
        JournalError: the journal exists and `resume` is False, or is another sweep's, damaged or in use.
    """
    if not isinstance(engine, str):
        raise TypeError(f"engine: wanted 'local' or 'ray', got {type(engine).__name__}")
    if engine not in ("local", "ray"):
        raise ValueError(f"engine: wanted 'local' or 'ray', got {engine!r}")
    if engine == "ray" and not isinstance(key, os.PathLike):
        raise TypeError(f"key: wanted the path of a key file for the engine 'ray', got {type(key).__name__}")
    if timeout is not None and (not isinstance(timeout, (int, float)) or isinstance(timeout, bool)):
        raise TypeError(f"timeout: wanted a number, got {type(timeout).__name__}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout: wanted above 0, got {timeout}")
    if engine == "ray" and register is not None:
        raise ValueError(
            "register: wanted none with the engine 'ray', for no secret goes through Ray, got one"
        )
    if not isinstance(watermark, Watermark):
        raise TypeError(f"watermark: wanted a Watermark, got {type(watermark).__name__}")
    settings = SweepSettings(
        watermark,
        key,
        model,
        images,
        alpha,
        tau,
        power,
        align,
        device,
        precision,
        _checked_limit(max_bytes),
        commitment,
        timeout,
        register,
    )
    sweeper = settings.sweeper()  # with ray, too: what is wrong with an argument is found before any work
    found = find_suspects(suspects)
    opened = None if journal is None else Journal(Path(journal), settings.to_dict(), resume=resume)

    def results() -> Iterator[SuspectResult]:
        with ExitStack() as stack:
            if opened is not None:
                stack.enter_context(opened)
            left = (suspect for suspect in found if opened is None or suspect.name not in opened.done)
            if engine == "ray":
                running = run_ray(settings, left, in_order)
            else:
                running = run_local(sweeper, left, in_order)
            for result in running:
                if opened is not None:
                    opened.append(result.to_dict())
                yield result

    return results()


def memory_limit() -> int:
    """Most bytes of one suspect in memory where nothing else is said: an eighth of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8


def _checked_limit(max_bytes: int | None) -> int:
    if max_bytes is None:
        return memory_limit()
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool):
        raise TypeError(f"max_bytes: wanted int, got {type(max_bytes).__name__}")
    if max_bytes < 1:
        raise ValueError(f"max_bytes: wanted at least 1, got {max_bytes}")
    return max_bytes
