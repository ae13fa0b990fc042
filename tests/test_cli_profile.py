from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from activemark_fast.checkpoints import build_model, save_model
from activemark_fast.cli import main

ARCHITECTURE = "timm:VisionTransformer?" + json.dumps(
    {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 2, "num_classes": 0}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(build_model(ARCHITECTURE), path, ARCHITECTURE)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(3):
        Image.effect_noise((40, 32), 50 + index).convert("RGB").save(folder / f"{index}.png")
    return folder


def test_as_a_process(model: Path, images: Path, tmp_path: Path) -> None:
    picture = tmp_path / "profile.png"
    command = [sys.executable, "-m", "activemark_fast", "profile", model, "--images", images]
    done = subprocess.run(
        [*map(str, command), "--out", str(picture), "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    record = json.loads(done.stdout)
    assert record["images"] == 3
    assert len(record["blocks"]) == 6
    assert (record["rule"], record["block"], record["emergence"]) == ("paper", 2, None)
    assert record["agreement"] == 1
    assert record["reason"].startswith("block 2, the middle: the model has no massive activations")
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert min(drawn.size) > 500
    assert [path.name for path in tmp_path.iterdir()] == ["profile.png"]


def test_text_of_the_demo_model(capsys: pytest.CaptureFixture[str], images: Path) -> None:
    assert main(["profile", "demo", "--images", str(images), "--rule", "reference"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "block 5" in out
    assert "class token, channel 93 (3)" in out
    assert out.splitlines()[-1].startswith("mark: block 5, where massive activations emerge (")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "profile.jpg"], "--out: wanted a file name that ends in .png"),
        (["--out", "nowhere/profile.png"], "--out: there is no folder nowhere"),
        (["--images", "nowhere"], "images: wanted a folder"),
        (["--device", "quantum"], "device: wanted a device of this machine"),
    ],
)
def test_errors_before_any_output(
    model: Path,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", str(model), "--out", "profile.png", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"activemark: error: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_no_vit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no checkpoint")
    assert main(["profile", str(tmp_path / "model.safetensors")]) == 2
    assert capsys.readouterr().err.startswith("activemark: error: ")
