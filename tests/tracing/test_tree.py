from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from activemark_fast import Key
from activemark_fast.codec.codebooks import SiteMeasure
from activemark_fast.commitment import Commitment, Opening
from activemark_fast.tracing import ProofError, RecipientProof, Register, RegisterError, recipients_root

KEY = Key(b"tests of lists of recipients")


def register(count: int) -> Register:
    measured = SiteMeasure(torch.eye(2, dtype=torch.float64), 1.0)
    names = [f"recipient {i}" for i in range(count)]
    return Register.make(KEY, names, nn.Linear(1, 1), {}, measured, torch.zeros(1, 1, 1, dtype=torch.float64))


@given(st.integers(1, 40), st.data())
def test_every_recipient_can_be_opened_alone(count: int, data: st.DataObject) -> None:
    made = register(count)
    name = data.draw(st.sampled_from(made.names))
    proof = RecipientProof.of(made, KEY, name)
    assert proof.root() == recipients_root(made, KEY)
    assert len(proof.path) <= (count - 1).bit_length()


@given(st.integers(2, 40), st.data())
def test_no_other_name_and_no_other_place_is_opened(count: int, data: st.DataObject) -> None:
    made = register(count)
    proof = RecipientProof.of(made, KEY, data.draw(st.sampled_from(made.names)))
    part = data.draw(st.integers(0, len(proof.path) - 1))
    for forged in (
        replace(proof, name="somebody else"),
        replace(proof, salt=bytes(32)),
        replace(proof, path=(*proof.path[:part], bytes(32), *proof.path[part + 1 :])),
        replace(proof, path=proof.path[:-1]),
        replace(proof, path=(*proof.path, bytes(32))),
    ):
        with contextlib.suppress(ProofError):
            assert forged.root() != recipients_root(made, KEY)


def test_the_commitment_holds_the_list_and_nothing_else(tmp_path: Path) -> None:
    made = register(5)
    root = recipients_root(made, KEY)
    commitment = Commitment.make(KEY, [], recipients=[root])
    commitment.save(tmp_path / "commitment.json")
    published = (tmp_path / "commitment.json").read_bytes()
    loaded = Commitment.load(tmp_path / "commitment.json")
    for name in made.names:
        assert name.encode() not in published
        proof = RecipientProof.of(made, KEY, name)
        proof.save(tmp_path / "proof.json")
        assert RecipientProof.load(tmp_path / "proof.json") == proof
        assert Opening.of_recipients(loaded, proof.root()).committed
    later = made.added(["recipient 5"])
    assert not Opening.of_recipients(loaded, RecipientProof.of(later, KEY, "recipient 5").root()).committed


def test_a_proof_tells_one_name_only(tmp_path: Path) -> None:
    RecipientProof.of(register(5), KEY, "recipient 2").save(tmp_path / "proof.json")
    content = (tmp_path / "proof.json").read_text()
    assert "recipient 2" in content
    assert not any(f"recipient {i}" in content for i in (0, 1, 3, 4))


def test_other_keys_and_names_are_refused() -> None:
    with pytest.raises(RegisterError, match="key"):
        recipients_root(register(3), Key(b"somebody else's key"))
    with pytest.raises(ValueError, match="name: wanted a recipient"):
        RecipientProof.of(register(3), KEY, "nobody")


@pytest.mark.parametrize(
    "change",
    [{"format": "other"}, {"version": 2}, {"index": 9}, {"size": "5"}, {"salt": "00"}, {"more": 1}],
)
def test_files_that_open_nobody(tmp_path: Path, change: dict[str, object]) -> None:
    RecipientProof.of(register(5), KEY, "recipient 2").save(tmp_path / "proof.json")
    record = json.loads((tmp_path / "proof.json").read_text()) | change
    (tmp_path / "proof.json").write_text(json.dumps(record))
    with pytest.raises(ProofError):
        RecipientProof.load(tmp_path / "proof.json")
    (tmp_path / "proof.json").write_text("not JSON")
    with pytest.raises(ProofError, match="opens no recipient"):
        RecipientProof.load(tmp_path / "proof.json")
