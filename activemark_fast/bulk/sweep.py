"""One suspect after another: open, plan, read, load in place, judge."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from activemark_fast.backbone import NotAViTError
from activemark_fast.bulk.result import SuspectResult
from activemark_fast.bulk.suspects import Suspect
from activemark_fast.checkpoints import build_model
from activemark_fast.checkpoints.entries import HostBuffer
from activemark_fast.checkpoints.errors import NotAModelError, UnreadFormError
from activemark_fast.checkpoints.files import Checkpoint
from activemark_fast.checkpoints.fit import shown_names
from activemark_fast.checkpoints.names import clean_name
from activemark_fast.checkpoints.plan import Plan, plans
from activemark_fast.checkpoints.target import Target
from activemark_fast.commitment import Commitment
from activemark_fast.decision import doubted
from activemark_fast.dress import copied
from activemark_fast.key import Key
from activemark_fast.looks import Prefix
from activemark_fast.runtime import resolve_device
from activemark_fast.tracing import Register
from activemark_fast.verdict import Verdict, rank
from activemark_fast.verifier import Verifier
from activemark_fast.watermark import Watermark, fingerprint_of

_PREFIXES_KEPT = 2


@dataclass(frozen=True, eq=False)
class _KnownPrefix:
    """The weights up to the site's block, and what they made of the images looked at so far."""

    tensors: dict[str, Tensor]
    prefix: Prefix


@dataclass(frozen=True, eq=False)
class SweepSettings:
    """The arguments of `verify_many` that judging depends on."""

    watermark: Watermark
    key: Key | bytes | str | os.PathLike[str]
    model: nn.Module | str | None
    images: object
    alpha: float
    tau: int | None
    power: float | None
    align: bool | None
    device: str | torch.device | None
    precision: str
    max_bytes: int
    commitment: Commitment | None = None
    timeout: float | None = None
    register: Register | None = None

    def sweeper(self) -> Sweeper:
        """A sweeper with these settings. Raises what `verify_many` says of its arguments."""
        model = self.model if self.model is not None else self.watermark.architecture
        if model is None:
            raise ValueError("model: the watermark names no architecture, so wanted one, got None")
        if not isinstance(model, (str, nn.Module)):
            raise TypeError(f"model: wanted a torch.nn.Module or a model string, got {type(model).__name__}")
        tensors = list(model.parameters()) if isinstance(model, nn.Module) else []
        verifier = Verifier(
            self.watermark,
            self.key,
            self.images,
            alpha=self.alpha,
            tau=self.tau,
            power=self.power,
            align=self.align,
            commitment=self.commitment,
            register=self.register,
            architecture=self.watermark.architecture if self.model is None else None,
            device=resolve_device(self.device, tensors[0].device if tensors else torch.device("cpu")),
            precision=self.precision,
        )
        own = build_model(model) if isinstance(model, str) else copied(model)
        return Sweeper(verifier, own.to(verifier.device), self.max_bytes, self.timeout)

    def to_dict(self) -> dict[str, object]:
        """What two sweeps with one journal must have in common, as JSON types."""
        model = self.model if self.model is not None else self.watermark.architecture
        common: dict[str, object] = {
            "watermark": self.watermark.digest().hex(),
            "model": model if isinstance(model, str) else type(model).__name__,
            "alpha": self.alpha,
            "tau": self.tau,
            "power": self.power,
            "align": self.align,
            "precision": self.precision,
        }
        if self.commitment is not None:
            common["commitment"] = hashlib.sha256(self.commitment.to_bytes()).hexdigest()
        if self.register is not None:
            common["recipients"] = self.register.digest().hex()
        return common


class _Deadline:
    """When a suspect is given up; the time that it waits for another one is not its own."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._at = math.inf if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Raises TimeoutError where it has passed."""
        if time.monotonic() > self._at:
            raise TimeoutError(f"took more than {self._seconds:g} s")

    @contextmanager
    def holding(self, lock: threading.Lock) -> Iterator[None]:
        """Waits for a lock and holds it."""
        started = time.monotonic()
        with lock:
            self._at += time.monotonic() - started
            yield


