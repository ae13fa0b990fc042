from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tiny import vit
from torch import nn

from activemark_fast import Key, Verdict, embed, verify, verify_many
from activemark_fast.attacks.cut import cut
from activemark_fast.attacks.merge import average
from activemark_fast.attacks.symmetry import permute_residual
from activemark_fast.embedding import Embedding
from activemark_fast.report import trace_figure
from activemark_fast.tracing import Register, RegisterError, Trace
from activemark_fast.watermark import fingerprint

KEY = Key(b"tests of whose copy it is")
NAMES = ["Ada", "Grace", "Hedy", "Mary"]


def marked(**settings: Any) -> Embedding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return embed(vit(), KEY, **({"fidelity": 0.97, "recipients": NAMES} | settings))


@pytest.fixture(scope="module")
def embedding() -> Embedding:
    return marked()


def register_of(embedding: Embedding) -> Register:
    assert embedding.register is not None
    return embedding.register


def copy_of(embedding: Embedding, name: str) -> nn.Module:
    return register_of(embedding).copy(KEY, embedding.model, name)


def traced(suspect: nn.Module, embedding: Embedding, register: Register | None = None) -> Verdict:
    register = register_of(embedding) if register is None else register
    return verify(suspect, embedding.watermark, KEY, register=register)


def accused(verdict: Verdict) -> list[str]:
    assert verdict.trace is not None
    return [name for name, _ in verdict.trace.accused]


def test_a_copy_names_its_recipient_and_nobody_else(embedding: Embedding) -> None:
    for name in NAMES[:2]:
        verdict = traced(copy_of(embedding, name), embedding)
        assert verdict.decision == "match"
        assert not verdict.identical
        assert accused(verdict) == [name]
        assert verdict.trace is not None
        assert verdict.trace.positions == register_of(embedding).positions == 2 * 8 * 32


def test_what_is_nobodys_copy_accuses_nobody(embedding: Embedding) -> None:
    released, original = traced(embedding.model, embedding), traced(vit(), embedding)
    assert (released.decision, original.decision) == ("match", "no match")
    assert released.identical
    assert accused(released) == accused(original) == []


def test_without_a_register_nothing_is_traced(embedding: Embedding) -> None:
    assert verify(embedding.model, embedding.watermark, KEY).trace is None


def test_the_model_that_is_returned_is_the_one_copies_are_made_of(embedding: Embedding) -> None:
    assert fingerprint(embedding.model) == embedding.watermark.fingerprint
    register_of(embedding).check_model(embedding.model)
    site = embedding.watermark.site
    changed = register_of(embedding).weights(KEY, embedding.model, "Ada")
    blocks = range(site.block + 1, site.taps[-1] + 1)
    assert set(changed) == {f"blocks.{block}.mlp.fc2.weight" for block in blocks}


def test_a_copy_keeps_the_fidelity_asked_for(embedding: Embedding) -> None:
    assert embedding.quality.keeps(0.97)
    assert "edit: traced" in [record["stage"] for record in embedding.history]


def test_other_recipients_change_neither_the_mark_nor_a_copy(embedding: Embedding) -> None:
    """What all copies share may depend on nobody's codeword: the test of all the others rests on it."""
    other = marked(recipients=["Zoe", "Hedy"])
    assert other.watermark.fingerprint == embedding.watermark.fingerprint
    assert fingerprint(copy_of(other, "Hedy")) == fingerprint(copy_of(embedding, "Hedy"))


def test_a_later_recipient_is_named(embedding: Embedding) -> None:
    later = register_of(embedding).added(["Rosalind"])
    suspect = later.copy(KEY, embedding.model, "Rosalind")
    assert accused(traced(suspect, embedding, later)) == ["Rosalind"]
    assert accused(traced(suspect, embedding)) == []  # before they were a recipient


def test_two_who_average_their_copies_are_named(embedding: Embedding) -> None:
    suspect = average(copy_of(embedding, "Ada"), None, 0, 0.5, other=copy_of(embedding, "Mary"))
    assert set(accused(traced(suspect, embedding))) == {"Ada", "Mary"}


@pytest.mark.parametrize(
    "change",
    [
        lambda model: cut(model, None, 0, 2),
        lambda model: permute_residual(model, None, 0, 1),
        lambda model: model.to(torch.bfloat16).float(),
    ],
    ids=["cut", "permuted", "bf16"],
)
def test_changed_copies_name_their_recipient(embedding: Embedding, change: Any) -> None:
    verdict = traced(change(copy_of(embedding, "Grace")), embedding)
    assert accused(verdict) == ["Grace"]
    assert verdict.trace is not None
    assert verdict.trace.positions in (256, 512)


