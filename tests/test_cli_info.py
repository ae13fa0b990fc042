from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny import vit

import activemark_fast
from activemark_fast.cli import main
from activemark_fast.ops import native


def test_as_a_process() -> None:
    command = [sys.executable, "-m", "activemark_fast", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    record = json.loads(done.stdout)
    assert record["versions"]["activemark_fast"] == activemark_fast.__version__
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(record["gpus"]) == torch.cuda.device_count()
    assert record["kernels"]["profile"]["cpu"] == f"C++ ({native.load_native().best_instructions().name})"
    assert record["kernels"]["inject, decode"] == {"cpu": "PyTorch", "cuda": "Triton (float64: PyTorch)"}


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"activemark_fast {activemark_fast.__version__}, python ")
    assert lines[1].startswith(f"devices: CPU ({torch.get_num_threads()} threads)")
    assert lines[3] == "inject, decode: on the CPU PyTorch; on CUDA Triton (float64: PyTorch)"


def test_what_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_native() -> None:
        raise ImportError("the compiled module cannot be loaded")

    monkeypatch.setattr(native, "load_native", load_native)
    monkeypatch.setattr("activemark_fast.cli.info.PACKAGES", ("triton", "no_such_package"))
    assert main(["info", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["versions"]["no_such_package"] == "not installed"
    assert record["kernels"]["profile"]["cpu"] == "nothing: the compiled module cannot be loaded"


def test_a_model_that_can_be_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "demo", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["markable"], record["blocks"], record["width"], record["bits"]) == (True, 12, 128, 56)
    assert record["tower"] == ""
    assert "massive activations emerge" in record["site"]
    assert record["seconds"] > 0
    assert record["peak_bytes"] > 0
    assert main(["info", "demo"]) == 0
    assert capsys.readouterr().out.startswith("can be marked: 12 blocks of width 128, 65 tokens of 32 x 32")


def test_what_stands_in_the_way(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("activemark_fast.checkpoints.load_model", lambda spec: torch.nn.Linear(3, 3))
    assert main(["info", "demo"]) == 1
    assert "cannot be marked: looked for a list of at least 3 blocks" in capsys.readouterr().out


def test_a_tower_that_there_is_not_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "demo", "--tower", "vision"]) == 2
    assert "tower: wanted one of '' (the model itself), got 'vision'" in capsys.readouterr().err


def test_a_model_too_narrow_for_any_match(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activemark_fast.checkpoints.load_model", lambda _: vit(embed_dim=32, num_heads=2))
    assert main(["info", "narrow"]) == 1
    told = "at least 16 bits, got a width of 32, which has it for 8"
    assert told in capsys.readouterr().out
