from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from activemark_fast.ops.magnitude import TopMagnitudes, top_magnitudes
from activemark_fast.ops.magnitude.native import load_native, top_magnitudes_native
from activemark_fast.ops.magnitude.reference import top_magnitudes_reference

INF, NAN = float("inf"), float("nan")
OTHER_DTYPES = [torch.float64, torch.float16, torch.bfloat16]


def random_activations(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got: TopMagnitudes, want: TopMagnitudes) -> None:
    torch.testing.assert_close(got._asdict(), want._asdict(), rtol=0, atol=0, equal_nan=True)


def assert_native_is_reference(x: Tensor, k: int) -> None:
    assert_same(TopMagnitudes(*top_magnitudes_native(x, k)), TopMagnitudes(*top_magnitudes_reference(x, k)))


@st.composite
def activations_and_k(draw: st.DrawFn) -> tuple[Tensor, int]:
    images, tokens, width = draw(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 150)))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, tokens, width, generator=generator)
    if draw(st.booleans()):  # coarse values: many ties
        x = x.mul(2).round().div(2)
    for value in draw(st.lists(st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1e-45, 3.4e38]), max_size=4)):
        share = draw(st.sampled_from([0.01, 0.3, 1.0]))
        x = x.masked_fill(torch.rand(x.shape, generator=generator) < share, value)
    return x, draw(st.integers(1, tokens * width))


@given(activations_and_k())
def test_native_equals_reference(case: tuple[Tensor, int]) -> None:
    assert_native_is_reference(*case)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 123, 123), (2, 1, 256), (2, 257, 64), (3, 7, 1000), (0, 4, 4)]
)
@pytest.mark.parametrize("k", [1, 5, None])
def test_shapes(shape: tuple[int, int, int], k: int | None) -> None:
    values_per_image = shape[1] * shape[2]
    assert_native_is_reference(random_activations(*shape), min(k or values_per_image, values_per_image))


@pytest.mark.parametrize("order", ["ascending", "descending", "constant"])
def test_ordered_input(order: str) -> None:
    ramp = torch.arange(1.0, 2049.0)
    x = {"ascending": ramp, "descending": ramp.flip(0), "constant": torch.ones(2048)}[order].reshape(
        1, 2, 1024
    )
    assert_native_is_reference(x, 7)


def test_known_answer() -> None:
    x = torch.tensor([[[1.0, -7.0, NAN], [3.0, -INF, 7.0]], [[0.0, -0.5, 0.25], [0.5, 0.0, 0.0]]])
    got = top_magnitudes(x, 3)
    assert got.values.tolist() == [[7.0, 7.0, 3.0], [0.5, 0.5, 0.25]]
    assert got.index.tolist() == [[1, 5, 3], [1, 3, 2]]
    assert got.nonfinite.tolist() == [2, 0]
    assert (got.values.dtype, got.index.dtype, got.nonfinite.dtype) == (
        torch.float32,
        torch.int64,
        torch.int64,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_finite_values_than_k(dtype: torch.dtype) -> None:
    got = top_magnitudes(torch.tensor([[[NAN, -2.0, INF, -INF]]], dtype=dtype), 3)
    assert got.values[0, 0] == 2.0
    assert got.values[0, 1:].isnan().all()
    assert got.index.tolist() == [[1, -1, -1]]
    assert got.nonfinite.tolist() == [3]


def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    calls: list[Tensor] = []

    def spy(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(x)
        return top_magnitudes_native(x, k)

    monkeypatch.setattr("activemark_fast.ops.magnitude.op.top_magnitudes_native", spy)
    return calls


@pytest.mark.parametrize(
    ("layout", "native"),
    [
        ("every other image", True),
        ("expanded", True),
        ("tokens cut off", True),
        ("channels cut off", False),
        ("transposed", False),
    ],
)
def test_layouts(layout: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_activations(6, 20, 30)
    x = {
        "every other image": x[1::2],
        "expanded": x[:1].expand(4, -1, -1),
        "tokens cut off": x[:, 1:],
        "channels cut off": x[:, :, 1:],
        "transposed": x.transpose(1, 2),
    }[layout]
    calls = native_calls(monkeypatch)
    assert_same(top_magnitudes(x, 9), top_magnitudes(x.contiguous(), 9))
    assert_same(top_magnitudes(x, 9), TopMagnitudes(*top_magnitudes_reference(x, 9)))
    assert sum(call is x for call in calls) == (2 if native else 0)


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_other_dtypes_rank_as_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_activations(3, 11, 13).to(dtype)
    calls = native_calls(monkeypatch)
    got = top_magnitudes(x, 143)
    assert not calls
    assert_same(got, top_magnitudes(x.float(), 143))


def test_result_carries_no_gradient() -> None:
    x = random_activations(1, 2, 3).requires_grad_()
    assert not top_magnitudes(x, 2).values.requires_grad
    assert not top_magnitudes(x.double(), 2).values.requires_grad


@pytest.mark.parametrize(
    ("x", "k", "error", "message"),
    [
        ([[[1.0]]], 1, TypeError, "x must be a torch.Tensor, got list"),
        (
            torch.ones(1, 2, 3, dtype=torch.int32),
            1,
            TypeError,
            "x must have a real floating-point dtype.*int32",
        ),
        (torch.ones(1, 2, 3, dtype=torch.complex64), 1, TypeError, "x must have a real floating-point dtype"),
        (torch.ones(2, 3), 1, ValueError, r"x must have the shape.*got \(2, 3\)"),
        (torch.ones(1, 1, 2, 3), 1, ValueError, "x must have the shape"),
        (torch.ones(1, 2, 3), 1.0, TypeError, "k must be an int, got float"),
        (torch.ones(1, 2, 3), True, TypeError, "k must be an int, got bool"),
        (torch.ones(1, 2, 3), 0, ValueError, "k must be in 1 ... tokens \\* width = 6, got 0"),
        (torch.ones(1, 2, 3), 7, ValueError, "k must be in 1 ... tokens \\* width = 6, got 7"),
        (torch.ones(1, 0, 3), 1, ValueError, "k must be in"),
    ],
)
def test_bad_arguments(x: object, k: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        top_magnitudes(x, k)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", [{"images": -1}, {"image_stride": -1}, {"k": 0}, {"k": 7}, {"values_per_image": 0}]
)
def test_binding_refuses_bad_sizes(bad: dict[str, int]) -> None:
    sizes = {"images": 1, "values_per_image": 6, "image_stride": 6, "k": 2} | bad
    with pytest.raises(ValueError, match="values_per_image"):
        load_native().top_magnitudes_f32(x=0, values=0, index=0, nonfinite=0, **sizes)


def test_missing_binary_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "activemark_fast._native", None)
    with pytest.raises(ImportError, match="pip install"):
        top_magnitudes(torch.ones(1, 2, 3), 1)


def test_import_leaves_the_binary_alone() -> None:
    code = "import sys, activemark_fast.ops.magnitude; sys.exit('activemark_fast._native' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
