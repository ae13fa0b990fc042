from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import vit
from torch import Tensor, nn

from activemark_fast.checkpoints import CheckpointError, load_model, save_model
from activemark_fast.checkpoints.mapped import map_model
from activemark_fast.cli import main
from activemark_fast.embedding import embed
from activemark_fast.giants import embed_stored, verify_stored, work_folder
from activemark_fast.key import Key
from activemark_fast.marking.scratch import Scratch, kept
from activemark_fast.verification import verify
from activemark_fast.watermark import Watermark, fingerprint

SECRET = b"the key of the giants' tests, 32"
KEY = Key(SECRET)
SHAPE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 0,
}
ARCHITECTURE = f"timm:VisionTransformer?{json.dumps(SHAPE)}"


def shards(model: nn.Module, folder: Path, count: int = 3) -> None:
    """Writes a folder of shards with their index, as transformers does."""
    folder.mkdir()
    where: dict[str, str] = {}
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        parts[number % count][name] = tensor.contiguous()
        where[name] = f"model-{number % count + 1:05d}-of-{count:05d}.safetensors"
    for number, part in enumerate(parts):
        save_file(part, folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"the same weights, unmarked")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def marked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, its files, and both marks of it: over the files, and in memory."""
    folder = tmp_path_factory.mktemp(request.param)
    model = vit(num_classes=0).to(getattr(torch, request.param))
    shards(model, folder / "model")
    spec = f"{ARCHITECTURE}@{folder / 'model'}"
    before = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    stored = embed_stored(spec, folder / "out", folder / "watermark", KEY)
    assert before == {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    return folder, stored, embed(model, KEY, architecture=ARCHITECTURE)


def test_over_its_files_a_model_gets_the_same_mark_bit_for_bit(marked: Any) -> None:
    folder, stored, usual = marked
    state = usual.model.state_dict()
    files = sorted((folder / "out").glob("*.safetensors"))
    written = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert written.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())
    assert Watermark.load(folder / "watermark").digest() == usual.watermark.digest()
    assert stored.quality == usual.quality
    assert stored.history == usual.history


def test_the_marked_folder_holds_marked_weights_only_and_nothing_is_left(marked: Any) -> None:
    folder, _, _ = marked
    assert {path.name for path in folder.iterdir()} == {"model", "out", "watermark"}
    names = {path.name for path in (folder / "model").iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in (folder / "out").iterdir()} == names
    assert {path.stat().st_mode & 0o777 for path in (folder / "out").iterdir()} == {0o600}


def test_a_verdict_over_files_is_that_on_the_model(marked: Any) -> None:
    folder, _, usual = marked
    watermark = Watermark.load(folder / "watermark")
    found = verify_stored(f"{ARCHITECTURE}@{folder / 'out'}", watermark, KEY)
    assert found.to_dict() == verify(usual.model, watermark, KEY).to_dict()
    assert found.decision == "match"
    assert found.identical
    innocent = verify_stored(f"{ARCHITECTURE}@{folder / 'model'}", watermark, KEY)
    assert innocent.decision == "no match"


def test_a_mapped_model_is_the_loaded_one_and_its_file_stays_as_it_is(tmp_path: Path) -> None:
    model = vit(num_classes=0)
    save_model(model, tmp_path / "m.safetensors", ARCHITECTURE)
    content = (tmp_path / "m.safetensors").read_bytes()
    mapped = map_model(tmp_path / "m.safetensors")
    assert mapped.architecture == ARCHITECTURE
    assert fingerprint(mapped.model) == fingerprint(load_model(tmp_path / "m.safetensors"))
    with torch.no_grad():
        mapped.model.get_parameter("blocks.1.mlp.fc2.weight")[3, 5] = 7.0
    assert (tmp_path / "m.safetensors").read_bytes() == content
    written = mapped.write(tmp_path / "out.safetensors", tmp_path / "partial")
    assert written == ["blocks.1.mlp.fc2.weight"]
    assert load_file(tmp_path / "out.safetensors")["blocks.1.mlp.fc2.weight"][3, 5] == 7.0
    os.utime(tmp_path / "m.safetensors", ns=(0, 0))
    with pytest.raises(CheckpointError, match="was changed"):
        mapped.write(tmp_path / "again.safetensors", tmp_path / "partial")


def test_what_is_not_stored_as_the_model_has_it_is_computed_for_a_suspect_alone(tmp_path: Path) -> None:
    state = vit(num_classes=0).state_dict()
    split = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            parts = tensor.chunk(3)
            names = [name.replace("qkv", f"{which}_proj") for which in "qkv"]
            split |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
        else:
            split[name] = tensor
    save_file(split, tmp_path / "m.safetensors")
    spec = f"{ARCHITECTURE}@{tmp_path / 'm.safetensors'}"
    with pytest.raises(CheckpointError, match="wanted every tensor stored as the model has it"):
        map_model(spec)
    mapped = map_model(spec, lambda tensor: kept(tensor, tmp_path))
    assert fingerprint(mapped.model) == fingerprint(load_model(spec))


def test_heads_that_are_not_stored_are_empty_and_other_forms_refused(tmp_path: Path) -> None:
    model = vit(num_classes=0)
    save_model(model, tmp_path / "m.safetensors", ARCHITECTURE)
    with_head = f"timm:VisionTransformer?{json.dumps(SHAPE | {'num_classes': 5})}"
    mapped = map_model(f"{with_head}@{tmp_path / 'm.safetensors'}")
    assert not mapped.model.get_parameter("head.weight").any()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="wanted a safetensors file"):
        map_model(f"{ARCHITECTURE}@{tmp_path / 'm.pt'}")
    with pytest.raises(CheckpointError, match="wanted weights in files"):
        map_model("timm:vit_tiny_patch16_224")


def test_marking_in_place_takes_copies_of_what_changes_alone() -> None:
    model = vit(num_classes=0)
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in model.named_parameters()}
    usual = embed(model, KEY)
    assert all(torch.equal(*pair) for pair in before.values())
    made = embed(model, KEY, inplace=True)
    assert made.model is model
    assert fingerprint(model) == fingerprint(usual.model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
    changed = {name for name, (tensor, old) in before.items() if not torch.equal(tensor, old)}
    assert 0 < len(changed) < 10
    assert all(name.endswith(("mlp.fc2.weight", "attn.proj.weight")) for name in changed)


CUT_OFF = """
import os, signal, sys
from activemark_fast.giants import embed_stored
from activemark_fast.key import Key
from activemark_fast.marking import scratch

