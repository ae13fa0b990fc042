from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_finetune import Run
from tiny import vit
from torch import Tensor

from activemark_fast import embed
from activemark_fast.backbone import Backbone
from activemark_fast.marking import steps as module
from activemark_fast.marking.steps import EAGER, GRAPH, REGIONAL, TRIAL, WARM_UP, Steps, Way

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BOTH = Way(True, True)


class Bench(Steps):
    """Steps on a machine whose clock stands still but for what a step of each way costs."""

    def __init__(
        self, costs: dict[Way, float], steps: int, compile: str = "auto", graphs: bool = True
    ) -> None:
        self.costs, self.clock, self.ran = costs, 0.0, list[Way]()
        super().__init__(self.compute, compile, CUDA, 32, steps, graphs)

    def compute(self, chosen: Tensor, _message: Tensor, _rows: int, compiled: bool) -> Tensor:
        return self.spend(Way(compiled, False), chosen)

    def spend(self, way: Way, chosen: Tensor) -> Tensor:
        if way not in self.costs:
            raise RuntimeError("not on this machine")
        self.clock += self.costs[way]
        self.ran.append(way)
        return chosen.sum()

    def _now(self) -> float:
        return self.clock

    def _record(self, chosen: Tensor, _message: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        way = self._way
        self.spend(way, chosen)
        return lambda chosen, _message: self.spend(way, chosen)

    def train(self, steps: int) -> None:
        for step in range(steps):
            assert int(self(torch.tensor([step]), torch.zeros(1))) == step


def test_the_fastest_way_wins() -> None:
    bench = Bench({EAGER: 0.5, GRAPH: 0.2, BOTH: 0.1, REGIONAL: 0.01}, 1000)
    bench.train(1000)
    assert bench.ran[-1] == BOTH
    assert REGIONAL not in bench.ran  # a graph was faster than eager, so compiled blocks go into one
    assert bench.reason == (
        "gradient steps compiled, as a CUDA graph: the fastest of eager 500 ms, as a CUDA graph 200 ms, "
        "compiled, as a CUDA graph 100 ms a step"
    )


def test_compiling_has_to_pay() -> None:
    short = Bench({EAGER: 0.1, GRAPH: 0.2, REGIONAL: 0.01}, 1000)  # about 25 s to be saved
    short.train(1000)
    assert short.ran[-1] == EAGER
    assert REGIONAL not in short.ran
    long = Bench({EAGER: 0.1, GRAPH: 0.2, REGIONAL: 0.01}, 2000)
    long.train(2000)
    assert long.ran[-1] == REGIONAL
    slower = Bench({EAGER: 0.1, GRAPH: 0.2, REGIONAL: 0.3}, 2000)
    slower.train(2000)
    assert slower.ran[-1] == EAGER
    assert "compiled 300 ms" in slower.reason


def test_what_fails_is_told_and_left_alone() -> None:
    bench = Bench({EAGER: 0.5}, 1000)
    bench.train(1000)
    assert bench.ran == [EAGER] * 1000
    assert bench.reason.endswith("; failed: as a CUDA graph, compiled")


@given(
    st.fixed_dictionaries(
        {EAGER: st.floats(0.001, 1)},
        optional={way: st.floats(0.001, 1) for way in (GRAPH, REGIONAL, BOTH)},
    ),
    st.integers(0, 400),
    st.booleans(),
)
def test_whatever_it_tries_it_ends_with_the_fastest(
    costs: dict[Way, float], steps: int, graphs: bool
) -> None:
    bench = Bench(costs, steps, graphs=graphs)
    bench.train(steps)
    if steps > 4 * (WARM_UP + TRIAL):
        assert costs[bench.ran[-1]] <= min(costs[way] for way in bench.ran) + 1e-9
    if not graphs:
        assert not any(way.graphed for way in bench.ran)
    tried = set(bench.ran)
    assert len(bench.ran) <= steps + 2 * len(tried)


def test_what_is_asked_for_is_not_timed() -> None:
    for compile, way in (("eager", EAGER), ("regional", REGIONAL), ("graph", GRAPH)):
        bench = Bench({EAGER: 1, GRAPH: 2, REGIONAL: 3}, 50, compile)
        bench.train(50)
        assert set(bench.ran) == {way}
        assert bench.reason == f"gradient steps {way}: asked for"
        with pytest.raises(RuntimeError, match="not on this machine"):
            Bench({}, 50, compile).train(1)


def test_a_cpu_is_always_eager() -> None:
    steps = Steps(lambda chosen, *_: chosen.sum(), "auto", CPU, 32, 10_000, True)
    for _ in range(50):
        steps(torch.ones(1), torch.zeros(1))
    assert steps.reason == "gradient steps eager: compiling saves next to nothing on a CPU"


def test_half_as_many_images_where_there_is_no_room() -> None:
    tried: list[int] = []

    def compute(chosen: Tensor, _message: Tensor, rows: int, _compiled: bool) -> Tensor:
        tried.append(rows)
        if rows > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return chosen.sum()

    steps = Steps(compute, "eager", CPU, 32, 10, True)
    for _ in range(3):
        steps(torch.ones(32), torch.zeros(32))
    assert tried == [32, 16, 8, 8, 8]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without the compiler: tracing, and the backward pass, are what could go wrong."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("traced")
def test_compiled_blocks_are_the_blocks() -> None:
    backbone = Backbone(vit())
    tokens = torch.randn(3, backbone.num_tokens, backbone.width, requires_grad=True)
    results = []
    for view in (backbone, backbone.compiled()):
        out = view.run(tokens, 1, view.depth)
        weights = list(backbone.blocks[2].parameters())
        results.append((out, *torch.autograd.grad(out.square().sum(), [tokens, *weights])))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("codec", ["keyed", "learned"])
def test_a_training_with_compiled_blocks_ends_where_an_eager_one_does(codec: str) -> None:
    eager, compiled = Run(codec), Run(codec)
    eager.train(5, compile="eager")
    compiled.train(5, compile="regional")
    assert compiled.how == "gradient steps compiled: asked for"
    for ours, theirs in zip(compiled.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def embedded(**settings: Any) -> Any:
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    arguments = {"codec": "learned", "bits": 8, "max_steps": 3} | settings
    with pytest.warns(RuntimeWarning, match="did not reach its targets"):
        return embed(vit(depth=4, embed_dim=64), b"k" * 32, images, **arguments)


def test_an_embedding_tells_how_its_steps_were_run() -> None:
    assert str(embedded().engine) == "gradient steps eager: compiling saves next to nothing on a CPU"
    assert str(embedded(compile="eager").engine) == "gradient steps eager: asked for"
    edited = str(embed(vit(), b"k" * 32, fidelity=0.95).engine)
    assert "edit eager" in edited
    assert "MiB over the model" in edited


@pytest.mark.parametrize(
    ("compile", "error", "message"),
    [
        ("fast", ValueError, r"^compile: wanted one of \['auto', 'eager', 'regional', 'graph'\], got 'fast'"),
        (True, TypeError, r"^compile: wanted one of .*, got bool"),
        ("graph", ValueError, r"^compile: 'graph' needs a CUDA device, got 'cpu'"),
    ],
)
def test_bad_ways(compile: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        embed(vit(), b"k" * 32, compile=compile)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["graph", "regional", "auto"])
def test_every_way_gives_the_same_marks(compile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPILE_SECONDS", 0.0)
    model = vit().cuda()
    settings: dict[str, Any] = {
        "codec": "learned",
        "bits": 8,
        "max_steps": 100,
        "precision": "fp32",
    }
    images = torch.rand(16, 3, 32, 32)
    eager, other = (
        embed(copy.deepcopy(model), b"k" * 32, images, compile=way, **settings) for way in ("eager", compile)
    )
    assert "failed" not in other.engine.reason
    for ours, theirs in zip(other.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
