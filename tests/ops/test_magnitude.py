from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from activemark_fast.ops.magnitude import Magnitudes, magnitudes
from activemark_fast.ops.magnitude.native import magnitudes_cpu, max_top_cuda
from activemark_fast.ops.magnitude.reference import magnitudes_reference
from activemark_fast.ops.native import load_native

INF, NAN = float("inf"), float("nan")
COMPILED_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BEST = int(load_native().best_instructions())
INSTRUCTIONS = ["portable", "avx2", "avx512"][: BEST + 1]

Implementation = Callable[[Tensor, int], Magnitudes]


def random_activations(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wild_activations(value: float) -> Tensor:
    x = random_activations(1, 65, 256)
    x[0, ::13, 100] = value
    x[0, 7, 3] = 2.0**63
    return x


def reference(x: Tensor, k: int) -> Magnitudes:
    return Magnitudes(*magnitudes_reference(x, k))


def assert_agrees(got: Magnitudes, want: Magnitudes, dtype: torch.dtype) -> None:
    """As the contract says: what is a choice or a count agrees exactly, what is a sum up to rounding."""
    for name in ("values", "index", "nonfinite"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.mean_square, want.mean_square, rtol=1e-5, atol=1e-37, equal_nan=True)
    tolerance = 0.0 if dtype == torch.bfloat16 else 0.0025
    torch.testing.assert_close(got.median, want.median, rtol=tolerance, atol=0, equal_nan=True)


def compiled(instructions: str) -> Implementation:
    return lambda x, k: Magnitudes(*magnitudes_cpu(x, k, instructions))


@pytest.fixture(scope="module")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Implementation:
    """The CUDA kernel, its threads run in turns by the CPU."""
    compiler = shutil.which("c++")
    assert compiler, "the tests need the C++ compiler that the package was built with"
    sources = Path(__file__).with_name("cuda_on_cpu")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "magnitude.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    command = [compiler, *flags, "-I", sources, "-o", library, sources / "magnitude.cpp"]
    subprocess.run(list(map(str, command)), check=True)
    function = ctypes.CDLL(str(library)).magnitudes
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        *[ctypes.c_int64] * 4,
        *[ctypes.c_void_p] * 5,
    ]

    def run(x: Tensor, k: int, processors: int = 1) -> Magnitudes:
        images = len(x)
        out = Magnitudes(
            torch.empty(images, k),
            torch.empty(images, k, dtype=torch.int64),
            torch.empty(images),
            torch.empty(images),
            torch.empty(images, dtype=torch.int64),
        )
        status = function(
            processors,
            x.data_ptr(),
            COMPILED_DTYPES.index(x.dtype),
            images,
            x.shape[1] * x.shape[2],
            x.stride(0),
            k,
            *(tensor.data_ptr() for tensor in out),
        )
        assert status == 0
        return out

    return run


@st.composite
def activations_and_k(draw: st.DrawFn) -> tuple[Tensor, int]:
    images, tokens, width = draw(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 150)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(images, tokens, width, generator=generator)
    x = x * draw(st.sampled_from([1.0, 1e-30, 1e-3, 1e4, 1e30]))
    if draw(st.booleans()):  # coarse values: many ties
        x = x.mul(2).round().div(2)
    for value in draw(st.lists(st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1e-45, 3.4e38]), max_size=4)):
        share = draw(st.sampled_from([0.01, 0.3, 0.5, 1.0]))
        x = x.masked_fill(torch.rand(x.shape, generator=generator) < share, value)
    return x.to(draw(st.sampled_from(COMPILED_DTYPES))), draw(st.integers(1, tokens * width))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@given(case=activations_and_k())
def test_compiled_equals_reference(instructions: str, case: tuple[Tensor, int]) -> None:
    x, k = case
    assert_agrees(compiled(instructions)(x, k), reference(x, k), x.dtype)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 123, 123), (2, 1, 256), (2, 257, 64), (3, 7, 1000), (0, 4, 4)]
)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, instructions: str) -> None:
    x = random_activations(*shape).to(dtype)
    for k in {1, min(5, shape[1] * shape[2]), shape[1] * shape[2]}:
        assert_agrees(compiled(instructions)(x, k), reference(x, k), dtype)


