from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import forms
import pytest
from forms import FORMS, Form
from small import Marked, mark
from tiny import vit

from activemark_fast.bulk import SuspectResult, verify_many


@pytest.fixture(scope="module")
def marked() -> Marked:
    """Of few images, since there are many forms, all of which are read to the end."""
    return mark(16)


@pytest.fixture(scope="module")
def written(marked: Marked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every form of the marked and of an innocent model."""
    folder = tmp_path_factory.mktemp("forms")
    for kind, model in (("marked", marked.model), ("innocent", vit(seed=3))):
        (folder / kind).mkdir()
        for index, form in enumerate(FORMS):
            form.write(model, folder / kind / f"{index}.bin")
    return folder


@pytest.fixture(scope="module")
def results(marked: Marked, written: Path) -> dict[tuple[str, int, bool], SuspectResult]:
    """kind, index, whether all images were read → result."""
    found = {}
    for exhaustive in (False, True):
        paths = [written / kind / f"{i}.bin" for kind in ("marked", "innocent") for i in range(len(FORMS))]
        settings: dict[str, Any] = {"power": None} if exhaustive else {}
        for result in verify_many(paths, *marked.arguments(), **settings):
            path = Path(result.suspect)
            found[path.parent.name, int(path.stem), exhaustive] = result
    return found


@pytest.mark.parametrize("index", range(len(FORMS)), ids=[form.name for form in FORMS])
def test_a_form_is_read_or_told_by_name(
    index: int, results: dict[tuple[str, int, bool], SuspectResult]
) -> None:
    form = FORMS[index]
    for exhaustive in (False, True):
        ours, other = (results[kind, index, exhaustive] for kind in ("marked", "innocent"))
        for result in (ours, other):
            told = result.to_dict()
            if form.broken:
                assert re.search(form.outcome, str(result.error)), told
                continue
            assert result.verdict is not None, told
            if form.outcome != "read":
                assert result.verdict.decision == "inconclusive", told
                assert re.search(form.outcome, result.verdict.reason), told
        if form.outcome == "read":
            assert ours.verdict is not None
            assert other.verdict is not None
            assert ours.verdict.decision == "match", ours.to_dict()
            assert other.verdict.decision in ("no match", "inconclusive"), other.to_dict()


def test_the_list_in_the_documents_is_made_from_the_tests() -> None:
    written = Path(forms.__file__).parents[2] / "docs" / "forms.md"
    assert written.read_text() == forms.page(), "run PYTHONPATH=tests python tests/bulk/forms.py"


def test_every_form_has_its_own_name() -> None:
    assert len({form.name for form in FORMS}) == len(FORMS)
    assert all(isinstance(form, Form) and form.group for form in FORMS)
