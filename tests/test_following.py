from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from activemark_fast.following import computed_on, following, kept_bytes, placed

CPU = torch.device("cpu")


def test_on_the_cpu_nothing_follows() -> None:
    module = nn.Linear(2, 2)
    with following(CPU):
        assert computed_on(CPU) == CPU
        assert placed(module, CPU) is module
        assert kept_bytes() == 0


def test_on_a_device() -> None:
    tests = Path(__file__).with_name("following_on_a_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent.parent)
    assert done.returncode in (0, 5), done.stdout  # 5: this PyTorch has no such device