spec, out, watermark, kill_at = sys.argv[1:]
files = 0
move = os.replace

def counted(source, target):
    global files
    move(source, target)
    files += 1
    if files == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)

scratch.os.replace = counted
embed_stored(spec, out, watermark, Key(sys.stdin.buffer.read()))
"""


def run_and_kill(folder: Path, kill_at: int) -> int:
    """Marks in a process of its own that kills itself after so many files of its work; how it ended.

    A new process, not a fork: one cannot differentiate in the fork of a process that did.
    """
    arguments = [f"{ARCHITECTURE}@{folder / 'model'}", folder / "out", folder / "watermark", kill_at]
    command = [sys.executable, "-c", CUT_OFF, *map(str, arguments)]
    return subprocess.run(command, input=SECRET, check=False).returncode


def test_a_run_that_was_killed_goes_on_to_the_same_files(tmp_path: Path) -> None:
    shards(vit(num_classes=0), tmp_path / "model")
    spec = f"{ARCHITECTURE}@{tmp_path / 'model'}"
    embed_stored(spec, tmp_path / "whole", tmp_path / "whole.watermark", KEY)
    for kill_at in (3, 4, 6):
        assert run_and_kill(tmp_path, kill_at) == -signal.SIGKILL
        assert work_folder(tmp_path / "out").is_dir()
    assert run_and_kill(tmp_path, 0) == 0
    assert not work_folder(tmp_path / "out").exists()
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "watermark").read_bytes() == (tmp_path / "whole.watermark").read_bytes()


def test_work_that_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(vit(num_classes=0), tmp_path / "model")
    spec = f"{ARCHITECTURE}@{tmp_path / 'model'}"

    def full(*_args: Any) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="no room"):
            embed_stored(spec, tmp_path / "out", tmp_path / "watermark", KEY)

    asked: list[str] = []
    made = Scratch.made

    def noted(self: Scratch, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        def unwanted() -> dict[str, Tensor]:
            asked.append(name)
            return make()

        return made(self, name, unwanted)

    monkeypatch.setattr(Scratch, "made", noted)
    with pytest.raises(ValueError, match="work: wanted the folder of an embedding with this model, key"):
        embed_stored(spec, tmp_path / "out", tmp_path / "watermark", KEY, bits=16)
    embed_stored(spec, tmp_path / "out", tmp_path / "watermark", KEY)
    assert asked == []


def test_names_that_are_taken_are_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out: wanted a name that is free"):
        embed_stored("demo", tmp_path / "out", tmp_path / "w", KEY)
    (tmp_path / "w").write_bytes(b"")
    with pytest.raises(ValueError, match="watermark: wanted a name that is free"):
        embed_stored("demo", tmp_path / "o", tmp_path / "w", KEY)
    with pytest.raises(ValueError, match="work: wanted the keyed codec"):
        embed(vit(num_classes=0), KEY, codec="learned", work=tmp_path / "work")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").write_text("mine")
    with pytest.raises(ValueError, match="work: wanted an empty folder or that of an embedding"):
        embed(vit(num_classes=0), KEY, work=tmp_path / "other")
    with pytest.raises(TypeError, match="work: wanted a path, got int"):
        embed(vit(num_classes=0), KEY, work=3)  # type: ignore[arg-type]


def test_nothing_is_put_where_it_would_be_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for watermark in (out, out / "w", work_folder(out) / "w", tmp_path / "." / "out"):
        with pytest.raises(ValueError, match="watermark: wanted a file outside of"):
            embed_stored("demo", out, watermark, KEY)
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="out: wanted a name that is free"):
        embed_stored("demo", out, tmp_path / "w", KEY)


def test_what_others_could_see_or_change_is_not_worked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="work: wanted a folder, or a name for one"):
        Scratch(tmp_path / "link", KEY, {})
    opened = tmp_path / "open"
    opened.mkdir(mode=0o777)
    Scratch(opened, KEY, {})
    assert opened.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="work: wanted a folder of your own"):
        Scratch(opened, KEY, {})


def test_damaged_work_and_a_full_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(tmp_path / "work", KEY, {})
    step = {"a": torch.arange(100.0)}
    scratch.made("step", lambda: step)
    path = tmp_path / "work" / "step.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"work: .*is damaged"):
        scratch.made("step", lambda: step)
    path.unlink()
    os.mkfifo(path)  # would be waited for
    assert torch.equal(scratch.made("step", lambda: step)["a"], step["a"])

    def full(*_args: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("activemark_fast.marking.scratch.save_file", full)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left"):
        scratch.made("next", lambda: step)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"inputs.json", "step.safetensors"}


def test_a_work_folder_is_one_embeddings_at_a_time(tmp_path: Path) -> None:
    work = tmp_path / "work"
    Scratch(work, KEY, {})
    (work / ".made-half").mkdir()
    (work / ".kept-half").write_bytes(b"")
    with Scratch(work, KEY, {}).alone():
        assert [path.name for path in work.iterdir()] == ["inputs.json"]
        (work / ".made-by-the-first").mkdir()
        second = Scratch(work, KEY, {})
        with pytest.raises(ValueError, match=r"^work: another process is at work in .*work"), second.alone():
            pass
        assert (work / ".made-by-the-first").exists()
    with second.alone():
        pass


def test_one_process_at_a_time_and_no_other_watermark_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(vit(num_classes=0), tmp_path / "m.safetensors", ARCHITECTURE)
    (tmp_path / "m.safetensors").chmod(0o644)
    out, mine = tmp_path / "out.safetensors", tmp_path / "another models watermark"
    mine.write_bytes(b"precious")
    work_folder(out).mkdir()  # as a run leaves it that was cut off
    with pytest.raises(ValueError, match="watermark: wanted a name that is free"):
        embed_stored(tmp_path / "m.safetensors", out, mine, KEY)
    assert mine.read_bytes() == b"precious"
    copy = shutil.copyfile
    said: list[str] = []

    def meanwhile(source: Path, target: Path) -> None:
        with pytest.raises(ValueError, match="work: another process") as caught:
            embed_stored(tmp_path / "m.safetensors", out, tmp_path / "w", KEY)
        said.append(str(caught.value))
        copy(source, target)
        os.utime(source, ns=(1, len(said)))

    monkeypatch.setattr(shutil, "copyfile", meanwhile)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        embed_stored(tmp_path / "m.safetensors", out, tmp_path / "w", KEY)
    assert not out.exists()
    monkeypatch.setattr(shutil, "copyfile", copy)
    embed_stored(tmp_path / "m.safetensors", out, tmp_path / "w", KEY)
    assert len(said) == 1
    assert out.stat().st_mode & 0o077 == 0


def test_tensors_that_share_bytes_are_not_marked(tmp_path: Path) -> None:
    save_model(vit(num_classes=0), tmp_path / "m.safetensors", ARCHITECTURE)
    content = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = (f"blocks.{index}.mlp.fc2.weight" for index in (2, 3))
    header[second]["data_offsets"] = header[first]["data_offsets"]
    changed = json.dumps(header).encode().ljust(length)
    (tmp_path / "m.safetensors").write_bytes(
        len(changed).to_bytes(8, "little") + changed + content[8 + length :]
    )
    with pytest.raises(CheckpointError, match="wanted tensors apart, got"):
        map_model(tmp_path / "m.safetensors")


def test_the_command_line_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    KEY.write(key)
    save_model(vit(num_classes=0), tmp_path / "m.safetensors", ARCHITECTURE)
    files = ["--watermark", str(tmp_path / "w"), "--key", str(key)]
    out = str(tmp_path / "out.safetensors")
    command = ["embed", str(tmp_path / "m.safetensors"), "--stream", "--out", out, *files]
    assert main([*command, "--codec", "learned"]) == 2
    assert "--stream: wanted without --codec" in capsys.readouterr().err
    assert main(command) == 0
    assert main(["verify", out, "--stream", "--device", "cpu", *files]) == 0
    assert "MATCH" in capsys.readouterr().out
    assert main(["verify", out, *files]) == 0
    assert main(["verify", str(tmp_path / "m.safetensors"), "--stream", *files]) == 1
    assert main(["verify", "demo", "--stream", *files]) == 2


def test_kept_tensors_are_equal_and_leave_no_file(tmp_path: Path) -> None:
    for tensor in (torch.randn(3, 5).bfloat16(), torch.zeros(0, 4), torch.tensor(2.5).double()):
        waiting = kept(tensor, tmp_path)
        assert torch.equal(waiting, tensor)
        assert waiting.dtype == tensor.dtype
        assert list(tmp_path.iterdir()) == []
