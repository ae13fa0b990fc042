"""What torch.compile makes of the ops on CUDA tensors: traced with tensors without data, so without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from functorch.compile import aot_function
from torch import Tensor, fx
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from activemark_fast.ops.common import Perceptron
from activemark_fast.ops.decode import decode_keyed, decode_learned
from activemark_fast.ops.inject import inject_keyed, inject_keyed_, inject_learned
from tests.ops.streams import Arguments, Sizes

SIZES = Sizes(3, 7, 20, 40, 11, (1, 4, 6), 2)


class Driver:
    """All that PyTorch asks of Triton's driver to see what a kernel reads and writes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


@pytest.fixture
def cuda() -> Iterator[Callable[[Tensor], Tensor]]:
    """Takes a tensor to CUDA, without its data."""
    with FakeTensorMode(), torch.no_grad():
        yield lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def traced(function: Callable[..., Any], *arguments: Any) -> tuple[list[tuple[str, set[str]]], set[str]]:
    """Launches in the compiled graph, each a kernel's name and what it writes; and the other operators."""
    launches, others = [], set()

    def inspect(graph: fx.GraphModule, _example: Any) -> fx.GraphModule:
        for node in graph.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
                kernel = triton_kernel_wrap.kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                launches.append((kernel.fn.__name__, set(node.kwargs["tensors_to_clone"])))
            else:
                others.add(str(node.target))
        return graph

    aot_function(function, fw_compiler=inspect)(*arguments)
    return launches, others


FREE = {"<built-in function getitem>", "aten.empty.memory_format", "aten.select.int"}
"""What launches nothing."""
DECODED = {"logits_out", "words_out", "errors_out", "loss_out", "loss_grad_out"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keyed(cuda: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    given = Arguments(SIZES, dtype)
    directions, scale, words, slots = map(cuda, (given.directions, given.scale, given.words, given.slots))
    stream, tapped, grad = cuda(given.stream()), cuda(given.stream(2)), cuda(torch.zeros(3, 40))
    launches, others = traced(lambda x: inject_keyed(x, directions, scale, words, slots), stream)
    assert launches == [("inject_keyed_kernel", {"out"})]
    assert others <= FREE
    launches, _ = traced(lambda x: inject_keyed_(x, directions, scale, words, slots).clone(), stream)
    assert launches == [("inject_keyed_inplace_kernel", {"stream"})]
    launches, others = traced(lambda x: decode_keyed(x, directions, scale, slots, words), tapped)
    assert launches == [
        ("decode_keyed_partial_kernel", {"partials"}),
        ("decode_keyed_reduce_kernel", DECODED),
    ]
    assert others <= FREE
    backward = torch.ops.activemark_fast.decode_keyed_backward
    launches, others = traced(lambda g: backward(g, directions, scale, slots, 7, dtype), grad)
    assert launches == [("decode_keyed_backward_kernel", {"out"})]
    assert others <= FREE


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_learned(cuda: Callable[[Tensor], Tensor], axis: str) -> None:
    given = Arguments(SIZES, torch.bfloat16)
    stream, words = cuda(given.stream()), cuda(given.words)
    encoder, decoder = (
        Perceptron(*map(cuda, layers)) for layers in (given.encoder(axis), given.decoder(axis))
    )
    launches, others = traced(lambda x: inject_learned(x, x, words, encoder, 2, axis), stream)
    assert launches == [("first_layer_kernel", {"hidden"}), ("encode_kernel", {"out"})]
    assert others <= FREE
    launches, others = traced(lambda x: decode_learned(x, decoder, 2, axis, words), stream)
    assert launches == [("first_layer_kernel", {"hidden"}), ("decode_learned_kernel", DECODED)]
    assert others <= FREE


def test_float64_runs_in_pytorch(cuda: Callable[[Tensor], Tensor]) -> None:
    given = Arguments(SIZES, torch.float64)
    directions, scale, words, slots = map(cuda, (given.directions, given.scale, given.words, given.slots))
    launches, _ = traced(lambda x: inject_keyed(x, directions, scale, words, slots), cuda(given.stream()))
    assert launches == []
