"""What runs a sweep: threads of this process, or the workers of a Ray cluster."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from activemark_fast.bulk.result import SuspectResult
from activemark_fast.bulk.suspects import Suspect
from activemark_fast.bulk.sweep import Sweeper, SweepSettings

READERS = 2
"""Suspects in memory at a time for each model they are loaded into: one is judged, one is read."""
ATTEMPTS = 3
"""How often a suspect whose worker died is tried."""


def run_local(sweeper: Sweeper, suspects: Iterator[Suspect], in_order: bool) -> Iterator[SuspectResult]:
    """Judges the suspects with threads of this process."""
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="activemark-reader")
    running: deque[Future[SuspectResult]] = deque()
    try:
        while True:
            for suspect in islice(suspects, READERS + 1 - len(running)):
                running.append(pool.submit(sweeper.run, suspect))
            if not running:
                return
            if in_order:
                finished = [running[0]]
            else:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                finished = [future for future in running if future in done]
            for future in finished:
                running.remove(future)
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """An actor: one model, on one GPU where the cluster has any."""

    def __init__(self, settings: SweepSettings) -> None:
        self._sweeper = settings.sweeper()

    def ready(self) -> None:
        pass

    def run(self, suspect: Suspect) -> SuspectResult:
        return self._sweeper.run(suspect)


def run_ray(settings: SweepSettings, suspects: Iterator[Suspect], in_order: bool) -> Iterator[SuspectResult]:
    """Judges the suspects with the workers of a Ray cluster, one for each GPU, or for each CPU without GPUs.

    A suspect whose worker dies is tried again by another one, three times in all.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: there is no cluster, or its workers cannot start.
    """
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("engine: Ray is missing: pip install 'activemark-fast[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address="auto")
        except ConnectionError as error:
            raise ValueError("engine: no Ray cluster is running here; start one: ray start --head") from error
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU", 0) >= 1 else "CPU"
    share = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": 1}
    actor = ray.remote(_Worker).options(max_concurrency=READERS, **share)
    return _RayRun(ray, actor, ray.put(settings), max(1, int(resources.get(kind, 0)))).run(suspects, in_order)


class _RayRun:
    """The suspects that are with workers, and the workers."""

    def __init__(self, ray: Any, actor: Any, settings: Any, workers: int) -> None:
        self._ray = ray
        self._actor = actor
        self._settings = settings
        self._workers = [actor.remote(settings) for _ in range(workers)]
        try:
            ray.get([worker.ready.remote() for worker in self._workers])
        except ray.exceptions.RayError as error:
            self._stop()
            lines = str(error).strip().splitlines()
            raise ValueError(
                f"engine: a Ray worker cannot start: {lines[-1] if lines else error!r}"
            ) from error
        self._running: dict[Any, tuple[int, Suspect, int, Any]] = {}  # place, suspect, attempt, worker

    def run(self, suspects: Iterator[Suspect], in_order: bool) -> Iterator[SuspectResult]:
        results: dict[int, SuspectResult] = {}
        numbered = enumerate(suspects)
        due = 0
        try:
            while True:
                # Results that wait for an earlier one count, so that they do not pile up.
                free = READERS * len(self._workers) - len(self._running) - (len(results) if in_order else 0)
                for place, suspect in islice(numbered, max(0, free)):
                    self._send(place, suspect, 1)
                if not self._running:
                    return
                done, _ = self._ray.wait(list(self._running), num_returns=1)
                place, suspect, attempt, worker = self._running.pop(done[0])
                try:
                    results[place] = self._ray.get(done[0])
                except self._ray.exceptions.RayActorError:
                    self._replace(worker)
                    if attempt == ATTEMPTS:
                        error = f"{ATTEMPTS} workers that read it died"
                        results[place] = SuspectResult(suspect.name, error=error)
                    else:
                        self._send(place, suspect, attempt + 1)
                while (due in results) if in_order else results:
                    yield results.pop(due if in_order else next(iter(results)))
                    due += 1
        finally:
            self._stop()

    def _send(self, place: int, suspect: Suspect, attempt: int) -> None:
        """Gives a suspect to the worker that has fewest."""
        load = {id(worker): 0 for worker in self._workers}
        for *_, worker in self._running.values():
            load[id(worker)] = load.get(id(worker), 0) + 1
        chosen = min(self._workers, key=lambda worker: load[id(worker)])
        self._running[chosen.run.remote(suspect)] = (place, suspect, attempt, chosen)

    def _replace(self, dead: Any) -> None:
        for index, worker in enumerate(self._workers):
            if worker is dead:
                self._workers[index] = self._actor.remote(self._settings)

    def _stop(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)
