"""How gradient steps are run: eager, with compiled blocks or as a CUDA graph, whichever ends them soonest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from activemark_fast.marking.memory import halving

COMPILE = ("auto", "eager", "regional", "graph")
WARM_UP, TRIAL = 3, 10
"""Steps of each way that are not timed, and that are."""
COMPILE_SECONDS = 30.0
"""About what compiling a transformer block takes, forward and backward; less where it was compiled before."""
COMPILE_SAVES = 0.25
"""About the share of a step on a GPU that compiled blocks save."""


class Way(NamedTuple):
    """One way to run a step."""

    compiled: bool
    graphed: bool

    def __str__(self) -> str:
        if self.graphed:
            return "compiled, as a CUDA graph" if self.compiled else "as a CUDA graph"
        return "compiled" if self.compiled else "eager"


EAGER, GRAPH, REGIONAL = Way(False, False), Way(False, True), Way(True, False)


class Steps:
    """Runs the gradient steps of one training.

    "auto" is eager on a CPU, where a compiled block saves next to nothing and where results must not hang on
    the time. On CUDA it times a few steps eager, then replayed as a graph, which takes a second to record and
    spares small models their launches; then with compiled blocks, if what they usually save on the steps that
    are left is more than compiling usually takes; and goes on with the fastest.

    Args:
        compute: of images and messages, how many images at once, and whether with compiled blocks: the loss,
            after a backward pass into gradients that it has itself set to None.
        compile: one of `COMPILE`. "regional" compiles alike blocks once; "graph" needs CUDA.
        device: where it is computed.
        batch: images of a step; after each time the device had no room, half as many run at once.
        steps: how many will be run at most.
        graphs: whether "auto" may record graphs: all that a step reads is on the device.
    """

    def __init__(
        self,
        compute: Callable[[Tensor, Tensor, int, bool], Tensor],
        compile: str,
        device: torch.device,
        batch: int,
        steps: int,
        graphs: bool,
    ) -> None:
        self._compute = compute
        self._device = device
        self._at_once = batch
        self._left = steps
        self._graphs = graphs
        self._tried: dict[Way, float] = {}
        """Seconds a step; infinite where it failed."""
        self._way = {"regional": REGIONAL, "graph": GRAPH}.get(compile, EAGER)
        self._choosing = compile == "auto" and device.type == "cuda"
        self._in_trial = 0
        self._started = 0.0
        self._replay: Callable[[Tensor, Tensor], Tensor] | None = None
        if compile != "auto":
            self.reason = f"gradient steps {self._way}: asked for"
        elif not self._choosing:
            self.reason = "gradient steps eager: compiling saves next to nothing on a CPU"
        else:
            self.reason = "gradient steps eager: too few to try other ways"

    def __call__(self, chosen: Tensor, message: Tensor) -> Tensor:
        """Leaves the gradients of a step and returns its loss, both to be used before the next call.

        Args:
            chosen: (B,) int64, the images.
            message: (B, M) uint8.
        """
        if self._choosing:
            self._clock(chosen, message)
        self._left -= 1
        if not self._way.graphed:
            return self._run(chosen, message)
        if self._replay is None:
            self._replay = self._record(chosen, message)
        return self._replay(chosen, message)

    def _run(self, chosen: Tensor, message: Tensor) -> Tensor:
        def at_once(rows: int) -> Tensor:
            self._at_once = rows
            return self._compute(chosen, message, rows, self._way.compiled)

        return halving(at_once, self._at_once)

    def _record(self, chosen: Tensor, message: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Records a step; what is returned runs it on other images and messages of the same shapes."""
        inputs = chosen.clone(), message.clone()
        compute = partial(self._compute, *inputs, self._at_once, self._way.compiled)
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                compute()
        torch.cuda.current_stream(self._device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = compute()

        def replay(chosen: Tensor, message: Tensor) -> Tensor:
            inputs[0].copy_(chosen)
            inputs[1].copy_(message)
            graph.replay()
            return loss

        return replay

    def _clock(self, chosen: Tensor, message: Tensor) -> None:
        """Called before every step while ways are tried."""
        if self._in_trial == WARM_UP:
            self._started = self._now()
        if self._in_trial == WARM_UP + TRIAL:
            self._tried[self._way] = (self._now() - self._started) / TRIAL
            self._next(chosen, message)
        else:
            self._in_trial += 1

    def _now(self) -> float:
        torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _next(self, chosen: Tensor, message: Tensor) -> None:
        """Goes on to the next way that is worth a trial, or for good to the fastest."""
        self._in_trial = 1
        while (way := self._wanted()) != self._way and not self._use(way, chosen, message):
            pass
        if way not in self._tried:
            return
        self._choosing = False
        times = [f"{way} {1e3 * time:.3g} ms" for way, time in self._tried.items() if time < math.inf]
        self.reason = f"gradient steps {way}: the fastest of {', '.join(times)} a step"
        failed = [str(way) for way, time in self._tried.items() if time == math.inf]
        if failed:
            self.reason += f"; failed: {', '.join(failed)}"

    def _wanted(self) -> Way:
        best = min(self._tried, key=self._tried.__getitem__)
        if self._graphs and GRAPH not in self._tried:
            return GRAPH
        compiled = Way(True, best.graphed)
        if compiled not in self._tried and self._left * self._tried[best] * COMPILE_SAVES > COMPILE_SECONDS:
            return compiled
        return best

    def _use(self, way: Way, chosen: Tensor, message: Tensor) -> bool:
        """Goes over to `way`; where that fails, for want of room for instance, to eager."""
        self._way, self._replay = way, None  # what a graph held is let go of first
        try:
            if way.graphed:
                self._replay = self._record(chosen, message)
            elif way.compiled:
                self._run(chosen, message)
        except RuntimeError:
            self._tried[way] = math.inf
            self._way = EAGER
            torch.cuda.empty_cache()
            return False
        return True
