from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import Marked, save
from tiny import vit

from activemark_fast.bulk import read_journal, verify_many
from activemark_fast.key import Key

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def workers() -> list[int]:
    """Process ids of the workers that hold a model."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if b"ray::_Worker" in (folder / "cmdline").read_bytes():
                    pids.append(int(folder.name))
            except OSError:
                continue
    return pids


def test_two_workers_of_which_one_is_killed(marked: Marked, cluster: None, tmp_path: Path) -> None:
    key = tmp_path / "owner.key"
    key.write_text((b"k" * 32).hex())
    key.chmod(0o600)
    models = tmp_path / "models"
    for index in range(6):
        save(marked.model if index % 3 == 0 else vit(seed=index), models / f"{index:02}.safetensors")
    (models / "broken.pt").write_bytes(b"no weights")
    watermark, _, model, images = marked.arguments()
    alone = list(verify_many(models, watermark, Key.of(key), model, images, in_order=True))
    journal = tmp_path / "j.jsonl"
    running = verify_many(models, watermark, key, model, images, in_order=True, journal=journal, engine="ray")
    results = [next(running)]
    pids = workers()
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    results += running
    assert [r.suspect for r in results] == [r.suspect for r in alone]
    assert [line["suspect"] for line in read_journal(journal)] == [r.suspect for r in alone]
    for ours, theirs in zip(results, alone, strict=True):
        assert ours.error == theirs.error
        assert (ours.verdict is None) == (theirs.verdict is None)
        if ours.verdict is not None and theirs.verdict is not None:
            assert ours.verdict.to_dict() == theirs.verdict.to_dict()
    deadline = time.monotonic() + 60  # busy machines are slow to end processes
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers()


def test_a_key_that_a_worker_cannot_use_is_told(marked: Marked, cluster: None, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no\.key"):
        verify_many(tmp_path, marked.watermark, tmp_path / "no.key", vit(), marked.images, engine="ray")
