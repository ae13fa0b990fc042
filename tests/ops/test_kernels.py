from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VALUES = Path(__file__).with_name("kernel_values.py")


def run_values(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(VALUES)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_kernels_in_the_interpreter() -> None:
    # Triton asks for the variable as it is imported.
    run_values(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    run_values(TRITON_INTERPRET="0")
