from __future__ import annotations

import base64
import fcntl
import importlib
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_schema import check as check_schema
from torch import nn

import activemark_fast
from activemark_fast.checkpoints import architecture_of, build_model, save_model
from activemark_fast.cli import main
from activemark_fast.cli.verify_many import MATCHED
from activemark_fast.key import Key
from activemark_fast.watermark import Watermark, fingerprint

ARCHITECTURE = "timm:VisionTransformer?" + json.dumps(
    {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 4, "num_classes": 0}
)
OTHER_ARCHITECTURE = ARCHITECTURE.replace("96", "48")
# At this fidelity the edit alone marks the small model well, whatever the key.
SETTINGS = ["--bits", 16, "--fidelity", 0.98, "--max-steps", 0]
COMMAND = [sys.executable, "-m", "activemark_fast"]
PASSPHRASE = "seven wet dice in a drawer"


def module(name: str) -> ModuleType:
    """A module of the package."""
    return importlib.import_module(f"activemark_fast.{name}")


def process(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )


@dataclass(frozen=True)
class Ready:
    """A small model, marked once by the command line."""

    folder: Path
    embedding: subprocess.CompletedProcess[str]

    def __getattr__(self, name: str) -> Path:
        suffix = {"key": "key", "other_key": "key"}.get(name, "safetensors")
        return self.folder / f"{name}.{suffix}"

    def verify_args(self, suspect: object, *more: object) -> list[object]:
        return ["verify", suspect, "--watermark", self.watermark, "--key", self.key, *more]

    def embed_args(self, folder: Path, *more: object) -> list[object]:
        outputs = ["--out", folder / "out.safetensors", "--watermark", folder / "wm.safetensors"]
        return ["embed", self.original, *outputs, "--key", self.key, *SETTINGS, *more]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    folder = tmp_path_factory.mktemp("ready")
    torch.manual_seed(0)
    save_model(build_model(ARCHITECTURE), folder / "original.safetensors", ARCHITECTURE)
    Key(bytes(range(32))).write(folder / "key.key")
    Key(bytes(range(32, 64))).write(folder / "other_key.key")
    outputs = ["--out", folder / "marked.safetensors", "--watermark", folder / "watermark.safetensors"]
    key = ["--key", folder / "key.key"]
    done = process("embed", folder / "original.safetensors", *outputs, *key, *SETTINGS, "--json")
    assert done.returncode == 0, done.stderr
    return Ready(folder, done)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def record(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def run(ready: Ready, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `main` in this process. No output may show a key."""

    def call(*args: object) -> Result:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        result = Result(code, *capsys.readouterr())
        for secret in (ready.key.read_text().strip(), ready.other_key.read_text().strip(), PASSPHRASE):
            assert secret not in result.out + result.err
        if code == 2:
            assert result.out == ""
            assert result.err.startswith("activemark: error: ")
            assert result.err.count("\n") == 1
        return result

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def type_at_prompt(monkeypatch: pytest.MonkeyPatch, *typed: str) -> list[str]:
    """Lets the prompts be answered with `typed`; returns what is left of it."""
    left = list(typed)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("getpass.getpass", lambda _prompt: left.pop(0))
    return left


# ---- as a process


def test_embed_reports_what_it_measured(ready: Ready) -> None:
    record = json.loads(ready.embedding.stdout)
    assert ready.embedding.stdout.count("\n") == 1
    assert ready.embedding.stderr == ""
    assert record["model"] == str(ready.marked)
    assert record["watermark"] == str(ready.watermark)
    assert record["reached"] is True
    assert record["fidelity"] >= 0.98
    assert record["bit_error"] < 0.5
    assert record["steps"] == 0
    assert record["seconds"] > 0
    assert record["site_reason"].startswith(f"block {record['block']}, the middle")
    assert architecture_of(ready.marked) == ARCHITECTURE
    assert Watermark.load(ready.watermark).architecture == ARCHITECTURE
    assert ready.key.read_text().strip() not in ready.embedding.stdout + ready.embedding.stderr
    assert not list(ready.folder.glob(".*"))


@pytest.mark.parametrize(("suspect", "code"), [("marked", 0), ("original", 1)])
def test_verify_as_a_process(ready: Ready, suspect: str, code: int) -> None:
    done = process(*ready.verify_args(getattr(ready, suspect), "--json"))
    assert done.returncode == code, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["decision"] == {0: "match", 1: "no match"}[code]


def test_a_closed_pipe_is_no_error(ready: Ready) -> None:
    command = [*COMMAND, *map(str, ready.verify_args(ready.original))]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


def read_within(seconds: float, terminal: int) -> bytes:
    """What comes next from a terminal; nothing where its other end is closed."""
    assert select.select([terminal], [], [], seconds)[0], "nothing came"
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def test_interrupt_in_the_middle_of_an_embed(ready: Ready, tmp_path: Path) -> None:
    args = ready.embed_args(tmp_path, "--codec", "learned", "--max-steps", 10**6)
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    running = subprocess.Popen(
        [*COMMAND, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        stdin=subprocess.DEVNULL,
        # Whoever runs the tests in the background has them inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(stderr)
    shown = b""
    try:
        while b"fine-tuning" not in shown:
            more = read_within(60, terminal)
            assert more, shown
            shown += more
        running.send_signal(signal.SIGINT)
        while more := read_within(60, terminal):
            shown += more
        stdout, _ = running.communicate(timeout=60)
    finally:
        running.kill()
        os.close(terminal)
    assert running.returncode == 130
    assert shown.rstrip().endswith(b"activemark: interrupted")
    assert b"Traceback" not in shown
    assert stdout == b""
    assert names(tmp_path) == []


def test_a_checkpoint_is_used_and_goes(ready: Ready, run: Callable[..., Result], tmp_path: Path) -> None:
    args = ready.embed_args(tmp_path, "--codec", "learned", "--max-steps", 2)
    wrong = run(*args, "--checkpoint", tmp_path / "nowhere" / "state")
    assert (wrong.code, names(tmp_path)) == (2, [])
    assert "checkpoint: wanted a file in a folder to write to" in wrong.err
    (tmp_path / "state").write_bytes(b"something else")
    wrong = run(*args, "--checkpoint", tmp_path / "state")
    assert (wrong.code, names(tmp_path)) == (2, ["state"])
    (tmp_path / "state").unlink()
    done = run(*args, "--checkpoint", tmp_path / "state")
    assert done.code == 0
    assert "did not reach its targets" in done.err
    assert names(tmp_path) == ["out.safetensors", "wm.safetensors"]


# ---- help and usage


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"activemark {activemark_fast.__version__}\n"
    for command in ([], ["key"], ["key", "new"], ["embed"], ["verify"], ["demo"]):
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--help"])
        out = capsys.readouterr().out
        assert out.startswith(" ".join(["usage: activemark", *command]))
        assert command or "1 the answer is no, and never a failure; 2 error" in " ".join(out.split())


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["key"],
        ["sell"],
        ["verify", "suspect"],
        ["embed", "demo", "--out", "a", "--watermark", "b", "--codec", "morse"],
        ["embed", "demo", "--out", "a", "--watermark", "b", "--bits", "many"],
        ["verify", "suspect", "--water", "b"],
        ["demo", "--precision", "fp8"],
    ],
)
def test_usage_errors(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(args)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: " in captured.err


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["verfy"], "'verify'"),
        (["verify_many"], "'verify-many'"),
        (["key", "nwe"], "'new'"),
        (["demo", "--precision", "pf16"], "'fp16'|'bf16'"),
        (["sell"], None),
    ],
)
def test_what_was_mistyped(args: list[str], meant: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(args)
    told = capsys.readouterr().err
    assert re.search(rf"(did|maybe) you mean(t)? ({meant})", told) if meant else "you mean" not in told


def test_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "tcsh"):
        with pytest.raises(SystemExit, match="0"):
            main(["--print-completion", shell])
        script = capsys.readouterr().out
        assert "verify-many" in script
        assert "fail-on-match" in script
        assert {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "/f/"}[shell] in script
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match="2"):
        main(["--print-completion", "bash"])
    assert "pip install 'activemark-fast[completion]'" in capsys.readouterr().err


def test_the_codes_of_exits_are_those_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"{MATCHED} a match, of verify-many --fail-on-match" in told


# ---- key new


def test_key_new(run: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "owner.key"
    made = run("key", "new", path)
    content = path.read_bytes()
    assert made.code == 0
    assert str(path) in made.out
    assert content.decode().strip() not in made.out + made.err
    assert path.stat().st_mode & 0o777 == 0o600
    again = run("key", "new", path)
    assert again.code == 2
    assert again.err == f"activemark: error: {path}: File exists\n"
    assert path.read_bytes() == content
    assert run("key", "new", tmp_path / "nowhere" / "owner.key").code == 2


def test_key_new_json(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("key", "new", tmp_path / "k", "--json").record() == {"key": str(tmp_path / "k")}


# ---- where keys come from


def test_passphrase_is_asked_for(
    ready: Ready, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = ["--out", tmp_path / "out.safetensors", "--watermark", tmp_path / "wm.safetensors"]
    embedding = ["embed", ready.original, *outputs, *SETTINGS]
    type_at_prompt(monkeypatch, PASSPHRASE, f"{PASSPHRASE}s")
    different = run(*embedding)
    assert (different.code, names(tmp_path)) == (2, [])
    assert "not the same" in different.err
    left = type_at_prompt(monkeypatch, PASSPHRASE, PASSPHRASE)
    assert run(*embedding).code == 0
    assert left == []
    verifying = ["verify", tmp_path / "out.safetensors", "--watermark", tmp_path / "wm.safetensors"]
    left = type_at_prompt(monkeypatch, PASSPHRASE)
    assert run(*verifying).code == 0
    assert left == []
    type_at_prompt(monkeypatch, f"{PASSPHRASE}s")
    assert run(*verifying).code == 2


def test_no_terminal_to_ask_at(ready: Ready, run: Callable[..., Result]) -> None:
    result = run("verify", ready.marked, "--watermark", ready.watermark)
    assert result.code == 2
    assert "no terminal" in result.err


def test_end_of_input_at_the_prompt(
    ready: Ready, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(_prompt: str) -> str:
        raise EOFError

    type_at_prompt(monkeypatch)
    monkeypatch.setattr("getpass.getpass", hang_up)
    assert run("verify", ready.marked, "--watermark", ready.watermark).code == 2


def test_a_passphrase_in_the_place_of_a_key_file_is_not_shown(
    ready: Ready, run: Callable[..., Result]
) -> None:
    result = run("verify", ready.marked, "--watermark", ready.watermark, "--key", PASSPHRASE)
    assert result.code == 2
    assert "--key" in result.err


# ---- embed


def test_embed_text(ready: Ready, run: Callable[..., Result], tmp_path: Path) -> None:
    result = run(*ready.embed_args(tmp_path))
    assert result.code == 0
    for said in (
        str(tmp_path / "out.safetensors"),
        str(tmp_path / "wm.safetensors"),
        "site: block 2",
        "0 grad",
    ):
        assert said in result.out
    assert names(tmp_path) == ["out.safetensors", "wm.safetensors"]


def test_embed_warns_where_the_targets_are_missed(
    ready: Ready, run: Callable[..., Result], tmp_path: Path
) -> None:
    result = run(*ready.embed_args(tmp_path, "--fidelity", 0.9997, "--json"))
    assert result.code == 0
    assert result.record()["reached"] is False
    assert result.err.startswith("activemark: warning: the mark did not reach its targets: margin ")
    assert "a lower fidelity or fewer bits would help" in result.err  # so little may change
    assert result.err.count("\n") == 1


def test_embed_never_overwrites_without_force(
    ready: Ready, run: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "wm.safetensors").write_text("precious")
    refused = run(*ready.embed_args(tmp_path))
    assert refused.code == 2
    assert "--force" in refused.err
    assert names(tmp_path) == ["wm.safetensors"]
    assert (tmp_path / "wm.safetensors").read_text() == "precious"
    assert run(*ready.embed_args(tmp_path, "--force")).code == 0
    assert Watermark.load(tmp_path / "wm.safetensors").bits == 16
    assert names(tmp_path) == ["out.safetensors", "wm.safetensors"]


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_embed_refuses_bad_outputs_before_any_work(
    ready: Ready,
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    force: list[str],
) -> None:
    monkeypatch.setattr(module("checkpoints"), "load_model", lambda *_: pytest.fail("work was started"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.safetensors").symlink_to(ready.original)
    before = {path: path.read_bytes() for path in (ready.original, ready.key)}
    for out, watermark, wanted in (
        ("nowhere/a", "b", "--out: there is no folder nowhere"),
        ("a", "nowhere/b", "--watermark: there is no folder nowhere"),
        ("a", "folder/../a", "wanted two files"),
        ("folder", "b", "folder is a folder"),
        (ready.original, "b", "is the file of MODEL"),
        ("link.safetensors", "b", "is the file of MODEL"),
        ("a", ready.key, "is the file of --key"),
    ):
        outputs = ["--out", out, "--watermark", watermark]
        for model in (ready.original, f"{ARCHITECTURE}@{ready.original}"):
            result = run("embed", model, *outputs, "--key", ready.key, *force)
            assert result.code == 2
            assert wanted in result.err
    assert names(tmp_path) == ["folder", "link.safetensors"]
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--bits", 4], "bits: wanted a multiple of 8, 8 to 256"),
        (["--bits", 200], "bits: wanted at most"),
        (["--block", 40], "block: wanted 0 to 3"),
        (["--fidelity", 2], "fidelity"),
        (["--clean", "nowhere"], "clean: wanted a folder"),
        (["--images", "nowhere"], "nowhere"),
        (["--device", "abacus"], "device"),
    ],
)
def test_embed_errors_leave_nothing(
    ready: Ready, run: Callable[..., Result], tmp_path: Path, more: list[object], wanted: str
) -> None:
    result = run(*ready.embed_args(tmp_path, *more))
    assert result.code == 2
    assert wanted in result.err
    assert names(tmp_path) == []


@pytest.mark.parametrize("model", ["nowhere.safetensors", "timm:no_such_vit@x", "resnet50", ARCHITECTURE])
def test_embed_refuses_unknown_models(
    ready: Ready, run: Callable[..., Result], tmp_path: Path, model: str
) -> None:
    args = ready.embed_args(tmp_path)
    args[1] = model
    assert run(*args).code == 2
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", ["save_model", "watermark", "first move", "second move"])
def test_both_files_or_neither(
    ready: Ready,
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    error: BaseException,
) -> None:
    embedding = module("embedding").Embedding(
        model=build_model(ARCHITECTURE),
        watermark=Watermark.load(ready.watermark),
        quality=None,
        clean_source="",
        site_reason="",
        steps=0,
        history=[],
        engine=None,
        seconds=0.0,
    )
    monkeypatch.setattr(module("embedding"), "embed", lambda *_args, **_settings: embedding)

    def fail(*_args: object) -> None:
        raise error

    if failing == "save_model":
        monkeypatch.setattr(module("checkpoints"), "save_model", fail)
    elif failing == "watermark":
        monkeypatch.setattr(Watermark, "save", fail)
    else:
        target = tmp_path / ("out" if failing == "first move" else "wm")
        replace = os.replace

        def move(source: Path, to: Path) -> None:
            if Path(to) == target.with_suffix(".safetensors"):
                raise error
            replace(source, to)

        monkeypatch.setattr(os, "replace", move)
    result = run(*ready.embed_args(tmp_path))
    assert result.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert result.err.startswith("activemark: interrupted" if result.code == 130 else "activemark: error: ")
    if result.code == 2 and "move" not in failing:
        target = tmp_path / ("out" if failing == "save_model" else "wm")
        assert f"{target}.safetensors: No space left on device" in result.err
    assert names(tmp_path) == []


def test_an_unexpected_exception_keeps_its_traceback(
    ready: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: object, **_settings: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(module("embedding"), "embed", fail)
    assert main([str(arg) for arg in ready.embed_args(tmp_path)]) == 2  # 1 would be "no match"
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "in fail" in told
    assert told.endswith("activemark: error: KeyError: 'a defect'\n")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no kernel image")]
)
def test_failures_are_never_taken_for_no_match(
    error: Exception, ready: Ready, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module("bulk.sweep").Sweeper, "_judge", fail)
    result = run(*ready.verify_args(ready.original))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert (str(error) or "MemoryError") in result.err


def test_a_full_disk_on_standard_output_is_an_error(ready: Ready) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "info"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr


# ---- verify


def test_verify_text_and_json_agree(ready: Ready, run: Callable[..., Result]) -> None:
    text = run(*ready.verify_args(ready.marked))
    record = run(*ready.verify_args(ready.marked, "--json")).record()
    assert text.out.startswith("MATCH: the suspect carries the mark\n")
    check_schema(record, "verify")
    assert record["suspect"] == str(ready.marked)
    assert record["decision"] == "match"
    assert record["identical"] is True
    assert len(record["bit_errors"]) == record["images"] == 128
    assert f"p-value = {record['p_value']:.3g}" in text.out


def test_verify_settings_reach_the_verdict(ready: Ready, run: Callable[..., Result]) -> None:
    record = run(*ready.verify_args(ready.original, "--json", "--alpha", 1e-4, "--tau", 15)).record()
    assert record["alpha"] == 1e-4
    assert record["tau"] == 15
    assert record["detection_rate"] > 0.9
    assert record["decision"] == "no match"
    assert run(*ready.verify_args(ready.original, "--alpha", 0.5)).code == 2
    assert run(*ready.verify_args(ready.original, "--tau", 16)).code == 2


def test_verify_draws(ready: Ready, run: Callable[..., Result], tmp_path: Path) -> None:
    plot = tmp_path / "errors.png"
    drawn = run(*ready.verify_args(ready.original, "--plot", plot))
    assert drawn.code == 1
    assert str(plot) in drawn.out
    assert plot.read_bytes().startswith(b"\x89PNG")
    quiet = run(*ready.verify_args(ready.original, "--plot", plot, "--quiet"))
    assert str(plot) not in quiet.out
    key_before = ready.key.read_bytes()
    for bad in (tmp_path / "nowhere" / "a.png", ready.key, tmp_path / "a.pdf"):
        assert run(*ready.verify_args(ready.original, "--plot", bad)).code == 2
    assert ready.key.read_bytes() == key_before
    assert names(tmp_path) == ["errors.png"]


def plain_checkpoint(ready: Ready, folder: Path, form: str) -> Path:
    """The marked weights in a file that does not say what they are."""
    tensors = load_file(ready.marked)
    path = folder / {"safetensors": "plain.safetensors"}.get(form, "plain.pth")
    if form == "safetensors":
        save_file(tensors, path)
    elif form == "torch":
        torch.save(tensors, path)
    else:
        torch.save({"state_dict": {f"module.{name}": t for name, t in tensors.items()}, "model": None}, path)
    return path


@pytest.mark.parametrize("command", ["verify", "report"])
def test_what_verify_many_opens(
    command: str, ready: Ready, run: Callable[..., Result], tmp_path: Path
) -> None:
    """A folder as transformers saves it, and a training checkpoint with two models in it."""
    tensors = load_file(ready.marked)
    folder, training = tmp_path / "folder", tmp_path / "last.ckpt"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors | {"text.weight": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "optimizer.pt").write_bytes(b"never read")
    other = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    torch.save({"state_dict": other, "state_dict_ema": tensors, "args": Payload(tmp_path / "ran")}, training)
    out = [] if command == "verify" else ["--out", tmp_path / "page.html"]
    args = ["--watermark", ready.watermark, "--key", ready.key, *out]
    for suspect, tower, identical in ((folder, "", False), (training, "state_dict_ema.", True)):
        result = run(command, suspect, *args)
        assert result.code == 0
        assert "read: " in result.out
        assert f"all under {tower!r}" in result.out or not tower
        record = run(command, suspect, *args, "--json").record()
        assert (record["decision"], record["identical"]) == ("match", identical)
        assert record["tensors"]["tower"] == tower
    assert record["towers"] == ["state_dict.", "state_dict_ema."]
    assert "state_dict.blocks.0.attn.proj.bias" in record["tensors"]["ignored"]
    assert "2 image towers: 'state_dict.', 'state_dict_ema.'" in run(command, training, *args).out
    assert not (tmp_path / "ran").exists()
    several = run("verify", tmp_path, *args[:4])
    assert several.code == 2
    assert "wanted one suspect, found" in several.err


@pytest.mark.parametrize("form", ["safetensors", "torch", "wrapped"])
def test_plain_checkpoints_take_the_watermarks_architecture(
    ready: Ready, run: Callable[..., Result], tmp_path: Path, form: str
) -> None:
    suspect = plain_checkpoint(ready, tmp_path, form)
    assert run(*ready.verify_args(suspect)).code == 0
    assert run(*ready.verify_args(suspect, "--architecture", ARCHITECTURE)).code == 0
    other = run(*ready.verify_args(suspect, "--architecture", OTHER_ARCHITECTURE))
    assert other.code == 2
    assert "model: it has width 48, the marked model 96" in other.err
    assert run(*ready.verify_args(f"{ARCHITECTURE}@{suspect}")).code == 0


def test_a_plain_checkpoint_without_any_architecture(
    ready: Ready, run: Callable[..., Result], tmp_path: Path
) -> None:
    known = Watermark.load(ready.watermark)
    fields = {name: getattr(known, name) for name in known.__dataclass_fields__ if name != "mac"}
    nameless = tmp_path / "wm.safetensors"
    Watermark.seal(Key.of(ready.key), **fields | {"architecture": None}).save(nameless)
    suspect = plain_checkpoint(ready, tmp_path, "torch")
    args = ["verify", suspect, "--watermark", nameless, "--key", ready.key]
    result = run(*args)
    assert result.code == 2
    assert "--architecture" in result.err
    assert run(*args, "--architecture", ARCHITECTURE).code == 0
    assert run("verify", ready.marked, "--watermark", nameless, "--key", ready.key).code == 0


def test_a_suspect_cannot_hide_behind_a_false_description(
    ready: Ready, run: Callable[..., Result], tmp_path: Path
) -> None:
    lying, garbled = tmp_path / "lying.safetensors", tmp_path / "garbled.safetensors"
    save_file(load_file(ready.marked), lying, metadata={"architecture": OTHER_ARCHITECTURE})
    save_file(load_file(ready.marked), garbled, metadata={"architecture": "timm:Vision?{"})
    assert run(*ready.verify_args(lying)).code == 0
    assert run(*ready.verify_args(garbled)).code == 0


def test_inconclusive_suspects(ready: Ready, run: Callable[..., Result], tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.safetensors", tmp_path / "other.safetensors"
    tensors = load_file(ready.marked)
    tensors["blocks.3.mlp.fc2.weight"][0, 0] = torch.nan
    save_file(tensors, broken, metadata={"architecture": ARCHITECTURE})
    save_model(build_model(OTHER_ARCHITECTURE), other, OTHER_ARCHITECTURE)
    for suspect, reason in (
        (broken, "blocks.3.mlp.fc2.weight"),
        (other, "(float32 (48, 3, 8, 8), wanted (96, 3, 8, 8))"),
    ):
        result = run(*ready.verify_args(suspect, "--plot", tmp_path / "unread.png", "--quiet"))
        assert result.code == 3
        assert result.out.startswith("INCONCLUSIVE: ")
        assert reason in result.out
        assert "activemark compare" not in result.out
        assert "  activemark compare ORIGINAL SUSPECT tells " in run(*ready.verify_args(suspect)).out
        record = run(*ready.verify_args(suspect, "--json")).record()
        assert record["decision"] == "inconclusive"
        assert record["p_value"] is record["detection_rate"] is None


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def test_suspects_that_cannot_be_loaded(ready: Ready, run: Callable[..., Result], tmp_path: Path) -> None:
    whole = ready.marked.read_bytes()
    cut, noise, empty = (tmp_path / f"{name}.safetensors" for name in ("cut", "noise", "empty"))
    cut.write_bytes(whole[: len(whole) // 2])
    noise.write_bytes(bytes(range(256)) * 40)
    empty.touch()
    hostile, ran = tmp_path / "hostile.pth", tmp_path / "ran"
    torch.save({"weight": torch.zeros(1), "payload": Payload(ran)}, hostile)
    assert run(*ready.verify_args(hostile)).code == 3
    for suspect in (cut, noise, empty, tmp_path, tmp_path / "missing.safetensors", ready.watermark):
        result = run(*ready.verify_args(suspect))
        assert result.code == 2, suspect
        assert str(suspect) in result.err
    assert not ran.exists()


def test_keys_and_watermarks_that_cannot_be_used(
    ready: Ready, run: Callable[..., Result], tmp_path: Path
) -> None:
    sound = ready.watermark.read_bytes()
    truncated, flipped, bad_key = tmp_path / "truncated", tmp_path / "flipped", tmp_path / "bad.key"
    truncated.write_bytes(sound[:-20])
    flipped.write_bytes(sound[:-20] + bytes([sound[-20] ^ 1]) + sound[-19:])
    bad_key.write_text(ready.key.read_text()[:-3])
    bad_key.chmod(0o600)
    for watermark, key in (
        (ready.watermark, ready.other_key),
        (ready.watermark, bad_key),
        (ready.watermark, tmp_path / "missing.key"),
        (ready.watermark, tmp_path),
        (truncated, ready.key),
        (flipped, ready.key),
        (ready.marked, ready.key),
        (tmp_path / "missing", ready.key),
    ):
        assert run("verify", ready.marked, "--watermark", watermark, "--key", key).code == 2


def test_images_from_a_folder(ready: Ready, run: Callable[..., Result], tmp_path: Path) -> None:
    from PIL import Image

    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    out.mkdir()
    stream = Key.of(ready.key).stream("test images")
    pictures = module("synthetic").synthetic_images(stream, 40, (32, 32)).permute(0, 2, 3, 1).numpy()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(images / f"{index:03}.png")
    assert run(*ready.embed_args(out, "--images", images)).code == 0
    args = ["verify", out / "out.safetensors", "--watermark", out / "wm.safetensors", "--key", ready.key]
    assert run(*args, "--images", images).code == 0
    without = run(*args)
    assert without.code == 2
    assert "images: wanted the 40 images of the embedding" in without.err
    (images / "000.png").unlink()
    assert run(*args, "--images", images).code == 2


def test_libraries_cannot_print_into_the_result(
    ready: Ready, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeper = module("bulk.sweep").Sweeper
    judge = sweeper._judge

    def noisy(*args: object) -> object:
        print("hello from a library")
        return judge(*args)

    monkeypatch.setattr(sweeper, "_judge", noisy)
    result = run(*ready.verify_args(ready.marked, "--json"))
    assert result.record()["decision"] == "match"
    assert result.err == "hello from a library\n"


# ---- demo


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module("demo"), "TUNING_IMAGES", 128)
    monkeypatch.setattr(module("demo"), "FRESH_IMAGES", 32)
    monkeypatch.setattr(module("demo"), "EPOCHS", 1)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small_demo")
def test_demo(run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, Key | None, str, object]] = []

    def once(name: str) -> Callable[..., object]:
        """The demo's function of that name; given the same weights and key it is not done again."""
        function = getattr(module("demo"), name)

        def run_once(model: nn.Module, *rest: object, **settings: object) -> object:
            key = next((argument for argument in rest if isinstance(argument, Key)), None)
            now = (name, key, fingerprint(model))
            known = [result for *of, result in made if tuple(of) == now]
            if not known:
                known = [function(model, *rest, **settings)]
                made.append((*now, known[0]))
            return known[0]

        return run_once

    for name in ("embed", "verify", "finetune"):
        monkeypatch.setattr(module("demo"), name, once(name))
    result = run("demo", "--out", "my demo")
    assert result.code == 0, result.out
    out = tmp_path / "my demo"
    models = ["finetuned", "marked", "original", "pruned", "watermark"]
    files = sorted(["demo.png", "owner.key", *(f"{name}.safetensors" for name in models)])
    assert names(out) == files
    assert names(tmp_path) == ["my demo"]
    assert (out / "owner.key").stat().st_mode & 0o777 == 0o600
    key = (out / "owner.key").read_text()
    assert key.strip() not in result.out + result.err
    table = result.out.splitlines()[2:8]
    suspects = ["marked", "marked, fine-tuned", "marked, 40% pruned"]
    suspects += ["marked by another owner", "original", "original, fine-tuned"]
    assert [line.split("  ")[0] for line in table] == suspects
    assert [" no match " in line for line in table] == [False] * 3 + [True] * 3
    advised = [shlex.split(line)[1:] for line in result.out.splitlines() if line.startswith("  activemark ")]
    assert [run(*command).code for command in advised] == [0, 0, 1]
    assert (out / "pruned.png").read_bytes().startswith(b"\x89PNG")

    (out / "demo.png").write_text("of an earlier run")
    (out / "notes.txt").write_text("mine")
    again = run("demo", "--out", out, "--json")
    assert again.code == 0
    # The owner's and the stranger's: the second run took the key of the first.
    assert Counter(name for name, *_ in made) == {"embed": 2, "verify": 6, "finetune": 2}
    record = again.record()
    assert record["as_expected"] is True
    assert [row["suspect"] for row in record["rows"]] == suspects
    assert [row["decision"] for row in record["rows"]] == [row["expected"] for row in record["rows"]]
    assert record["rows"][4]["cosine"] == pytest.approx(1.0)
    assert names(out) == sorted([*files, "notes.txt", "pruned.png"])
    assert (out / "owner.key").read_text() == key
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_demo")
def test_demo_says_where_a_verdict_is_not_as_expected(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict_of_nothing = module("verdict").Verdict(
        "no match", "no sign of the mark", torch.full((16,), 16).numpy(), 32, 5, 0.0, 0.5, 1e-6, "keyed"
    )
    rows = [module("demo").DemoRow("marked", "match", verdict_of_nothing, 0.99)]
    monkeypatch.setattr(module("demo"), "run_demo", lambda *_args, **_settings: rows)
    result = run("demo", "--quiet")
    assert result.code == 1
    assert "no match (wanted match)" in result.out
    assert "owner.key" not in result.out


@pytest.mark.usefixtures("small_demo")
def test_an_interrupted_demo_leaves_nothing(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module("demo"), "embed", interrupt)
    assert run("demo").code == 130
    assert names(tmp_path) == []
    (tmp_path / "taken").touch()
    for out in ("taken", "nowhere/demo"):
        assert run("demo", "--out", out).code == 2
    assert names(tmp_path) == ["taken"]


def test_commit_open_and_verify_with_a_commitment(
    run: Callable[..., Result], ready: Ready, tmp_path: Path
) -> None:
    published, request = tmp_path / "c.json", tmp_path / "c.tsq"
    key = ["--watermark", ready.watermark, "--key", ready.key]
    written = run("commit", *key, "--out", published, "--timestamp-request", request, "--json").record()
    assert (written["claims"], written["commitment"]) == (1, str(published))
    assert published.stat().st_mode & 0o777 == request.stat().st_mode & 0o777 == 0o644
    opened = run("open", published, *key)
    assert opened.code == 0
    assert opened.out.startswith(f"committed, signed by {written['public_key']}; by the owner's own word")
    verdict = run(*ready.verify_args(ready.marked, "--commitment", published, "--json")).record()
    assert verdict["commitment"]["committed"] is True
    assert "an owner who lies would have to try about" in verdict["evidence"]
    refused = run("commit", *key, "--out", published)
    assert refused.code == 2
    assert "--out: " in refused.err
    assert run("commit", *key, "--out", published, "--force").code == 0


def test_a_subkey_marks_and_is_opened_alone(run: Callable[..., Result], ready: Ready, tmp_path: Path) -> None:
    sub, published = tmp_path / "sub.key", tmp_path / "c.json"
    assert run("key", "derive", sub, "--key", ready.key, "--label", "court").code == 0
    assert Key.of(sub) == Key.of(ready.key).subkey("court")
    assert sub.stat().st_mode & 0o777 == 0o600
    model, watermark = tmp_path / "twice.safetensors", tmp_path / "second.safetensors"
    marking = ["--out", model, "--watermark", watermark, "--key", sub, *SETTINGS]
    assert run("embed", ready.marked, *marking).code == 0
    both = ["--watermark", ready.watermark, "--watermark", watermark]
    unknown = run("commit", *both, "--key", ready.key, "--out", published)
    assert unknown.code == 2
    assert "second.safetensors: made neither with the key nor with a sub-key" in unknown.err
    assert not published.exists()
    labelled = run("commit", *both, "--key", ready.key, "--label", "court", "--out", published, "--json")
    assert labelled.record()["claims"] == 2
    shown = ["--watermark", watermark, "--key", sub]
    assert run("open", published, *shown).code == 0
    assert run("verify", model, *shown, "--commitment", published).code == 0
    assert run(*ready.verify_args(model)).code == 0  # the first mark is still there
    single = tmp_path / "single.json"
    assert run("commit", *shown, "--out", single).code == 0
    elsewhere = run("open", single, "--watermark", ready.watermark, "--key", ready.key)
    assert (elsewhere.code, elsewhere.out.startswith("not committed")) == (1, True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--timestamp", "x.tsr"], "--timestamp: wanted with --commitment only"),
        (["--commitment", "none.json"], "none.json: "),
        (["--commitment", "c.json", "--authority", "a.pem"], "--authority: wanted with --timestamp only"),
    ],
)
def test_wrong_commitments(more: list[str], message: str, run: Callable[..., Result], ready: Ready) -> None:
    result = run(*ready.verify_args(ready.marked, *more))
    assert result.code == 2
    assert message in result.err


def test_nothing_that_is_written_or_raised_shows_a_key(
    run: Callable[..., Result], ready: Ready, tmp_path: Path
) -> None:
    """In files, errors and tracebacks, after every command that takes a key; `run` looks at the output."""
    sub, published = tmp_path / "sub.key", tmp_path / "c.json"
    run("key", "derive", sub, "--key", ready.key, "--label", "court")
    mark = ["--watermark", ready.watermark, "--key", ready.key]
    run("commit", *mark, "--out", published, "--timestamp-request", tmp_path / "c.tsq")
    run("open", published, *mark)
    plot = ["--plot", tmp_path / "plot.png"]
    run(*ready.verify_args(ready.marked, "--commitment", published, *plot))
    run(*ready.verify_args(ready.marked, "--key", ready.other_key))
    run(
        "embed",
        ready.original,
        "--out",
        tmp_path / "m.safetensors",
        "--watermark",
        tmp_path / "w.safetensors",
        "--key",
        sub,
        *SETTINGS,
    )
    keys = [Key.of(path) for path in (ready.key, ready.other_key, sub)]
    traces = []
    for key in keys[1:]:
        try:
            activemark_fast.verify(build_model(ARCHITECTURE), Watermark.load(ready.watermark), key)
        except ValueError as error:
            traces.append(
                "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
            )
    assert len(traces) == 2
    written = [p for folder in (ready.folder, tmp_path) for p in folder.rglob("*") if p.is_file()]
    assert len(written) > 9
    contents = {str(path): path.read_bytes() for path in written if path.suffix != ".key"}
    contents |= {f"traceback {index}": trace.encode() for index, trace in enumerate(traces)}
    for key in keys:
        secrets = [bytes(key._material), key.derive("commitment/key"), key.derive("commitment/signature")]
        secrets += [key.derive(f"mac/{purpose}") for purpose in ("watermark", "triggers/digest")]
        secrets += [key.derive(purpose) for purpose in ("directions", "messages/verify", "slots")]
        secrets += [key.stream("messages/verify").bytes(16), key.stream("directions").bytes(16)]
        for secret in secrets:
            forms = [secret, secret.hex().encode(), secret.hex().upper().encode(), base64.b64encode(secret)]
            forms.append(repr(secret)[2:-1].encode())
            for name, content in contents.items():
                assert not any(form in content for form in forms), name
    for path in written:
        public = path.suffix in {".json", ".tsq", ".png"}
        assert path.stat().st_mode & 0o077 == 0 or public, path


@pytest.mark.skipif(sys.platform == "win32", reason="there are no core files")
def test_a_command_that_dies_leaves_no_core_file(run: Callable[..., Result], ready: Ready) -> None:
    import resource

    run("open", ready.marked, "--watermark", ready.watermark, "--key", ready.key)
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
