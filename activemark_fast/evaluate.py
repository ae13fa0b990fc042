"""evaluate: what a mark survives, and what each attack costs the model. One row for each reading."""

from __future__ import annotations

import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from activemark_fast import __version__
from activemark_fast.attacks.overwrite import overwriting_key
from activemark_fast.attacks.resize import resize
from activemark_fast.attacks.suite import Attack, suite
from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Task
from activemark_fast.descent import compare
from activemark_fast.dress import copied
from activemark_fast.embedding import Embedding, UnverifiedMarkError, embed
from activemark_fast.evaluation import FORMAT_VERSION, Evaluation, Row
from activemark_fast.key import Key
from activemark_fast.marking.cosine import feature_cosine
from activemark_fast.progress import Progress
from activemark_fast.utility import features, knn_accuracy, probe_accuracy, segmentation_iou
from activemark_fast.verdict import Verdict
from activemark_fast.verifier import Verifier
from activemark_fast.watermark import Watermark, fingerprint


@dataclass(frozen=True)
class Size:
    """How many images of each task a suite takes."""

    train: int
    test: int


SIZES = {"quick": Size(512, 256), "full": Size(4000, 2000), "adaptive": Size(1000, 500)}


def evaluate(
    marked: nn.Module,
    original: nn.Module,
    watermark: Watermark,
    key: Key,
    out: Path,
    *,
    images: object = None,
    tasks: Mapping[str, Task],
    data: str,
    name: str = "model",
    suite_name: str = "quick",
    seed: int = 0,
    jobs: int | None = None,
    device: torch.device | None = None,
    precision: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """Attacks the marked model and the original in the same ways, and reads the mark from all of them.

    Every attack of the suite makes three rows: the marked model, read with the owner's key; the same, read
    with another key; the attacked original, read with the owner's key. The last two should show no mark.
    Beside them stands what the attacked model is still good for.

    The rows are written to `out` as they come; a run that finds rows of the same evaluation there goes on
    from them. Several attacks run at a time, each on one thread: the rows do not depend on how many.

    Args:
        marked: the marked model.
        original: the model before it was marked.
        watermark: of `marked`.
        key: the owner's.
        out: folder for results.json and results.csv; made if its parent is there.
        images: the trigger images, as `verify` takes them.
        tasks: "similar" (what the model is for), and if there are any "dissimilar" and "segmentation"; an
            attack whose task is missing is left out, and the header says so.
        data: what the tasks are made of, for the header.
        name: of the model, for the header.
        suite_name: "quick", "full" or "adaptive".
        seed: of all attacks; it also chooses the other key.
        jobs: how many attacks run at a time; by default as many as there are CPUs, on other devices 1.
        device: where to compute; by default where the original is.
        precision: as in `embed`.
        progress: show a progress bar on standard error.

    Returns:
        The evaluation. Each row has: attack, family, strength, settings, task, subject ("marked" or
        "original"), key ("owner" or "another"), expected ("match", "no match" or None: no claim), decision,
        as_expected (a match where one is expected, none where none is), reason, detection_rate, p_value,
        mean_bit_errors, histogram (images with 0, 1, … wrong bits), cosine (to the original's features),
        knn_accuracy and probe_accuracy (similar task), task_score (probe accuracy or mean IoU on the attack's
        own task), descent, descent_score and descent_p_value (what `compare` still shows of the original in
        the attacked marked model's weights; an attack by hooks, as slicing is, leaves these as they were),
        images and steps (clean images and gradient steps the attack took, where it tells), attack_seconds,
        seed, seconds (attack, utility and reading). What could not be measured is None.

    Raises:
        ValueError: an argument is not as described, or `out` holds another evaluation.
        WatermarkError, ImageMismatchError: as `verify`.
    """
    if "similar" not in tasks:
        raise ValueError("tasks: wanted at least 'similar', got none")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: wanted at least 1, got {jobs}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, wanted a folder")
    if not out.parent.is_dir():
        raise ValueError(f"out: there is no folder {out.parent}")
    view = Backbone(original)
    device = device or view.device
    attacks = suite(suite_name, view.depth)
    left_out = {attack.name: f"no images for {attack.task}" for attack in attacks if attack.task not in tasks}
    if view.family != "timm":
        left_out |= {attack.name: "written for models of timm" for attack in attacks if attack.timm_only}
    attacks = [attack for attack in attacks if attack.name not in left_out]
    jobs = jobs or ((os.cpu_count() or 1) if device.type == "cpu" else 1)
    header: Row = {
        "format": FORMAT_VERSION,
        "model": name,
        "suite": suite_name,
        "seed": seed,
        "data": data,
        "images": {task: [len(tasks[task].train), len(tasks[task].test)] for task in tasks},
        "left_out": left_out,
        **_marked_header(marked, original, watermark),
        "device": device.type,
        "precision": precision,
    }
    known = _rows_before(out, header)
    header |= {
        "versions": {"activemark_fast": __version__, "python": platform.python_version()}
        | {package: version(package) for package in ("torch", "timm", "numpy")},
        "threads": 1,
    }
    bench = _Bench(marked, original, watermark, key, images, tasks, seed, device, precision)
    out.mkdir(exist_ok=True)
    order = {
        (attack.name, subject): number
        for number, (attack, subject) in enumerate((a, s) for a in attacks for s in ("marked", "original"))
    }
    done = {(row["attack"], row["subject"]) for row in known}
    left = [(a, s) for a in attacks for s in ("marked", "original") if (a.name, s) not in done]
    evaluation = Evaluation(header, known)
    with Progress(progress) as bar, _threads(1):
        bar.stage("attacks", len(left))
        work = [partial(bench.rows, attack, subject) for attack, subject in left]
        for rows in _in_parallel(work, jobs, bar):
            both = [*evaluation.rows, *rows]
            both.sort(key=lambda row: (order[row["attack"], row["subject"]], row["key"] != "owner"))
            evaluation = Evaluation(header, both)
            evaluation.save(out)
            bar.advance()
    return evaluation


def _marked_header(marked: nn.Module, original: nn.Module, watermark: Watermark) -> Row:
    """What is said of the models and their mark."""
    return {
        "marked_fingerprint": fingerprint(marked),
        "original_fingerprint": fingerprint(original),
        "watermark": watermark.mac.hex(),
        "codec": watermark.codec,
        "bits": watermark.bits,
        "block": watermark.site.block,
        "taps": list(watermark.site.taps),
    }


def _rows_before(out: Path, header: Row) -> list[Row]:
    """The rows of the same evaluation that are in `out` already. Raises ValueError for another's."""
    if not (out / "results.json").exists():
        return []
    before = Evaluation.load(out)
    differing = [key for key in header if before.header.get(key) != header[key]]
    if differing:
        raise ValueError(
            f"out: {out} holds an evaluation with another {', '.join(differing)}; choose another folder"
        )
    return before.rows


class _Bench:
    """What all attacks of an evaluation share. Its methods may run in several threads."""

    def __init__(
        self,
        marked: nn.Module,
        original: nn.Module,
        watermark: Watermark,
        key: Key,
        images: object,
        tasks: Mapping[str, Task],
        seed: int,
        device: torch.device,
        precision: str,
    ) -> None:
        other_key = overwriting_key(seed)
        self._owner = Verifier(watermark, key, images, device=device, precision=precision)
        self._original = copied(original).eval().to(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            # Whether the other mark is as strong as `embed` promises makes it no more and no less another.
            sibling: Embedding | UnverifiedMarkError
            try:
                sibling = embed(self._original, other_key, bits=watermark.bits, precision=precision)
            except UnverifiedMarkError as error:
                sibling = error
        self._models = {
            "marked": copied(marked).eval().to(device),
            "original": self._original,
            "sibling": sibling.model,
        }
        self._other = Verifier(sibling.watermark, other_key, device=device, precision=precision)
        self._tasks = tasks
        self._seed = seed
        self._features = features(self._original, tasks["similar"].test.images)

    def rows(self, attack: Attack, subject: str) -> list[Row]:
        """Attacks one of the two models and reads the result."""
        started = time.perf_counter()
        # Each thread has models of its own: a view of a model hooks into it for a moment.
        model = copied(self._models[subject])
        settings: dict[str, Any] = dict(attack.settings)
        if attack.other is not None:
            settings["other"] = copied(self._models[attack.other])
        if attack.run is not None:
            model = attack.run(model, self._tasks[attack.task].train, self._seed, attack.strength, **settings)
        attacked = time.perf_counter()
        useful = self._utility(model, attack)
        descent = self._descent(model if subject == "marked" else None)
        readings = [("owner", self._owner)]
        if subject == "marked":
            readings.append(("another", self._other))
        found = []
        for key, verifier in readings:
            suspect, note = _at_size_of(model, verifier.watermark)
            verdict = verifier.judge(suspect)
            innocent = subject == "original" or (key == "another" and not attack.adds_mark)
            expected = "no match" if innocent else None if attack.removes else "match"
            found.append((key, expected, verdict, note))
        seconds = time.perf_counter() - started
        return [
            {
                "attack": attack.name,
                "family": attack.family,
                "strength": attack.strength,
                "settings": dict(attack.settings),
                "task": attack.task,
                "subject": subject,
                "key": key,
                "expected": expected,
                **_told(verdict, expected, note),
                **useful,
                **(descent if key == "owner" else self._descent(None)),
                **cost(attack, len(self._tasks[attack.task].train)),
                "attack_seconds": round(attacked - started, 3),
                "seed": self._seed,
                "seconds": round(seconds, 3),
            }
            for key, expected, verdict, note in found
        ]

    def _descent(self, model: nn.Module | None) -> Row:
        """What the weights alone say of a descent from the original; None of weights that are not read."""
        try:
            found = None if model is None else compare(self._original, model)
        except ValueError:
            found = None
        return {
            "descent": None if found is None else found.decision,
            "descent_score": None if found is None else found.score,
            "descent_p_value": None if found is None else found.p_value,
        }

    def _utility(self, model: nn.Module, attack: Attack) -> dict[str, float | None]:
        similar = self._tasks["similar"]
        size = Backbone(model).image_size
        train, test = (features(model, _scaled(part.images, size)) for part in (similar.train, similar.test))
        if not bool(torch.isfinite(train).all() and torch.isfinite(test).all()):
            return dict.fromkeys(("cosine", "knn_accuracy", "probe_accuracy", "task_score"))
        labelled = train, similar.train.labels, test, similar.test.labels
        probe = probe_accuracy(*labelled)
        score = probe
        task = self._tasks[attack.task]
        if attack.task == "segmentation":
            score = segmentation_iou(model, task)
        elif attack.task != "similar":
            found = (features(model, part.images) for part in (task.train, task.test))
            train, test = found
            score = probe_accuracy(train, task.train.labels, test, task.test.labels)
        return {
            "cosine": feature_cosine(labelled[2], self._features),
            "knn_accuracy": knn_accuracy(*labelled),
            "probe_accuracy": probe,
            "task_score": score,
        }


def cost(attack: Attack, images: int) -> Row:
    """How many of `images` an attack takes, and gradient steps; None where it does not tell."""
    return {"images": None if attack.images is None else min(attack.images, images), "steps": attack.steps}


def _scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[2:] == size:
        return images
    return interpolate(images, size, mode="bicubic", antialias=True)


def _at_size_of(suspect: nn.Module, watermark: Watermark) -> tuple[nn.Module, str]:
    """The suspect at the marked model's resolution, as a verifier brings it there; and a note if so."""
    side, wanted = Backbone(suspect).image_size[0], watermark.preprocess.size[0]
    if side == wanted:
        return suspect, ""
    return resize(suspect, None, 0, wanted / side), "; read after resizing back"


def _told(verdict: Verdict, expected: str | None, note: str) -> Row:
    counts = np.bincount(verdict.bit_errors, minlength=verdict.bits + 1).tolist()
    return {
        "decision": verdict.decision,
        "as_expected": expected is None or (expected == "match") == (verdict.decision == "match"),
        "reason": verdict.reason + note,
        "detection_rate": None if math.isnan(verdict.detection_rate) else verdict.detection_rate,
        "p_value": verdict.p_value,
        "mean_bit_errors": float(verdict.bit_errors.mean()) if verdict.images else None,
        "histogram": counts,
    }


def _in_parallel(work: Sequence[Callable[[], list[Row]]], jobs: int, bar: Progress) -> Iterator[list[Row]]:
    """The results of `work` as they come. On an error or an interrupt nothing further is begun."""
    if jobs == 1:
        for task in work:
            yield task()
        return
    pool = ThreadPoolExecutor(jobs)
    try:
        futures: list[Future[list[Row]]] = [pool.submit(task) for task in work]
        for future in as_completed(futures):
            yield future.result()
    except KeyboardInterrupt:
        bar.note("evaluate: interrupted; the attacks that run are waited for, which may take minutes")
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """A number of threads for each operation, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
