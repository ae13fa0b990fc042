"""docs/results.schema.json describes what is printed and written, and nothing is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from activemark_fast.bulk import SuspectResult
from activemark_fast.bulk.journal import FORMAT_VERSION
from activemark_fast.checkpoints.fit import Fit
from activemark_fast.tracing import Trace
from activemark_fast.verdict import Verdict

SCHEMA: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "docs" / "results.schema.json").read_text(encoding="utf-8")
)


def check(value: object, part: str | None = None) -> None:
    schema = SCHEMA if part is None else {**SCHEMA, "$ref": f"#/$defs/{part}"}
    if part is not None:
        schema = {key: content for key, content in schema.items() if key != "oneOf"}
    jsonschema.Draft202012Validator(schema).validate(json.loads(json.dumps(value)))


def verdicts() -> list[Verdict]:
    errors, none = np.array([0, 3, 7]), np.zeros(0, dtype=np.int64)
    trace = Trace(("Ada", "Grace"), np.array([1e-9, 1.0]), np.array([9.0, 0.1]), 512, 1e-6)
    return [
        Verdict("match", "found", errors, 32, 5, 2 / 3, 1e-9, 1e-6, "keyed", identical=True, trace=trace),
        Verdict("inconclusive", "unread", none, 32, 5, float("nan"), None, 1e-6, "keyed", aligned="rotation"),
    ]


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("verdict", verdicts(), ids=lambda verdict: verdict.decision)
def test_verdicts(verdict: Verdict) -> None:
    written = verdict.to_dict()
    check(written, "verdict")
    assert written.keys() == SCHEMA["$defs"]["verdict"]["properties"].keys()
    with pytest.raises(jsonschema.ValidationError):
        check(written | {"decision": "maybe"}, "verdict")
    read = json.loads(json.dumps(written))
    assert Verdict.from_dict(read).to_dict() == written | {"trace": None}  # names are the register's
    for change in ({"decision": "maybe"}, {"paid_p_value": 0.5}, {"commitment": {}}, {"images": 9}):
        with pytest.raises(ValueError, match="no verdict: "):
            Verdict.from_dict(read | change)


@pytest.mark.parametrize(
    "result",
    [
        SuspectResult("/a", verdicts()[0], fit=Fit(tower="model.", matched=3, converted={"float16": 2})),
        SuspectResult("/b", error="is truncated"),
        SuspectResult("/c", skipped="not a model"),
        SuspectResult(
            "module 3", verdicts()[1], fit=Fit(missing=("x",), why={"x": "int8"}, ignored=("a",) * 99)
        ),
    ],
    ids=lambda result: result.suspect,
)
def test_lines_of_a_journal(result: SuspectResult) -> None:
    check(result.to_dict())
    with pytest.raises(jsonschema.ValidationError):
        check(result.to_dict() | {"more": 1})


def test_the_format_is_the_journals() -> None:
    assert SCHEMA["$defs"]["header"]["properties"]["activemark_journal"] == {"const": FORMAT_VERSION}
