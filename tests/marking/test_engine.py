from __future__ import annotations

import dataclasses
import gc
import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import vit

from activemark_fast import embed
from activemark_fast.backbone import Backbone
from activemark_fast.marking import engine as module
from activemark_fast.marking.engine import Engine, plan_engine
from activemark_fast.marking.memory import free_bytes, halving
from activemark_fast.photographs import shipped_photographs
from activemark_fast.profiling import measure

CPU = torch.device("cpu")


def planned(precision: str = "fp32", images: int = 256, fitted: int = 192, messages: int = 2) -> Engine:
    pixels = torch.empty(images, 3, 32, 32)
    backbone = Backbone(vit())
    weights = sum(weight.nbytes for weight in backbone.model.parameters())
    site = measure(backbone, torch.randn(4, 3, 32, 32)).site().site
    return plan_engine(backbone, site, precision, weights, pixels.nbytes, fitted, 64, 32, 3, 32, messages)


def test_the_plan_grows_with_what_it_has_to_hold() -> None:
    usual = planned()
    assert usual.device == CPU
    assert not usual.caches_on_host
    assert 1 <= usual.batch <= 192
    assert planned(fitted=24, images=16).batch == 8  # of three codebooks
    # One more message of 192 images: what enters a block (128 wide) and what its MLP makes (512), 17 tokens.
    batch = usual.batch
    more = planned(messages=3)
    one = 17 * 4 * (128 + 512)
    assert more.peak_bytes - usual.peak_bytes >= 192 * one
    assert planned(precision="bf16").peak_bytes < usual.peak_bytes
    assert planned(images=512).peak_bytes > usual.peak_bytes
    text = str(usual)
    assert f"{batch} images at a time" in text
    assert f"at most {usual.peak_bytes / 2**20:.0f} MiB over the model" in text


def test_a_batch_has_a_bounded_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_WORKING_SET", 3 * 17 * 512 * 4 * 10)
    assert planned().batch == 10
    monkeypatch.setattr(module, "CPU_WORKING_SET", 1)
    assert planned().batch == module.MIN_IMAGES


def test_memory_is_stated_before_and_kept_to(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        embedding = embed(vit(), b"k" * 32, torch.randn(64, 3, 32, 32), fidelity=0.9, progress=True)
    told = capsys.readouterr().err
    assert f"embed: {embedding.engine}" in told
    # The watermark, whose making follows on the marking, is not part of it.
    assert told.index("embed: ") < told.rindex("edit")


@pytest.mark.parametrize(
    ("precision", "working_set", "inplace"),
    [
        ("fp32", module.CPU_WORKING_SET, False),
        ("fp32", module.CPU_WORKING_SET, True),
        ("fp32", 1 << 40, False),
        ("bf16", 1 << 40, False),
    ],
)
def test_peak_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str, working_set: int, inplace: bool
) -> None:
    monkeypatch.setattr(module, "CPU_WORKING_SET", working_set)
    model = vit(embed_dim=256, num_heads=4, depth=8)
    shipped_photographs()  # kept for the next call, whoever makes it
    gc.collect()
    with (
        torch.profiler.profile(profile_memory=True) as profiler,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)
        embedding = embed(model, b"k" * 32, fidelity=0.9, precision=precision, inplace=inplace)
    trace = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    assert max(totals) - totals[0] == pytest.approx(embedding.engine.peak_bytes, rel=0.1)


@pytest.mark.parametrize("room", [1, 3, 5, 64])
def test_halving_until_there_is_room(room: int) -> None:
    tried: list[int] = []

    def run(batch: int) -> str:
        tried.append(batch)
        if batch > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert halving(run, 20) == "done"
    assert tried[-1] <= room
    assert tried == [20 >> index for index in range(len(tried))]


def test_halving_gives_up_at_one_and_lets_other_errors_through() -> None:
    def short_of_memory(batch: int) -> None:
        raise torch.OutOfMemoryError(f"batch {batch}")

    with pytest.raises(torch.OutOfMemoryError, match="batch 1"):
        halving(short_of_memory, 4)
    with pytest.raises(ZeroDivisionError):
        halving(lambda batch: 1 // 0, 4)


def test_free_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50

    def no_such_file(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", no_such_file)
    assert 1 << 20 < free_bytes(CPU) < 1 << 50


@pytest.mark.gpu
def test_caches_in_host_memory_give_the_same_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(64, 3, 32, 32)
    settings: dict[str, Any] = {"fidelity": 0.9, "precision": "fp32"}
    here = embed(vit().cuda(), b"k" * 32, images, **settings)
    monkeypatch.setattr(module, "GPU_RESERVE", 0.0)
    there = embed(vit().cuda(), b"k" * 32, images, **settings)
    assert there.engine.caches_on_host
    assert not here.engine.caches_on_host
    for ours, theirs in zip(here.model.parameters(), there.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_peak_memory_on_a_gpu() -> None:
    model = vit(embed_dim=384, num_heads=6, depth=8).cuda()
    embed(model, b"k" * 32, fidelity=0.9)  # libraries take their workspaces
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    embedding = embed(model, b"k" * 32, fidelity=0.9)
    used = torch.cuda.max_memory_allocated() - before
    assert used == pytest.approx(embedding.engine.peak_bytes, rel=0.1)


def test_what_is_kept_comes_back() -> None:
    kept = Engine(CPU, nullcontext, 1, False, 0, "")
    tensor = torch.randn(3)
    assert kept.fetch(kept.offload(tensor)) is tensor
    with pytest.raises(dataclasses.FrozenInstanceError):
        kept.batch = 2  # type: ignore[misc]