def test_a_suspect_that_cannot_be_read_has_no_trace(embedding: Embedding) -> None:
    broken = copy_of(embedding, "Ada")
    with torch.no_grad():
        broken.get_parameter("blocks.0.mlp.fc1.weight").fill_(math.nan)
    assert traced(broken, embedding).trace is None


def test_the_suspect_is_left_as_it_was(embedding: Embedding) -> None:
    suspect = copy_of(embedding, "Ada")
    before = fingerprint(suspect)
    traced(suspect, embedding)
    assert fingerprint(suspect) == before


def test_a_sweep_traces(embedding: Embedding) -> None:
    suspects = [copy_of(embedding, "Ada"), vit(), copy_of(embedding, "Mary")]
    results = verify_many(
        suspects,
        embedding.watermark,
        KEY,
        vit(),
        register=register_of(embedding),
        in_order=True,
    )
    verdicts = [result.verdict for result in results]
    assert [accused(verdict) for verdict in verdicts if verdict is not None] == [["Ada"], [], ["Mary"]]


def test_no_register_goes_through_ray(embedding: Embedding, tmp_path: Path) -> None:
    key_file = tmp_path / "owner.key"
    Key(bytes(range(32))).write(key_file)
    with pytest.raises(ValueError, match="register: wanted none with the engine 'ray'"):
        verify_many([], embedding.watermark, key_file, vit(), register=register_of(embedding), engine="ray")


def test_registers_of_others_are_refused(embedding: Embedding) -> None:
    ours = register_of(embedding)
    parts = (ours.changes, ours.measured, ours.reference)
    theirs = Register.make(Key(b"another owner's key"), NAMES, embedding.model, *parts)
    with pytest.raises(RegisterError, match="key: wanted the key this register was made with"):
        traced(embedding.model, embedding, theirs)
    with pytest.raises(RegisterError, match="register: wanted that of the marked model"):
        traced(embedding.model, embedding, Register.make(KEY, NAMES, vit(), *parts))
    with pytest.raises(TypeError, match="register: wanted a Register, got str"):
        verify(embedding.model, embedding.watermark, KEY, register="register")  # type: ignore[arg-type]


def test_bad_recipients_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="recipients: wanted the keyed codec with them, got 'learned'"):
        embed(vit(), KEY, codec="learned", recipients=NAMES)
    with pytest.raises(ValueError, match="recipients: wanted at least one name"):
        embed(vit(), KEY, recipients=[])


def test_own_hold_out_images_change_nothing_for_recipients() -> None:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = marked(images=images)
    suspect = copy_of(made, "Ada")
    verdict = verify(suspect, made.watermark, KEY, images, register=register_of(made))
    assert accused(verdict) == ["Ada"]


def trace(p_values: list[float]) -> Trace:
    deviations = -np.log10(np.array(p_values))
    return Trace(tuple(f"r{i}" for i in range(len(p_values))), np.array(p_values), deviations, 512, 1e-6)


def test_the_trace_in_words_and_as_json() -> None:
    found = trace([1.0, 1e-9, 0.3, 1e-20])
    assert found.accused == (("r3", 1e-20), ("r1", 1e-9))
    assert found.smallest_unaccused == 0.3
    text = str(found)
    assert text.startswith("2 of 4 recipients accused at 1e-06; the smallest p-value of the others is 0.3")
    assert text.index("r3: p = 1e-20") < text.index("r1: p = 1e-09")
    assert "names one who leaks alone among 4 recipients" in text
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["accused"] == [{"name": "r3", "p_value": 1e-20}, {"name": "r1", "p_value": 1e-9}]
    nobody = trace([1.0, 0.5])
    assert str(nobody).startswith("none of 2 recipients accused")
    assert trace([1e-9]).smallest_unaccused is None


def test_the_figure_names_the_accused(tmp_path: Path) -> None:
    for found, title in ((trace([1.0, 1e-9]), "Whose copy: r1"), (trace([1.0, 0.5]), "Whose copy: nobody")):
        figure = trace_figure(found)
        FigureCanvasAgg(figure).draw()
        assert figure.axes[0].get_title(loc="left").startswith(title)
        assert [text.get_text() for text in figure.axes[0].texts] == [
            f"{name}, p = {p:.2g}" for name, p in found.accused
        ]
