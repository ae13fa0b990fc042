from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import activemark_fast

PACKAGE = Path(activemark_fast.__file__).parent
NAME = "activemark_fast"

LAYERS: list[set[str]] = [
    {"ops"},
    {"defaults", "key", "runtime", "progress", "files", "photographs", "dress", "ranks", "following"},
    {"normalisation"},
    {"synthetic"},
    {"triggers", "datasets"},
    {"towers"},
    {"backbone"},
    {"site", "utility", "freedoms"},
    {"checkpoints"},
    {"block_choice"},
    {"profiling"},
    {"codec"},
    {"watermark"},
    {"tracing"},
    {"commitment"},
    {"p_value", "verdict", "sequential"},
    {"marking"},
    {"align"},
    {"decision"},
    {"looks", "band_reading"},
    {"verifier"},
    {"embedding", "verification", "attacks", "forge", "outlook"},
    {"bulk", "evaluation", "evaluate", "descent", "giants"},
    {"report", "baselines"},
    {"demo", "cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# The package's own __init__ gathers the public names from everywhere.
PUBLIC = "__init__"
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The layer's name: the module, or the folder it is in."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all modules a file imports, at its top or within its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == NAME:
                yield from (f"{NAME}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def ours(path: Path) -> set[str]:
    """The parts of the package that a file imports, `from activemark_fast import __version__` left out."""
    names = (name.split(".") for name in imported(path))
    public = set(activemark_fast.__all__) | {"__version__"}
    return {
        parts[1]
        for parts in names
        if parts[0] == NAME and len(parts) > 1 and parts[1] not in public - LEVEL.keys()
    }


def test_every_module_has_a_layer() -> None:
    assert {part_of(path) for path in MODULES} <= LEVEL.keys() | {PUBLIC}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = part_of(path)
    if part == PUBLIC:
        return
    for other in ours(path) - {part}:
        assert LEVEL[other] <= LEVEL[part], f"{part} imports {other}, which lies above it"


def test_nothing_imports_itself_in_a_circle() -> None:
    below = {part: set[str]() for part in LEVEL}
    for path in MODULES:
        if part_of(path) != PUBLIC:
            below[part_of(path)] |= ours(path) - {part_of(path)}
    while below:
        free = {part for part, others in below.items() if not others & below.keys()}
        assert free, f"a circle among {sorted(below)}"
        below = {part: others for part, others in below.items() if part not in free}


@pytest.mark.parametrize(
    "folder", sorted(p.parent for p in (PACKAGE / "ops").glob("*/op.py")), ids=lambda p: p.name
)
def test_within_an_op_the_reference_and_the_kernel_know_nothing_of_each_other(folder: Path) -> None:
    for path in folder.glob("*.py"):
        inside = {
            name.split(".")[-1] for name in imported(path) if name.startswith(f"{NAME}.ops.{folder.name}.")
        }
        allowed = {
            "__init__": {"op"},
            "op": {"reference", "registration"},
            "registration": {"reference", "kernel", "native"},
        }.get(path.stem, set())
        assert inside <= allowed, path


SCRIPT = """
import sys
import torch
before = set(sys.modules)
from activemark_fast import *
added = set(sys.modules) - before
for name in sorted(added):
    print(name)
print("CUDA", torch.cuda.is_initialized())
"""


@pytest.fixture(scope="module")
def added_by_the_import() -> list[str]:
    """What all public names of the package add to a process that has imported torch."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")


def test_the_import_is_light(added_by_the_import: list[str]) -> None:
    # torch's own imports are not counted: some releases import triton with it.
    heavy = {"triton", "open_clip", "timm", "transformers", "torchvision", "matplotlib", "scipy"}
    assert not heavy & {name.split(".")[0] for name in added_by_the_import}
    assert f"{NAME}._native" not in added_by_the_import
    assert not [name for name in added_by_the_import if name.startswith(NAME) and name.endswith(".kernel")]
    assert not [name for name in added_by_the_import if name.startswith((f"{NAME}.report", f"{NAME}.cli"))]
    assert f"{NAME}.embedding" in added_by_the_import


def test_the_import_leaves_the_gpu_alone(added_by_the_import: list[str]) -> None:
    assert "CUDA False" in added_by_the_import


def test_help_needs_no_torch() -> None:
    script = "import sys; from activemark_fast.cli import main\ntry: main(['embed', '--help'])\nfinally: "
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_public_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = activemark_fast.nothing
    assert set(activemark_fast.__all__) <= set(dir(activemark_fast))
    for name in activemark_fast.__all__:
        assert getattr(activemark_fast, name) is not None
    assert callable(activemark_fast.embed)
    assert callable(activemark_fast.verify)