class Sweeper:
    """Judges suspects with one model, which they are loaded into in place.

    `run` may be called from several threads: they read at the same time and judge in turn, so that the next
    suspect is read, and copied to the device, while one is judged. Each thread keeps one buffer as large as
    its largest suspect so far.

    Suspects are not stacked to be run several at a time: on a CPU that took longer (`benchmarks/bulk.py
    stacking`: 0.5 to 1.2 times as fast, mostly below 1, for 2 to 16 demo models); on a GPU it is unmeasured.
    """

    def __init__(
        self, verifier: Verifier, model: nn.Module, max_bytes: int, timeout: float | None = None
    ) -> None:
        """model: of the marked architecture, on the verifier's device; it becomes the sweeper's own.

        timeout: seconds after which a suspect is given up, at the next step of its reading.
        """
        self._verifier = verifier
        self._target = Target(model, verifier.watermark.site)
        misfit = verifier.misfit(self._target.backbone, same_width=True)
        if misfit is not None:
            raise ValueError(f"model: {misfit.replace('the suspect', 'it')}")
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._deeper: dict[int, Target] = {}  # the last one only
        self._prefixes: list[_KnownPrefix] = []
        self._judging = threading.Lock()
        self._local = threading.local()

    def run(self, suspect: Suspect) -> SuspectResult:
        """The result for one suspect. Whatever is wrong with the suspect is in the result, never an error."""
        started = time.perf_counter()
        facts: dict[str, Any] = {}
        try:
            outcome = self._run(suspect, facts)
        except Exception as error:  # whatever a suspect does to this program, the sweep goes on
            outcome = {"error": _one_line(error)}
        return SuspectResult(suspect.name, **outcome, **facts, seconds=time.perf_counter() - started)

    def _run(self, suspect: Suspect, facts: dict[str, Any]) -> dict[str, Any]:
        if suspect.error is not None:
            return {"error": suspect.error}
        if suspect.skipped is not None:
            return {"skipped": suspect.skipped}
        if suspect.module is not None:
            with self._judging:
                return {"verdict": self._verifier.judge(suspect.module)}
        assert suspect.path is not None
        deadline = _Deadline(self._timeout)
        try:
            with Checkpoint(suspect.path, self._max_bytes) as checkpoint:
                facts |= {"size": checkpoint.size, "modified": checkpoint.modified}
                return self._read(checkpoint, facts, deadline)
        except NotAModelError as error:
            return {"skipped": str(error)}
        except UnreadFormError as error:
            return {"verdict": self._verifier.inconclusive(str(error))}

    def _read(self, checkpoint: Checkpoint, facts: dict[str, Any], deadline: _Deadline) -> dict[str, Any]:
        """Reads every image tower of a checkpoint; the verdict is on the one that shows most of a mark."""
        target = self._target
        sources = [checkpoint, *checkpoint.others()]
        every = self._plans(target, sources)
        whole = [plan.blocks for _, plan in every if plan.depth == len(target.wanted.blocks)]
        more = max(whole, default=0) - target.wanted.depth
        if more > 0:
            target = self._with_more(min(more, target.wanted.depth), deadline)
            every = self._plans(target, sources)
        deep = [(source, plan) for source, plan in every if self._verifier.sites(plan.blocks, plan.depth)]
        if not deep:
            return {"verdict": self._too_shallow(every[0][1]), "fit": every[0][1].fit}
        outcomes: list[tuple[Verdict, Checkpoint, Plan]] = []
        for source, chosen in deep:
            tensors = source.read(chosen.names, self._buffer())
            size = sum(source.entries[name].nbytes for name in chosen.names)
            facts["bytes_read"] = facts.get("bytes_read", 0) + size
            tensors = self._on_device(tensors)
            with deadline.holding(self._judging):
                verdict = self._judge(target, chosen, tensors, len(deep), deadline)
            outcomes.append((verdict, source, chosen))
            if verdict.decision == "match":
                break
        verdict, source, chosen = min(outcomes, key=lambda outcome: rank(outcome[0]))
        if verdict.decision == "match":
            verdict = replace(verdict, identical=self._is_marked_model(source, chosen))
        read = [plan for _, plan in deep]
        doubts = {doubt: None for plan in read for doubt in plan.fit.doubts}
        doubts |= {_unfit(plan): None for _, plan in every if plan not in read and plan.blocks}
        if doubts:
            names = ", ".join(shown_names(tuple(doubts)))
            verdict = doubted(verdict, f"the suspect does not quite fit the marked model: {names}")
        return {"verdict": verdict, "fit": chosen.fit, "towers": tuple(p.fit.tower for *_, p in outcomes)}

    def _plans(self, target: Target, sources: Sequence[Checkpoint]) -> list[tuple[Checkpoint, Plan]]:
        """The plans for all image towers, each with what it reads; those of the first source come first."""
        found = []
        for number, source in enumerate(sources):
            for plan in plans(
                target.wanted,
                source.entries,
                source.lora_config,
                source.unread,
                lambda names, source=source: source.read(names, self._buffer()),  # type: ignore[misc]
            ):
                tower = plan.fit.tower if number == 0 else f"{source.path.name}:{plan.fit.tower}"
                found.append((source, replace(plan, fit=replace(plan.fit, tower=tower))))
        return found

    def _with_more(self, more: int, deadline: _Deadline) -> Target:
        """A target with more blocks; the usual one where the model does not take any."""
        with deadline.holding(self._judging):
            if more not in self._deeper:
                try:
                    self._deeper = {more: self._target.deeper(more)}
                except NotAViTError:
                    return self._target
            return self._deeper[more]

    def _too_shallow(self, chosen: Plan) -> Verdict:
        """The verdict where too few blocks fit to read anything, with what is missing."""
        return self._verifier.inconclusive(
            f"too little of the suspect fits the marked model: {len(chosen.steps)} tensors, {chosen.depth} "
            f"whole blocks, and the mark is first read after {self._verifier.watermark.site.taps[0] + 1}; "
            f"missing or of another shape: {', '.join(chosen.fit.missing_and_why) or 'none'}"
        )

    def _judge(
        self, target: Target, chosen: Plan, tensors: dict[str, Tensor], tries: int, deadline: _Deadline
    ) -> Verdict:
        target.load(chosen.tensors(tensors))
        target.fill(chosen.neutral)
        try:
            target.backbone.renew()
        except NotAViTError as error:
            return self._unreadable(target, chosen, f"the suspect cannot be read: {error}")
        prefix = self._prefix() if target is self._target else None
        verdict = self._verifier.read(
            target.backbone, chosen.depth, prefix, tries, chosen.blocks, deadline.check
        )
        return verdict if verdict.images else self._unreadable(target, chosen, verdict.reason)

    def _unreadable(self, target: Target, chosen: Plan, reason: str) -> Verdict:
        for step in chosen.steps:
            if not bool(torch.isfinite(target[step.target]).all()):
                reason = f"the suspect has NaN or infinite weights in {step.target!r}"
                break
        return self._verifier.inconclusive(reason)

    def _prefix(self) -> Prefix:
        """Of the weights that are loaded: an earlier suspect's, where it had the same."""
        for index, known in enumerate(self._prefixes):
            if all(torch.equal(self._target[name], tensor) for name, tensor in known.tensors.items()):
                self._prefixes.insert(0, self._prefixes.pop(index))
                return known.prefix
        kept = {name: self._target[name].clone() for name in self._target.prefix}
        self._prefixes = [_KnownPrefix(kept, Prefix()), *self._prefixes][:_PREFIXES_KEPT]
        return self._prefixes[0].prefix

    def _is_marked_model(self, checkpoint: Checkpoint, chosen: Plan) -> bool:
        """Whether the checkpoint's tensors are the marked model's, bit for bit."""
        inside = {
            clean.removeprefix(chosen.root): name
            for name in checkpoint.entries
            if (clean := clean_name(name)[0]).startswith(chosen.root)
        }
        entries = {name: checkpoint.entries[stored] for name, stored in inside.items()}
        if not self._target.holds({name: tuple(entry.shape) for name, entry in entries.items()}):
            return False  # and nothing had to be read for it
        stored = (
            (name, entry.dtype, entry.shape, partial(checkpoint.read_bytes, inside[name]))
            for name, entry in sorted(entries.items())
        )
        return fingerprint_of(stored) == self._verifier.watermark.fingerprint

    def _on_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on the verifier's device, all there when this returns.

        A stream of its own lets the copies run beside the suspect that is judged meanwhile; on the stream
        which that one computes on they would wait for it.
        """
        device = self._verifier.device
        if device.type != "cuda":
            return {name: tensor.to(device) for name, tensor in tensors.items()}
        if not hasattr(self._local, "stream"):  # one a thread: freed memory is used again only on its stream
            self._local.stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._local.stream):
            there = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        self._local.stream.synchronize()  # only this thread waits
        for tensor in there.values():
            tensor.record_stream(torch.cuda.default_stream(device))  # which they are loaded on
        return there

    def _buffer(self) -> HostBuffer:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = HostBuffer(pinned=self._verifier.device.type == "cuda")
        return self._local.buffer


def _unfit(plan: Plan) -> str:
    """What is said of a tower that could not be read."""
    return f"an image tower {plan.fit.tower!r} that does not fit"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        name = (
            f": {os.path.basename(error.filename)}" if isinstance(error.filename, str | os.PathLike) else ""
        )
        return f"{type(error).__name__}: {error.strerror}{name}"
    text = " ".join(str(error).split())[:500] or type(error).__name__
    return (
        text
        if isinstance(error, ValueError | RuntimeError | MemoryError)
        else f"{type(error).__name__}: {text}"
    )
