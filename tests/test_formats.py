"""docs/formats.md names every field that is written."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from activemark_fast.bulk.journal import FORMAT_VERSION as JOURNAL_VERSION
from activemark_fast.bulk.result import SuspectResult
from activemark_fast.checkpoints.fit import Fit
from activemark_fast.codec.codebooks import SiteMeasure
from activemark_fast.commitment import COMMITMENT_VERSION, Commitment
from activemark_fast.key import Key
from activemark_fast.site import Site
from activemark_fast.tracing import Register, register
from activemark_fast.tracing.register import Change
from activemark_fast.verdict import Verdict
from activemark_fast.watermark import FORMAT_VERSION as WATERMARK_VERSION
from activemark_fast.watermark import Watermark

KEY = Key(b"f" * 32)
FOLDER = Path(__file__).parent
PAGE = (FOLDER.parent / "docs" / "formats.md").read_text()


def section(title: str, version: int) -> str:
    """The part of the page under a heading, which says the version."""
    _, _, rest = PAGE.partition(f"## {title}, format {version}\n")
    assert rest, f"no section on {title} of format {version}"
    return rest.partition("\n## ")[0]


def check_names(text: str, names: set[str]) -> None:
    assert not [name for name in sorted(names) if f"`{name}`" not in text]


def test_the_watermark() -> None:
    text = section("Watermark", WATERMARK_VERSION)
    written = {field.name for field in fields(Watermark)} - {"state"}
    check_names(text, written | {field.name for field in fields(Site)} - {"taps"} | {"checksum"})


def test_the_commitment() -> None:
    commitment = Commitment.load(FOLDER / "fixtures" / "commitment_v1.json")
    check_names(section("Commitment", COMMITMENT_VERSION), set(commitment._record()) | {"signature"})


def test_the_register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Any] = {}

    def record(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
        written.update(tensors, **json.loads(metadata["activemark_register"]))
        return b""

    monkeypatch.setattr(register, "save", record)
    change = Change(0, torch.zeros(8, 3), torch.zeros(8, 2))
    model, measured = nn.Linear(2, 3), SiteMeasure(torch.eye(2), 1.0)
    made = Register.make(KEY, ["ada"], model, {"weight": change}, measured, torch.zeros(1, 1, 8))
    made.save(tmp_path / "register", KEY)
    names = {name.replace("/weight", "/NAME") for name in written}
    check_names(section("Register", register.REGISTER_VERSION), names)


def test_the_journal() -> None:
    text = section("Journal", JOURNAL_VERSION)
    verdict = Verdict("no match", "", np.zeros(0), 32, 5, float("nan"), None, 1e-6, "keyed")
    check_names(text, set(SuspectResult("x").to_dict()) | set(Fit().to_dict()) | set(verdict.to_dict()))
