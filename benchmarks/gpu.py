"""Everything that wants a GPU, in one command: build, tests, benchmarks, and a table of what came out.

    python benchmarks/gpu.py          # or: make gpu

Runs with this Python and its packages and installs nothing: torch, triton, timm, cryptography, hypothesis,
pytest, pytest-benchmark, pytest-xdist, pybind11, cmake and ninja must be there. Writes gpu.json and gpu.md in
build/gpu after each step. Where every step passed they become the ones in benchmarks/results; else the table
says at its top that the run is red. Exits with 1 if anything failed, with 2 if there is no GPU.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNNING = ROOT / "build" / "gpu"
SECONDS = 460
"""Together; what is left of them is the time limit of each step."""
WORKERS = 8
"""Processes that run tests side by side."""
BENCHMARKS = {
    "first call": ["test_cold_start.py", "-k", "first"],  # before anything else has warmed a cache
    "edit": ["test_edit.py"],
    "profile": ["test_magnitude.py", "-k", "gpu"],
    "kernels": ["test_kernels.py"],
    "gradient steps": ["test_steps.py", "-k", "graph"],
}
BULK = "speed --architecture timm:vit_large_patch14_clip_224 --bf16 --suspects 10 --loop 1"
COLUMNS = ("kernel", "eager", "compiled", "kernel, graph", "eager, graph", "compiled, graph")


def main() -> int:
    started = time.monotonic()
    try:
        import torch
    except ImportError as error:
        return refuse(f"{sys.executable} has no torch ({error}); name another with PYTHON=...")
    if not torch.cuda.is_available():
        return refuse(f"torch {torch.__version__} of {sys.executable} sees no CUDA device")
    record: dict[str, Any] = {"machine": machine(), "steps": {}, "tests": {}, "benchmarks": []}

    def step(name: str, *arguments: str) -> bool:
        left = SECONDS - (time.monotonic() - started)
        print(f"== {name}", flush=True)
        begun = time.monotonic()
        outcome = run(arguments, left)
        record["steps"][name] = {"outcome": outcome, "seconds": round(time.monotonic() - begun, 1)}
        write(record, RUNNING)
        return outcome == "passed"

    def benchmark(name: str) -> None:
        output = Path(folder, "benchmarks.json")
        file, *chosen = BENCHMARKS[name]
        step(
            name,
            *pytest,
            "--benchmark-only",
            f"--benchmark-json={output}",
            str(ROOT / "benchmarks" / file),
            *chosen,
        )
        if output.exists() and output.stat().st_size:
            rows = json.loads(output.read_text())["benchmarks"]
            record["benchmarks"] += [
                {"name": row["name"], "seconds": row["stats"]["median"], **row["extra_info"]} for row in rows
            ]
            write(record, RUNNING)
            output.unlink()

    with tempfile.TemporaryDirectory() as folder:
        pytest = ("-m", "pytest", "-p", "no:cacheprovider")
        if not built():
            step("build", "setup.py", "--quiet", "build_ext", "--inplace")
        benchmark("first call")
        junit = Path(folder, "tests.xml")
        parallel = ("--numprocesses", str(WORKERS), "--deselect", "tests/ops/test_kernels.py")
        step("tests", *pytest, "-m", "gpu", f"--junitxml={junit}", *parallel, *tests())
        if junit.exists():
            record["tests"] = counts(junit)
        benchmark("edit")
        benchmark("profile")
        bulk = Path(folder, "bulk.json")
        if step("bulk", "benchmarks/bulk.py", *BULK.split(), "--json", str(bulk)):
            record["bulk"] = json.loads(bulk.read_text())
            write(record, RUNNING)
        benchmark("kernels")
        benchmark("gradient steps")
    print(table(record))
    if red(record):
        return 1
    write(record, RESULTS)
    return 0


def red(record: dict[str, Any]) -> list[str]:
    """The steps that did not pass."""
    return [name for name, done in record["steps"].items() if done["outcome"] != "passed"]


def write(record: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "gpu.md").write_text(table(record))


def refuse(reason: str) -> int:
    print(f"make gpu: {reason}", file=sys.stderr)
    return 2


def run(arguments: tuple[str, ...], limit: float) -> str:
    """Runs this Python; "passed", "failed" or "out of time"."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    if limit <= 0:
        return "out of time"
    try:
        code = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, timeout=limit
        ).returncode
    except subprocess.TimeoutExpired:
        return "out of time"
    return "passed" if code == 0 else "failed"


