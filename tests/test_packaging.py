from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_source_distribution_holds_all_that_is_compiled_or_read(tmp_path: Path) -> None:
    for tool in ("cmake", "ninja", "pybind11"):  # setup.py wants them
        pytest.importorskip(tool)
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
    subprocess.run([*map(str, command), "sdist", "--dist-dir", str(tmp_path)], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    assert {path.rsplit(".")[-1] for path in sources} == {"cpp", "cu", "hpp"}
    assets = {str(path.relative_to(ROOT)) for path in (ROOT / "activemark_fast" / "assets").iterdir()}
    assert {path.rsplit(".")[-1] for path in assets} == {"md", "npz", "safetensors"}
    assert sources | assets | {"CMakeLists.txt", "setup.py", "constraints.txt"} <= names


def test_wheels_are_built_for_every_python_from_the_oldest_to_the_newest_that_ci_tests() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    (tested,) = re.findall(r"for version in 3\.(\d+) 3\.(\d+);", (ROOT / ".ci" / "run").read_text())
    oldest, newest = map(int, tested)
    assert re.findall(r'requires-python = ">=3\.(\d+)"', settings) == [str(oldest)]
    assert re.findall(r"cp3(\d+)-\*", settings) == [str(minor) for minor in range(oldest, newest + 1)]
