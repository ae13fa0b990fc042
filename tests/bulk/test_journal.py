from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from activemark_fast.bulk.journal import Journal, JournalError, read_journal

SETTINGS: dict[str, object] = {"watermark": "ab" * 32, "alpha": 1e-6, "tau": None}


def record(name: str) -> dict[str, Any]:
    return {"suspect": name, "verdict": {"p_value": 0.25}, "error": None}


def written(path: Path, *names: str, resume: bool = False) -> set[str]:
    with Journal(path, SETTINGS, resume=resume) as journal:
        before = set(journal.done)
        for name in names:
            journal.append(record(name))
    return before


def test_results_come_back(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    names = ["a", "ü\n", "\udcff", '"']
    assert written(path, *names) == set()
    assert read_journal(path) == [record(name) for name in names]
    assert written(path, "more", resume=True) == set(names)
    assert [line["suspect"] for line in read_journal(path)] == [*names, "more"]
    assert json.loads(path.read_text().splitlines()[0]) == {"activemark_journal": 1, **SETTINGS}


def test_a_journal_cut_off_anywhere_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    written(path, "a", "b")
    content = path.read_bytes()
    ends = [i + 1 for i, c in enumerate(content) if c == 10]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = sum(end <= length for end in ends)
        assert written(path, resume=True) == set(["a", "b"][: max(0, whole - 1)])
        assert path.read_bytes() == content[: ends[max(0, whole - 1)]]
        assert written(path, "z", resume=True) is not None
        assert [line["suspect"] for line in read_journal(path)] == [*["a", "b"][: max(0, whole - 1)], "z"]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    written(path, "a")
    before = path.read_bytes()
    with pytest.raises(JournalError, match="exists; resume it"):
        Journal(path, SETTINGS, resume=False)
    with pytest.raises(JournalError, match="another sweep; it differs in alpha, more"):
        Journal(path, SETTINGS | {"alpha": 1e-5, "more": 1}, resume=True)
    assert path.read_bytes() == before
    for content in (
        b"a letter",
        b"a letter\nof two lines\n",
        b"{}\n",
        b'{"activemark_journal": 2}\n',
        b"[1]\n",
    ):
        path.write_bytes(content)
        for resume in (True, False):
            with pytest.raises(JournalError):
                Journal(path, SETTINGS, resume=resume)
        assert path.read_bytes() == content


def test_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    written(path, "a", "b", "c")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + b"rubbish\n" + lines[3])
    with pytest.raises(JournalError, match="line 3 is not JSON"):
        Journal(path, SETTINGS, resume=True)
    with pytest.raises(JournalError, match="line 3 is not JSON"):
        read_journal(path)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, SETTINGS, resume=True) as journal:
        journal.append(record("a"))
        with pytest.raises(JournalError, match="another process is writing"):
            Journal(path, SETTINGS, resume=True)
    assert written(path, "b", resume=True) == {"a"}


def test_each_result_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised: list[int] = []
    real = os.fsync

    def fsync(file: int) -> None:
        real(file)
        synchronised.append((tmp_path / "j.jsonl").stat().st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    with Journal(tmp_path / "j.jsonl", SETTINGS, resume=False) as journal:
        for name in "abc":
            journal.append(record(name))
            assert synchronised[-1] == (tmp_path / "j.jsonl").stat().st_size
    assert len(synchronised) == 5  # header, folder, three results
