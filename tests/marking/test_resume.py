from __future__ import annotations

import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import vit

from activemark_fast import Embedding, embed
from activemark_fast.key import Key
from activemark_fast.marking import resume
from activemark_fast.marking.resume import TrainingFile, TrainingState
from activemark_fast.watermark import fingerprint

KEY = b"k" * 32
STEPS = 60
SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from activemark_fast.marking import resume
from test_resume import trained
resume.SAVE_EVERY = 0
trained({path!r}, **{settings!r})
"""


def images() -> torch.Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(checkpoint: str | Path | None = None, key: bytes = KEY, **settings: Any) -> Embedding:
    """A training that does not reach its targets, so takes all its steps."""
    arguments: dict[str, Any] = {"codec": "learned", "max_steps": STEPS} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return embed(vit(depth=3, embed_dim=64), key, images(), bits=16, checkpoint=checkpoint, **arguments)


def test_a_killed_embedding_goes_on_to_the_same_result(tmp_path: Path) -> None:
    whole = trained()
    path = tmp_path / "state.safetensors"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = SCRIPT.format(paths=paths, path=str(path), settings={"codec": "learned", "max_steps": STEPS})
    process = subprocess.Popen([sys.executable, "-c", script], env=None)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert path.exists()
    assert KEY.hex().encode() not in path.read_bytes()
    assert KEY not in path.read_bytes()

    resumed = trained(path)
    assert fingerprint(resumed.model) == fingerprint(whole.model)
    assert resumed.watermark.mac == whole.watermark.mac
    assert (resumed.steps, resumed.history, resumed.quality) == (whole.steps, whole.history, whole.quality)
    assert not path.exists()


def test_an_embedding_that_is_not_interrupted_leaves_nothing(tmp_path: Path) -> None:
    trained(tmp_path / "state", max_steps=1)
    trained(str(tmp_path / "state"), max_steps=0)
    assert list(tmp_path.iterdir()) == []


def test_files_it_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "no such folder" / "state"):
        with pytest.raises(ValueError, match=r"^checkpoint: wanted a file in a folder to write to"):
            trained(path)
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda *_: False)
        with pytest.raises(ValueError, match=r"^checkpoint: wanted a file in a folder to write to"):
            trained(tmp_path / "state")
    junk = tmp_path / "junk"
    for content in (b"", b"junk", bytes(8) + b"{}", (2).to_bytes(8, "little") + b"{}"):
        junk.write_bytes(content)
        with pytest.raises(ValueError, match=r"^checkpoint: .* is no state of an embedding, or damaged"):
            trained(junk)
    path = tmp_path / "state"
    TrainingFile(path, Key(KEY), {"model": "another"}).save(TrainingState(1, {}, []))
    before = path.read_bytes()
    for key in (KEY, b"o" * 32):
        with pytest.raises(ValueError, match=r"^checkpoint: wanted the state .* got another's"):
            trained(path, key)
    assert path.read_bytes() == before
    with pytest.raises(TypeError, match=r"^checkpoint: wanted a path, got int"):
        trained(3)  # type: ignore[arg-type]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    file = TrainingFile(tmp_path / "state", Key(KEY), {"bits": 32})
    assert file.load() is None
    assert not file.due()
    tensors = {"a": torch.randn(3, 2).t(), "b": torch.tensor(3.0), "c": torch.zeros(0, dtype=torch.bfloat16)}
    file.save(TrainingState(25, tensors, [{"stage": "polish", "loss": 0.1, "margin": float("nan")}]))
    state = TrainingFile(tmp_path / "state", Key(KEY), {"bits": 32}).load()
    assert state is not None
    assert state.step == 25
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in tensors.items())
    assert state.history[0]["loss"] == 0.1
    file.remove()
    file.remove()
    assert resume.SAVE_EVERY > 1