def built() -> bool:
    """Whether the extension is there for this Python, and younger than its sources."""
    modules = list((ROOT / "activemark_fast").glob(f"_native.{sys.implementation.cache_tag}*.so"))
    sources = [*(ROOT / "csrc").iterdir(), ROOT / "CMakeLists.txt", ROOT / "setup.py"]
    return bool(modules) and modules[0].stat().st_mtime > max(path.stat().st_mtime for path in sources)


def tests() -> list[str]:
    """The files of tests that say they need a GPU: others may import what is not installed here."""
    files = [*sorted((ROOT / "tests").rglob("test_*.py")), ROOT / "tests" / "ops" / "kernel_values.py"]
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def machine() -> dict[str, Any]:
    import torch

    capability = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{capability[0]}.{capability[1]}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "driver": driver(),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def commit() -> str:
    return output("git", "-C", str(ROOT), "describe", "--always", "--dirty")


def driver() -> str:
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def output(*command: str) -> str:
    """The first line a program prints, or "-" where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "-"
    return done.stdout.strip().split("\n")[0]


def counts(junit: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and which failed."""
    cases = list(ElementTree.parse(junit).iter("testcase"))
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    about = record["machine"]
    lines = [
        "# Measured on a GPU",
        "",
        f"{about['gpu']} (compute capability {about['capability']}, driver {about['driver']}), "
        f"{about['date']}, commit {about['commit']}: Python {about['python']}, torch {about['torch']}, "
        f"CUDA {about['cuda']}, triton {about['triton']}. By `make gpu`.",
        "",
    ]
    if red(record):
        lines += [f"**A red run, no result: {', '.join(red(record))} did not pass.**", ""]
    for name, done in record["steps"].items():
        lines.append(f"- {name}: {done['outcome']} in {done['seconds']} s")
    tests = record["tests"]
    if tests:
        lines.append(
            f"- {tests['passed']} tests passed, {len(tests['failed'])} failed, {tests['skipped']} skipped"
        )
        lines += [f"  - failed: {name}" for name in tests["failed"]]
    kernels = [row for row in record["benchmarks"] if "op" in row]
    others = [row for row in record["benchmarks"] if "op" not in row]
    bulk = record.get("bulk", {})
    if kernels:
        lines += [
            "",
            "Microseconds a call (median), bfloat16, ViT-L/14: 257 tokens, width 1024, 32 bits, 64 slots.",
            "The floor is the time that the bytes a call has to move take in a large copy.",
            "",
            f"| op | images | {' | '.join(COLUMNS)} | floor | kernel / floor | eager / kernel |",
            "|---" * (len(COLUMNS) + 5) + "|",
        ]
    for row in kernels:
        medians = [row[f"{column} p50"] for column in COLUMNS]
        ratio = row["kernel, graph p50"] / row["floor"]
        gain = row["eager p50"] / row["kernel p50"]
        cells = [row["op"], row["batch"], *medians, row["floor"], f"{ratio:.2f}", f"{gain:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if others:
        lines += ["", "| benchmark | milliseconds (median) | |", "|---|---|---|"]
    for row in others:
        rest = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("name", "seconds"))
        lines.append(f"| {row['name']} | {1e3 * row['seconds']:.3f} | {rest} |")
    if bulk:
        lines += ["", f"Bulk verification, `benchmarks/bulk.py {BULK}`:", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in bulk.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
