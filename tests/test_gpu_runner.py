"""The runner behind `make gpu`, as far as it goes without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_module import benchmark_module

ROOT = Path(__file__).parent.parent
RUNNER = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return benchmark_module("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_writes_nothing() -> None:
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()}
    done = subprocess.run([sys.executable, RUNNER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("make gpu: torch ")
    assert done.stderr.endswith("sees no CUDA device\n")
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()}


def test_every_gpu_test_is_found(runner: ModuleType) -> None:
    assert {"tests/ops/kernel_values.py", "tests/ops/test_magnitude.py"} <= set(runner.tests())
    for file, *_ in runner.BENCHMARKS.values():
        assert (ROOT / "benchmarks" / file).exists()


COLLECT = """
import sys
for missing in ("cryptography", "open_clip", "rfc3161_client"):
    sys.modules[missing] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-m", "gpu", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_what_wants_a_gpu_needs_few_packages(runner: ModuleType, folder: str) -> None:
    files = {
        "tests": runner.tests(),
        "benchmarks": [f"benchmarks/{f}" for f, *_ in runner.BENCHMARKS.values()],
    }
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *files[folder]], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "test_kernels.py" in done.stdout


def test_outcomes_of_a_step(runner: ModuleType) -> None:
    assert runner.run(("-c", "pass"), 60.0) == "passed"
    assert runner.run(("-c", "raise SystemExit(3)"), 60.0) == "failed"
    assert runner.run(("-c", "import time; time.sleep(60)"), 0.2) == "out of time"
    assert runner.run(("-c", "pass"), 0.0) == "out of time"


def test_tests_are_counted(runner: ModuleType, tmp_path: Path) -> None:
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert False\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    junit = tmp_path / "junit.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={junit}", tests],
        cwd=tmp_path,
        capture_output=True,
    )
    assert runner.counts(junit) == {"passed": 1, "failed": ["test_three.test_bad"], "skipped": 1}


def test_the_table(runner: ModuleType) -> None:
    machine = {name: f"<{name}>" for name in ("gpu", "capability", "date", "commit", "python")}
    machine |= {name: f"<{name}>" for name in ("torch", "cuda", "triton", "driver")}
    medians = {f"{column} p50": 2.0 * place for place, column in enumerate(runner.COLUMNS, start=1)}
    text = runner.table(
        {
            "machine": machine,
            "steps": {"build": {"outcome": "passed", "seconds": 9.0}},
            "tests": {"passed": 4, "failed": ["a.b"], "skipped": 0},
            "benchmarks": [
                {"name": "k", "seconds": 1e-6, "op": "inject_keyed", "batch": 16, "floor": 1.6, **medians},
                {"name": "test_magnitudes_on_a_gpu", "seconds": 0.0021, "GB/s": 900},
            ],
            "bulk": {"suspects a minute": 70.5},
        }
    )
    for name in machine:
        assert f"<{name}>" in text
    assert "- build: passed in 9.0 s\n" in text
    assert "4 tests passed, 1 failed, 0 skipped\n  - failed: a.b\n" in text
    row = "| inject_keyed | 16 | 2.0 | 4.0 | 6.0 | 8.0 | 10.0 | 12.0 | 1.6 | 5.00 | 2.0 |"
    assert row in text
    header = next(line for line in text.splitlines() if line.startswith("| op"))
    assert header.count("|") == row.count("|")
    assert "| test_magnitudes_on_a_gpu | 2.100 | GB/s 900 |" in text
    assert "| suspects a minute | 70.5 |" in text


@pytest.mark.parametrize("outcome", ["passed", "failed", "out of time"])
def test_a_red_run_is_red(
    runner: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    outcome: str,
) -> None:
    """Every step passes but the tests, which end with `outcome`."""
    names = ("gpu", "capability", "date", "commit", "python", "torch", "cuda", "triton", "driver")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner, "machine", lambda: dict.fromkeys(names, "-"))
    monkeypatch.setattr(runner, "built", lambda: False)
    monkeypatch.setattr(runner, "RUNNING", tmp_path / "build")
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")

    def run(arguments: tuple[str, ...], _limit: float) -> str:
        if arguments[0] == "benchmarks/bulk.py":
            Path(arguments[-1]).write_text("{}")
        return outcome if "gpu" in arguments and "--numprocesses" in arguments else "passed"

    monkeypatch.setattr(runner, "run", run)
    code = runner.main()
    table = (tmp_path / "build" / "gpu.md").read_text()
    assert table in capsys.readouterr().out
    if outcome == "passed":
        assert code == 0
        assert "red run" not in table
        assert (tmp_path / "results" / "gpu.md").read_text() == table
    else:
        assert code == 1
        assert table.split("\n")[4] == "**A red run, no result: tests did not pass.**"
        assert not (tmp_path / "results").exists()


def test_until_it_is_measured_the_table_says_so() -> None:
    results = ROOT / "benchmarks" / "results"
    measured = (results / "gpu.json").exists()
    assert ("Not yet measured on a GPU" in (results / "gpu.md").read_text()) != measured
