from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_schema import check as check_schema
from tiny import vit

from activemark_fast.checkpoints import build_model, save_model
from activemark_fast.cli import main
from activemark_fast.embedding import embed
from activemark_fast.key import Key

ARCHITECTURE = "timm:VisionTransformer?" + json.dumps(
    {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4, "num_classes": 3}
)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key, a watermark, and five suspects of which one is broken."""
    folder = tmp_path_factory.mktemp("cli")
    key = Key(bytes(range(32)))
    key.write(folder / "owner.key")
    model = build_model(ARCHITECTURE)
    model.load_state_dict(vit(depth=5).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        made = embed(model, key, fidelity=0.9, architecture=ARCHITECTURE)
    made.watermark.save(folder / "watermark.safetensors")
    suspects = folder / "suspects"
    suspects.mkdir()
    save_model(made.model, suspects / "marked.safetensors", ARCHITECTURE)
    torch.save({"model": made.model.state_dict()}, suspects / "marked.pth")
    save_model(vit(seed=1, depth=5), suspects / "innocent.safetensors", ARCHITECTURE)
    save_model(vit(seed=2, embed_dim=64), suspects / "other.safetensors", ARCHITECTURE)
    torch.save({"state": {0: {"exp_avg": torch.zeros(3)}}}, suspects / "optimizer.pt")
    (suspects / "README.md").write_text("five models")
    (suspects / "broken\x1b[31m.bin").write_bytes(b"no weights")
    return folder


def arguments(ready: Path, out: Path, *more: object) -> list[str]:
    fixed = ["--watermark", ready / "watermark.safetensors", "--key", ready / "owner.key", "--out", out]
    return ["verify-many", *map(str, [ready / "suspects", *fixed, *more])]


def test_a_sweep(ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.jsonl"
    assert main(arguments(ready, out, "--csv", tmp_path / "results.csv")) == 2
    text = capsys.readouterr().out
    rows = [line.rsplit(None, 1) for line in text.splitlines()[:6]]
    assert {name.strip(): int(count) for name, count in rows} == {
        "match": 2,
        "no match": 1,
        "inconclusive": 1,
        "not a model": 1,
        "error": 1,
        "suspects": 6,
    }
    assert "marked.pth" in text
    assert f"\nerror: {ready / 'suspects'}/broken\\x1b[31m.bin: neither a " in text
    assert text.endswith("not looked at: 1 files with other suffixes (.md)\n")
    assert "\x1b" not in text
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert sorted(row["decision"] for row in table) == ["", "", "inconclusive", "match", "match", "no match"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 7
    for line in lines:
        check_schema(line)
    secret = (ready / "owner.key").read_text().strip()
    assert secret not in out.read_text()
    # Once more it is refused; resumed, there is nothing left to do.
    assert main(arguments(ready, out)) == 2
    assert "resume it" in capsys.readouterr().err
    assert main(arguments(ready, out, "--resume", "--json")) == 2
    record = json.loads(capsys.readouterr().out)
    assert (record["suspects"], record["judged_now"], record["match"], record["error"]) == (6, 0, 2, 1)
    assert record["other_files"] == 1
    assert main(arguments(ready, out, "--resume", "--fail-on-match")) == 4
    assert main(arguments(ready, out, "--resume", "--exhaustive")) == 2
    assert "differs in power" in capsys.readouterr().err


def test_a_sweep_in_which_all_is_well(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(ready, tmp_path / "a.jsonl", "--exhaustive", "--json")
    command[1] = str(ready / "suspects" / "[mi]*.safetensors")
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["match"], record["no_match"], record["suspects"]) == (1, 1, 2)
    command = arguments(ready, tmp_path / "b.jsonl", "--fail-on-match")
    command[1] = str(ready / "suspects" / "innocent.safetensors")
    assert main(command) == 0


def test_as_a_process_from_the_sweep_to_a_page(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*command: object) -> tuple[int, str]:
        words = [sys.executable, "-m", "activemark_fast", *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stderr + done.stdout

    out = tmp_path / "a.jsonl"
    code, told = run(*arguments(ready, out, "--timeout", 300, "--json"))
    assert (code, json.loads(told)["error"]) == (2, 1)
    page = ["--journal", out, "--watermark", ready / "watermark.safetensors", "--out", tmp_path / "page.html"]

    def report(suspect: str) -> list[str]:
        return ["report", *map(str, [ready / "suspects" / suspect, *page])]

    assert run(*report("marked.pth"))[0] == 0
    # The rest in this process, which has imported everything.
    assert main(report("innocent.safetensors")) == 1
    assert main(report("other.safetensors")) == 3
    capsys.readouterr()
    assert main(report("optimizer.pt")) == 2
    assert "has no verdict on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--csv", "{out}"], "--out, --csv: wanted two files"),
        (["--csv", "/nowhere/x.csv"], "--csv: there is no folder"),
        (["--alpha", "1"], "alpha: wanted"),
        (["--power", "2"], "power: wanted"),
        (["--timeout", "-1"], "timeout: wanted"),
        (["--max-bytes", "0"], "max_bytes: wanted"),
        (["--architecture", "timm:nonsense"], "cannot be built"),
    ],
)
def test_errors_come_before_any_work(
    more: list[str], message: str, ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.jsonl"
    assert main(arguments(ready, out, *(text.format(out=out) for text in more))) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_nothing_to_do(ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(ready, tmp_path / "a.jsonl")
    (tmp_path / "empty").mkdir()
    command[1] = str(tmp_path / "empty")
    assert main(command) == 2
    assert "found none in" in capsys.readouterr().err
