"""The check of benchmarks/history.py names the commit that made work dearer."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_module import benchmark_module


@pytest.fixture(scope="module")
def history() -> ModuleType:
    return benchmark_module("history")


def write(folder: Path, number: int, ratios: dict[str, float]) -> None:
    content = {"commit": f"c{number}", "number": number, "date": "2026-11-28", "ratios": ratios}
    (folder / f"{number:05d}-c{number}.json").write_text(json.dumps(content))


def test_the_commit_that_costs_more_is_named(
    history: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "FOLDER", tmp_path)
    write(tmp_path, 12, {"embed": 1.2, "verify": 0.5, "profile": 2.0})
    write(tmp_path, 9, {"embed": 1.0})
    write(tmp_path, 13, {"embed": 1.3, "verify": 0.56, "profile": 1.0})
    told = history.dearer(history.history())
    assert told == [
        "c12 (or one since c9): embed costs 1.20 times what it did, 1.2 after 1",
        "c13 (or one since c12): verify costs 1.12 times what it did, 0.56 after 0.5",
    ]


def test_the_plot_shows_every_commit(history: ModuleType) -> None:
    commits = [
        {"commit": f"abcdef{i}", "date": "2026-11-28", "ratios": {"embed": 1.0 + i, "verify": 0.5}}
        for i in range(3)
    ]
    (axes,) = history.draw(commits).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        f"2026-11-28\nabcdef{i}" for i in range(3)
    ]
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 2, 3], [0.5] * 3]


def test_what_is_recorded_is_in_order_and_complete(history: ModuleType) -> None:
    recorded = history.history()
    assert recorded
    for commit, path in zip(recorded, sorted(history.FOLDER.iterdir()), strict=True):
        assert path.name == f"{commit['number']:05d}-{commit['commit']}.json"
        assert all(ratio > 0 for ratio in commit["ratios"].values())
