from __future__ import annotations

import csv
import importlib
import importlib.metadata
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import vit
from torch import nn

from activemark_fast.attacks.suite import Attack, suite
from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints import save_model
from activemark_fast.cli import main
from activemark_fast.datasets import Task, synthetic_task
from activemark_fast.embedding import embed
from activemark_fast.evaluate import Size, evaluate
from activemark_fast.evaluation import Evaluation
from activemark_fast.key import Key
from activemark_fast.watermark import Watermark

# So small a model has no room for a mark as strong as `embed` wants it.
pytestmark = pytest.mark.filterwarnings("ignore:the mark did not reach its targets:RuntimeWarning")

KEY = Key(b"tests of evaluate: owner")
MODULE = importlib.import_module("activemark_fast.evaluate")
SMALL = {
    "as released",
    "40% of weights",
    "collusion: mean with a sibling under another key",
    "images 1.5 times as large",
    "all, 1e-4",
    "all blocks re-initialised",
    "last block re-initialised",
    "segmentation, all, 1e-4",
}
ARCHITECTURE = "timm:VisionTransformer?" + json.dumps(
    {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 5, "num_heads": 4, "num_classes": 3}
)


@dataclass(frozen=True)
class Marked:
    model: nn.Module
    original: nn.Module
    watermark: Watermark
    tasks: dict[str, Task]

    def evaluate(self, out: Path, **settings: Any) -> Evaluation:
        arguments: dict[str, Any] = {"tasks": self.tasks, "data": "made", "jobs": 2} | settings
        return evaluate(self.model, self.original, self.watermark, KEY, out, **arguments)