# Where most keys are equal, or none is near the sampled ones, the median takes more than one grid to find.
HARD = {
    "ascending": lambda n: torch.arange(1.0, n + 1),
    "descending": lambda n: torch.arange(1.0, n + 1).flip(0),
    "constant": lambda n: torch.full((n,), 0.7),
    "zeros": lambda n: torch.zeros(n),
    "nearly all zeros": lambda n: (torch.arange(n) % 97 == 0) * 3.0,
    "two far values": lambda n: torch.where(torch.arange(n) % 2 == 0, 1e-20, 1e4),
    "a cluster in a desert": lambda n: torch.where(
        torch.arange(n) < n // 2 + 9, 1e-8, 1 + torch.arange(n) / n
    ),
    "all scales": lambda n: torch.logspace(-30, 4, n),
    "not finite but for one": lambda n: torch.where(torch.arange(n) == n // 3, 2.5, INF),
    "nothing finite": lambda n: torch.full((n,), NAN),
}


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_input(name: str, dtype: torch.dtype, instructions: str) -> None:
    x = HARD[name](40 * 250).to(torch.float32).reshape(1, 40, 250).to(dtype)
    assert_agrees(compiled(instructions)(x, 7), reference(x, 7), dtype)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("value", [2.0**62, INF, NAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_blocks_are_wild(dtype: torch.dtype, value: float, instructions: str) -> None:
    x = wild_activations(value).to(dtype)
    for k in (1, 3, 9):
        assert_agrees(compiled(instructions)(x, k), reference(x, k), dtype)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
def test_every_16_bit_value_has_its_key(dtype: torch.dtype) -> None:
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = everything.view(torch.float16 if dtype == torch.float32 else dtype).to(dtype).reshape(1, 256, 256)
    assert_agrees(magnitudes(x, 2**16), reference(x, 2**16), dtype)


def test_threads_change_nothing() -> None:
    x = random_activations(7, 257, 256)
    one = magnitudes_cpu(x, 5)
    try:
        torch.set_num_threads(3)
        several = magnitudes_cpu(x, 5)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(one, several, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize(
    ("shape", "k", "processors"),
    [
        ((1, 1, 1), 1, 1),
        ((3, 5, 7), 35, 1),
        ((2, 63, 129), 5, 1),
        ((2, 100, 333), 8, 2),
        ((3, 40, 1024), 9, 8),
        ((1, 257, 256), 32, 4),
    ],
)
def test_cuda_kernel_equals_reference(
    cuda_on_cpu: Implementation, shape: tuple[int, int, int], k: int, processors: int, dtype: torch.dtype
) -> None:
    k = min(k, 32)
    x = random_activations(*shape).to(dtype)
    assert_agrees(cuda_on_cpu(x, k, processors), reference(x, k), dtype)  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_cuda_kernel_on_hard_input(cuda_on_cpu: Implementation, name: str, dtype: torch.dtype) -> None:
    x = HARD[name](80 * 251).to(torch.float32).reshape(1, 80, 251).to(dtype)
    assert_agrees(cuda_on_cpu(x, 7), reference(x, 7), dtype)


@pytest.mark.parametrize("value", [2.0**62, INF, NAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_kernel_on_a_few_wild_values(
    cuda_on_cpu: Implementation, dtype: torch.dtype, value: float
) -> None:
    x = wild_activations(value).to(dtype)
    for k in (1, 3, 9):
        assert_agrees(cuda_on_cpu(x, k), reference(x, k), dtype)


def test_cuda_kernel_reads_unaligned_images(cuda_on_cpu: Implementation) -> None:
    x = random_activations(3, 41, 251).to(torch.bfloat16)[:, 1:]
    assert x[1].data_ptr() % 16 != 0
    assert_agrees(cuda_on_cpu(x, 5), reference(x, 5), x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 123, 123), (64, 257, 1024), (2, 577, 1664), (0, 4, 4)])
def test_cuda_device_equals_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = random_activations(*shape).to(dtype)
    k = min(5, shape[1] * shape[2])
    first = magnitudes(x.cuda(), k)
    assert_agrees(Magnitudes(*(tensor.cpu() for tensor in first)), reference(x, k), dtype)
    for again in (magnitudes(x.cuda(), k) for _ in range(5)):
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", COMPILED_DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_cuda_device_on_hard_input(name: str, dtype: torch.dtype) -> None:
    x = HARD[name](80 * 251).to(torch.float32).reshape(1, 80, 251).to(dtype)
    got = Magnitudes(*(tensor.cpu() for tensor in magnitudes(x.cuda(), 7)))
    assert_agrees(got, reference(x, 7), dtype)


def test_known_answer() -> None:
    x = torch.tensor([[[1.0, -7.0, NAN], [3.0, -INF, 7.0]], [[0.0, -0.5, 0.25], [0.5, 0.0, 0.0]]])
    got = magnitudes(x, 3)
    assert got.values.tolist() == [[7.0, 7.0, 3.0], [0.5, 0.5, 0.25]]
    assert got.index.tolist() == [[1, 5, 3], [1, 3, 2]]
    assert got.median.tolist() == pytest.approx([3.0, 0.0], rel=0.0025)
    assert got.mean_square.tolist() == [27.0, 0.09375]
    assert got.nonfinite.tolist() == [2, 0]
    assert [tensor.dtype for tensor in got] == [
        torch.float32,
        torch.int64,
        torch.float32,
        torch.float32,
        torch.int64,
    ]


@pytest.mark.parametrize("dtype", [*COMPILED_DTYPES, torch.float64])
def test_fewer_finite_values_than_k(dtype: torch.dtype) -> None:
    got = magnitudes(torch.tensor([[[NAN, -2.0, INF, -INF]]], dtype=dtype), 3)
    assert got.values[0, 0] == 2.0
    assert got.values[0, 1:].isnan().all()
    assert got.index.tolist() == [[1, -1, -1]]
    assert got.median.tolist() == pytest.approx([2.0], rel=0.0025)
    assert got.mean_square.tolist() == [4.0]
    assert got.nonfinite.tolist() == [3]


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that reach the compiled kernel."""
    calls: list[Tensor] = []

    def spy(x: Tensor, k: int) -> tuple[Tensor, ...]:
        calls.append(x)
        return magnitudes_cpu(x, k)

    monkeypatch.setattr("activemark_fast.ops.magnitude.registration.magnitudes_cpu", spy)
    return calls


@pytest.mark.parametrize(
    ("layout", "as_it_is"),
    [
        ("every other image", True),
        ("expanded", True),
        ("tokens cut off", True),
        ("channels cut off", False),
        ("transposed", False),
    ],
)
def test_layouts(layout: str, as_it_is: bool, compiled_calls: list[Tensor]) -> None:
    x = random_activations(6, 20, 30)
    x = {
        "every other image": x[1::2],
        "expanded": x[:1].expand(4, -1, -1),
        "tokens cut off": x[:, 1:],
        "channels cut off": x[:, :, 1:],
        "transposed": x.transpose(1, 2),
    }[layout]
    assert_agrees(magnitudes(x, 9), reference(x, 9), x.dtype)
    same = [(call.data_ptr(), call.stride()) == (x.data_ptr(), x.stride()) for call in compiled_calls]
    assert same == ([True] if as_it_is else [])


def test_float64_is_ranked_as_float32(compiled_calls: list[Tensor]) -> None:
    x = random_activations(3, 11, 13).double()
    got = magnitudes(x, 143)
    assert not compiled_calls
    assert_agrees(got, magnitudes(x.float(), 143), x.dtype)


def test_registration() -> None:
    x = random_activations(2, 3, 5)
    magnitudes(x, 2)  # registers the operator
    for activations in (x, x.double(), x.half()):
        torch.library.opcheck(torch.ops.activemark_fast.magnitudes.default, (activations, 4))
    compiled = torch.compile(lambda x: magnitudes(x, 4).values, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), magnitudes(x, 4).values)


def test_every_build_knows_how_many_cuda_keeps() -> None:
    assert max_top_cuda() > 0


def test_result_carries_no_gradient() -> None:
    x = random_activations(1, 2, 3).requires_grad_()
    assert not magnitudes(x, 2).values.requires_grad
    assert not magnitudes(x.double(), 2).mean_square.requires_grad


@pytest.mark.parametrize(
    ("x", "k", "error", "message"),
    [
        ([[[1.0]]], 1, TypeError, "x: wanted a torch.Tensor, got list"),
        (
            torch.ones(1, 2, 3, dtype=torch.int32),
            1,
            TypeError,
            "x: wanted a real floating-point dtype.*int32",
        ),
        (torch.ones(1, 2, 3, dtype=torch.complex64), 1, TypeError, "x: wanted a real floating-point dtype"),
        (torch.ones(2, 3), 1, ValueError, r"x: wanted the shape.*got \(2, 3\)"),
        (torch.ones(1, 1, 2, 3), 1, ValueError, "x: wanted the shape"),
        (torch.ones(1, 2, 3), 1.0, TypeError, "k: wanted int, got float"),
        (torch.ones(1, 2, 3), True, TypeError, "k: wanted int, got bool"),
        (torch.ones(1, 2, 3), 0, ValueError, "k: wanted 1 ... tokens \\* width = 6, got 0"),
        (torch.ones(1, 2, 3), 7, ValueError, "k: wanted 1 ... tokens \\* width = 6, got 7"),
        (torch.ones(1, 0, 3), 1, ValueError, "k: wanted 1"),
    ],
)
def test_bad_arguments(x: object, k: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        magnitudes(x, k)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {"images": -1},
        {"image_stride": -1},
        {"k": 0},
        {"k": 7},
        {"values_per_image": 0},
        {"threads": 0},
    ],
)
def test_binding_refuses_bad_sizes(bad: dict[str, int]) -> None:
    native = load_native()
    sizes = {"images": 1, "values_per_image": 6, "image_stride": 6, "k": 2, "threads": 1} | bad
    addresses = dict.fromkeys(("x", "values", "index", "median", "mean_square", "nonfinite", "scratch"), 0)
    with pytest.raises(ValueError, match="values_per_image"):
        native.magnitudes_cpu(
            dtype=native.Dtype.float32, instructions=native.Instructions.portable, **addresses, **sizes
        )


@pytest.mark.skipif(BEST == 2, reason="this processor has all instructions there are")
def test_binding_refuses_missing_instructions() -> None:
    with pytest.raises(RuntimeError, match="lacks the instructions"):
        magnitudes_cpu(torch.ones(1, 2, 3), 1, "avx512")


def test_missing_binary_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "activemark_fast._native", None)
    with pytest.raises(ImportError, match="pip install"):
        magnitudes(torch.ones(1, 2, 3), 1)


def test_import_leaves_the_binary_alone() -> None:
    code = "import sys, activemark_fast.ops.magnitude; sys.exit('activemark_fast._native' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
