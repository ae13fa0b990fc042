"""Compiles every kernel in every configuration for every target, as it needs no GPU to do so.

`python -m pytest -s tests/ops/test_compiled_kernels.py` prints each one's registers and shared memory.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import activemark_fast.ops.decode.kernel as decode
import activemark_fast.ops.inject.kernel as inject
import activemark_fast.ops.kernels as shared
from activemark_fast.ops.common import KERNEL_DTYPES
from tests.ops.streams import Arguments, Sizes

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes a program may have on A100, H100 and B200: cudaDevAttrMaxSharedMemoryPerBlockOptin."""
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

FEW = Sizes(1, 257, 1024, 32, 1024, tuple(range(1, 65)), 5)
MANY = Sizes(128, 257, 1024, 256, 1024, tuple(range(1, 65)), 5)


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher wants it launched."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def source(self) -> ASTSource:
        """What triton.jit would compile for these arguments on their first use."""
        signature, constants, attributes = {}, {}, {}
        for place, (name, value) in enumerate(self.arguments.items()):
            if name.isupper() or (isinstance(value, int) and value == 1):
                signature[name], constants[(place,)] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)

    def __str__(self) -> str:
        dtypes = "/".join(TYPES[v.dtype][1:] for v in self.arguments.values() if isinstance(v, Tensor))
        blocks = " ".join(f"{name}={v}" for name, v in self.arguments.items() if name.isupper())
        options = " ".join(f"{name}={v}" for name, v in self.options.items())
        return f"{self.kernel.fn.__name__} {dtypes} {blocks} {options}"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the launchers launch, for every dtype and every configuration they choose between."""
    made: dict[str, Launch] = {}

    def record(kernel: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
            given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
            launch = Launch(kernel, {name: given[name] for name in kernel.arg_names}, options)
            made.setdefault(str(launch), launch)

        class Grid:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return run

        return Grid()

    for module in (shared, inject, decode):
        monkeypatch.setattr(module, "wrap_triton", record)
    for dtype in KERNEL_DTYPES:
        launch_all(FEW, dtype, "token")
    launch_all(MANY, torch.float32, "channel")
    return list(made.values())


def launch_all(sizes: Sizes, dtype: torch.dtype, axis: str) -> None:
    given = Arguments(sizes, dtype, "meta")
    stream, dim = given.stream(), 1 if axis == "token" else 2
    keyed = (given.directions, given.scale)
    inject.inject_keyed(stream, *keyed, given.words, given.slots)
    inject.inject_keyed_inplace(stream, *keyed, given.words, given.slots)
    inject.inject_learned(stream, stream, given.words, given.encoder(axis), sizes.index, dim)
    decode.decode_keyed(given.stream(2), *keyed, given.slots, given.words, 1.5)
    grad = torch.empty(sizes.images, sizes.bits, device="meta")
    decode.decode_keyed_backward(grad, *keyed, given.slots, sizes.tokens, dtype)
    decode.decode_learned(stream.select(dim, sizes.index), given.decoder(axis), given.words, 1.5)


def test_every_kernel_is_launched(launches: list[Launch]) -> None:
    written = {
        name
        for module in (shared, inject, decode)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }
    assert {launch.kernel.fn.__name__ for launch in launches} == written


def test_no_argument_is_one_of_the_launchers(launches: list[Launch]) -> None:
    # torch.compile writes launchers of these arguments and one more.
    assert not [launch.kernel for launch in launches if "stream" in launch.arguments]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiled(launches: list[Launch], capability: int, tmp_path: Path) -> None:
    failures = []
    print(f"\n{'registers':>9} {'shared':>7}  sm_{capability}")
    for launch in launches:
        compiled = triton.compile(
            launch.source(), target=GPUTarget("cuda", capability, 32), options=launch.options
        )
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        # The entry of the kernel, not of a function that it calls.
        used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        shared_bytes = compiled.metadata.shared
        print(f"{used['REG']:9} {shared_bytes:7}  {launch}")
        if used["STACK"] or used["LOCAL"]:
            failures.append(f"{launch}: spills {used}")
        if shared_bytes > SHARED_MEMORY[capability]:
            failures.append(f"{launch}: {shared_bytes} bytes of shared memory")
        products = compiled.asm["ttir"].count("tt.dot ")
        # What is left to ordinary arithmetic keeps its layout of ordinary values.
        left = re.findall(r"tt\.dot .*#blocked\d*>$", compiled.asm["ttgir"], flags=re.MULTILINE)
        if products and (left or not TENSOR_CORE.search(compiled.asm["ptx"])):
            failures.append(f"{launch}: a matrix product without tensor cores")
    assert not failures, "\n".join(failures)