@pytest.fixture(scope="module")
def small() -> Any:
    """Few attacks, on few images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "SIZES", dict.fromkeys(("quick", "full", "adaptive"), Size(64, 32)))
        patch.setattr(MODULE, "suite", lambda name, depth: [a for a in suite(name, depth) if a.name in SMALL])
        yield


@pytest.fixture(scope="module")
def marked(small: None) -> Marked:
    original = vit(embed_dim=64, depth=5)
    embedding = embed(original, KEY, bits=24, fidelity=0.95)
    view = Backbone(original)
    task = synthetic_task(view.preprocess, 64, 32)
    return Marked(embedding.model, original, embedding.watermark, {"similar": task})


@pytest.fixture(scope="module")
def done(marked: Marked, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    out = tmp_path_factory.mktemp("evaluation") / "out"
    return marked.evaluate(out), out


def test_suites_have_unique_names_and_quick_is_a_part_of_full() -> None:
    for depth in (3, 12, 24):
        assert len({attack.name for attack in suite("adaptive", depth)}) == len(suite("adaptive", depth))
        full, quick = suite("full", depth), suite("quick", depth)
        assert len({attack.name for attack in full}) == len(full)
        assert {attack.name for attack in quick} < {attack.name for attack in full}
    with pytest.raises(ValueError, match="suite: wanted one of quick, full, adaptive, got 'long'"):
        suite("long", 12)


def test_every_attack_is_read_three_times(done: tuple[Evaluation, Path]) -> None:
    evaluation, _ = done
    readings = {(row["attack"], row["subject"], row["key"]) for row in evaluation.rows}
    attacks = {name for name in SMALL if "segmentation" not in name}
    assert readings == {
        (name, subject, key)
        for name in attacks
        for subject, key in (("marked", "owner"), ("marked", "another"), ("original", "owner"))
    }
    assert len(evaluation.rows) == len(readings)
    assert evaluation.header["left_out"] == {"segmentation, all, 1e-4": "no images for segmentation"}


def test_what_the_rows_say(done: tuple[Evaluation, Path]) -> None:
    evaluation, _ = done

    def row(attack: str, subject: str = "marked", key: str = "owner") -> dict[str, Any]:
        found = evaluation.row(attack, subject, key)
        assert found is not None
        return found

    released = row("as released")
    assert released["decision"] == "match"
    assert released["detection_rate"] > 0.95
    assert sum(released["histogram"]) == 128
    assert released["cosine"] > 0.97
    assert row("as released", "original")["cosine"] == pytest.approx(1.0)
    for name in ("40% of weights", "all, 1e-4", "last block re-initialised", "images 1.5 times as large"):
        assert row(name)["decision"] == "match", name
    assert "read after resizing back" in row("images 1.5 times as large")["reason"]
    collusion = "collusion: mean with a sibling under another key"
    assert row(collusion, key="another")["expected"] == "match"
    assert row("40% of weights")["descent"] == "descent"
    assert row("40% of weights")["descent_score"] > 0.5
    assert row("all blocks re-initialised")["descent"] != "descent"
    for other in (row("40% of weights", "original"), row("40% of weights", key="another")):
        assert other["descent"] is other["descent_score"] is other["descent_p_value"] is None
    assert row("all blocks re-initialised")["expected"] is None
    assert row("all blocks re-initialised")["decision"] == "no match"
    assert row("last block re-initialised")["cosine"] < 0.9
    innocent = [r for r in evaluation.rows if r["expected"] == "no match"]
    assert len(innocent) == 2 * 7 - 1
    assert all(r["p_value"] > 1e-4 for r in innocent)
    for r in evaluation.rows:
        assert 0 <= r["probe_accuracy"] <= 1
        assert 0 <= r["knn_accuracy"] <= 1
        assert r["task_score"] == r["probe_accuracy"]


def test_the_files_hold_the_rows(done: tuple[Evaluation, Path]) -> None:
    evaluation, out = done
    assert sorted(path.name for path in out.iterdir()) == ["results.csv", "results.json"]
    loaded = Evaluation.load(out)
    assert loaded.rows == evaluation.rows
    assert loaded.header == evaluation.header
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert [line["attack"] for line in lines] == [row["attack"] for row in evaluation.rows]
    assert float(lines[0]["p_value"]) == evaluation.rows[0]["p_value"]
    assert json.loads(lines[0]["versions"])["torch"] == importlib.metadata.version("torch")
    assert KEY.derive("x").hex() not in (out / "results.json").read_text()


def test_the_rows_do_not_depend_on_how_many_run_at_a_time_and_a_run_goes_on_where_it_stopped(
    marked: Marked, done: tuple[Evaluation, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation, _ = done
    bench = MODULE._Bench
    rows: Callable[..., Any] = bench.rows
    ran: list[tuple[str, str]] = []

    def stopping(self: Any, attack: Attack, subject: str) -> Any:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((attack.name, subject))
        return rows(self, attack, subject)

    monkeypatch.setattr(bench, "rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        marked.evaluate(tmp_path / "out", jobs=1)
    first = list(ran)
    assert len(Evaluation.load(tmp_path / "out").rows) == 5
    monkeypatch.setattr(bench, "rows", lambda self, a, s: ran.append((a.name, s)) or rows(self, a, s))
    again = marked.evaluate(tmp_path / "out", jobs=1)
    assert len(ran) == len(set(ran)) == 2 * 7
    assert ran[:3] == first

    def timeless(found: Evaluation) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in found.rows]

    assert timeless(again) == timeless(evaluation)


def test_another_evaluation_is_not_gone_on_with(marked: Marked, done: tuple[Evaluation, Path]) -> None:
    _, out = done
    before = (out / "results.json").read_bytes()
    with pytest.raises(ValueError, match="holds an evaluation with another seed; choose another folder"):
        marked.evaluate(out, seed=1)
    assert (out / "results.json").read_bytes() == before


def test_the_summary_counts_what_the_rows_say() -> None:
    def row(attack: str, expected: str | None, decision: str, **more: Any) -> dict[str, Any]:
        as_expected = expected in (None, decision)
        base = {
            "subject": "marked",
            "key": "owner",
            "family": "pruning",
            "task": "similar",
            "task_score": 0.5,
        }
        return (
            base
            | {"attack": attack, "expected": expected, "decision": decision, "as_expected": as_expected}
            | more
        )

    tuned = {"family": "fine-tuning"}
    rows = [
        row("a", "match", "match", **tuned, detection_rate=1.0, task_score=0.80),
        row("b", "match", "match", **tuned, detection_rate=0.9, task_score=0.77),
        row("c", "match", "no match", **tuned, detection_rate=0.0, task_score=0.70),  # the task is not kept
        row("d", "match", "match", **tuned, detection_rate=1.0, task_score=0.3, task="segmentation"),
        row("e", "no match", "match", key="another"),
        row("f", None, "no match"),
    ]
    assert Evaluation({}, rows).summary() == {
        "positives": 4,
        "found": 3,
        "negatives": 1,
        "accused": 1,
        "finetuning": 3,
        "finetuning_held": 2,
        "unexpected": ["c (marked, owner key)", "e (marked, another key)"],
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": {}}, "tasks: wanted at least 'similar'"),
        ({"jobs": 0}, "jobs: wanted at least 1, got 0"),
        ({"suite_name": "long"}, "suite: wanted one of"),
    ],
)
def test_errors(marked: Marked, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        marked.evaluate(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"wanted a folder with the results\.json of an evaluation"):
        Evaluation.load(tmp_path)


def test_the_command(
    marked: Marked, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "suite", lambda name, depth: suite(name, depth)[:2])
    save_model(marked.model, tmp_path / "marked.safetensors", ARCHITECTURE)
    save_model(marked.original, tmp_path / "original.safetensors", ARCHITECTURE)
    marked.watermark.save(tmp_path / "wm.safetensors")
    key = Key(bytes(range(32)))
    key.write(tmp_path / "other.key")
    assert key != KEY

    def run(*more: object, key_file: str = "owner.key") -> int:
        files = {
            "--original": tmp_path / "original.safetensors",
            "--watermark": tmp_path / "wm.safetensors",
            "--key": tmp_path / key_file,
            "--out": tmp_path / "out",
        }
        arguments = [
            "evaluate",
            tmp_path / "marked.safetensors",
            *(x for pair in files.items() for x in pair),
        ]
        return main([str(argument) for argument in (*arguments, *more)])

    assert run(key_file="other.key") == 2
    assert "wanted the key this watermark was made with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # The owner's key of these tests has no file; its material is no hexadecimal text.
    embedding = embed(marked.original, tmp_path / "other.key", bits=24, fidelity=0.95)
    save_model(embedding.model, tmp_path / "marked.safetensors", ARCHITECTURE)
    embedding.watermark.save(tmp_path / "wm.safetensors")
    assert run("--data", tmp_path / "none", key_file="other.key") == 2
    assert "there is neither" in capsys.readouterr().err
    code = run("--json", "--jobs", 2, key_file="other.key")
    record = json.loads(capsys.readouterr().out)
    assert code == (1 if record["unexpected"] else 0)
    assert record["negatives"] == 4
    assert record["header"]["data"] == "made images of leaves and clouds"
    assert run(key_file="other.key") == code
    out = capsys.readouterr().out
    assert "innocent models accused: 0 of 4" in out
    adaptive = tmp_path / "adaptive"
    assert run("--json", "--suite", "adaptive", "--out", adaptive, key_file="other.key") == 0
    record = json.loads(capsys.readouterr().out)
    assert [point["attack"] for point in record["frontier"]] == ["as released", "loudest of fc2, 64"]
    assert record["frontier"][0]["lost"] == 0
    rows = [row for row in record["rows"] if row["attack"] == "loudest of fc2, 64"]
    assert {(row["images"], row["steps"]) for row in rows} == {(64, 0)}
    assert all(0 < row["attack_seconds"] < row["seconds"] for row in rows)
    assert sorted(path.name for path in adaptive.iterdir()) == ["frontier.png", "results.csv", "results.json"]
    assert run("--suite", "adaptive", "--out", adaptive, key_file="other.key") == 0
    out = capsys.readouterr().out
    assert "attacks that cost at most 2 of 100 points of the probe: a match after" in out
    assert re.search(r"`compare` still shows the descent after [12];", out)
    assert re.search(r"loudest of fc2, 64 .* descent 0\.\d\d ", out)
