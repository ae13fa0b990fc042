from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import vit

from activemark_fast.checkpoints import load_model, save_model
from activemark_fast.key import Key
from activemark_fast.watermark import fingerprint

ARCHITECTURE = "timm:VisionTransformer?" + json.dumps(
    {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 3}
)
NAMES = "Ada Lovelace\n\nGrace@example.org\n"


def process(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "activemark_fast", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )


class Owner:
    """A folder with a model that was marked for two recipients by the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.copies = folder / "copies"
        self.copies.mkdir()
        save_model(vit(), folder / "original.safetensors", ARCHITECTURE)
        Key(bytes(range(32))).write(folder / "owner.key")
        (folder / "names.txt").write_text(NAMES, encoding="utf-8")
        self.embedding = process(*self.embed("release"), "--json")

    def embed(self, out: str) -> list[object]:
        return [
            *("embed", self.folder / "original.safetensors", "--out", self.folder / f"{out}.safetensors"),
            *("--watermark", self.folder / "watermark.safetensors", "--key", self.folder / "owner.key"),
            *("--recipients", self.folder / "names.txt", "--copies", self.copies),
            *("--register", self.folder / "register", "--fidelity", 0.97),
        ]

    def issue(self, names: Path, *more: object) -> subprocess.CompletedProcess[str]:
        return process(
            *("issue", self.folder / "release.safetensors", "--register", self.folder / "register"),
            *("--recipients", names, "--copies", self.copies, "--key", self.folder / "owner.key", *more),
        )

    def trace(self, suspect: Path, *more: object, command: str = "trace") -> subprocess.CompletedProcess[str]:
        return process(
            *(command, suspect, "--watermark", self.folder / "watermark.safetensors"),
            *("--key", self.folder / "owner.key", "--register", self.folder / "register", *more),
        )


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    return Owner(tmp_path_factory.mktemp("owner"))


def test_embed_makes_a_copy_for_each_recipient(owner: Owner) -> None:
    assert owner.embedding.returncode == 0, owner.embedding.stderr
    record = json.loads(owner.embedding.stdout)
    assert record["copies"] == {
        name: str(owner.copies / f"{name}.safetensors") for name in ("Ada Lovelace", "Grace@example.org")
    }
    files = [Path(path) for path in record["copies"].values()]
    prints = {fingerprint(load_model(path)) for path in [*files, owner.folder / "release.safetensors"]}
    assert len(prints) == 3
    assert (owner.folder / "register").stat().st_mode & 0o777 == 0o600
    assert b"Lovelace" not in (owner.folder / "register").read_bytes()


def test_trace_names_the_recipient(owner: Owner) -> None:
    plot = owner.folder / "scores.png"
    found = owner.trace(owner.copies / "Ada Lovelace.safetensors", "--json", "--plot", plot)
    assert found.returncode == 0, found.stderr
    record = json.loads(found.stdout)
    assert record["decision"] == "match"
    assert [who["name"] for who in record["trace"]["accused"]] == ["Ada Lovelace"]
    assert record["trace"]["recipients"] == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_trace_names_nobody(owner: Owner) -> None:
    found = owner.trace(owner.folder / "release.safetensors")
    assert found.returncode == 1, found.stderr
    assert "none of 2 recipients accused" in found.stdout


def test_further_recipients_get_copies_and_are_named(owner: Owner) -> None:
    names = owner.folder / "more.txt"
    names.write_text("Hedy\nAda Lovelace\n", encoding="utf-8")
    refused = owner.issue(names)
    assert refused.returncode == 2
    assert "--copies" in refused.stderr
    assert "Ada Lovelace.safetensors exists; --force replaces it" in refused.stderr
    assert not (owner.copies / "Hedy.safetensors").exists()
    before = fingerprint(load_model(owner.copies / "Ada Lovelace.safetensors"))
    done = owner.issue(names, "--force", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["added"], record["recipients"]) == (1, 3)
    assert fingerprint(load_model(owner.copies / "Ada Lovelace.safetensors")) == before
    found = owner.trace(owner.copies / "Hedy.safetensors", "--quiet")
    assert found.returncode == 0
    assert "1 of 3 recipients accused" in found.stdout


def test_the_report_says_whose_copy_it_is(owner: Owner) -> None:
    page = owner.folder / "page.html"
    done = owner.trace(owner.copies / "Grace@example.org.safetensors", "--out", page, command="report")
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert "Whose copy it is" in text
    assert "<dt>Grace@example.org</dt>" in text
    assert "activemark trace" in text


def test_a_sweep_says_whose_copies_there_are(owner: Owner, tmp_path: Path) -> None:
    done = owner.trace(owner.copies, "--out", tmp_path / "sweep.jsonl", command="verify-many")
    assert done.returncode == 0, done.stderr
    assert ", of Ada Lovelace" in done.stdout
    assert ", of Grace@example.org" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--copies": None}, "--recipients, --copies, --register: wanted all three or none"),
        ({"--recipients": None}, "--recipients, --copies, --register: wanted all three or none"),
        ({"--copies": "nowhere"}, "--copies: there is no folder"),
        ({"--register": "watermark.safetensors"}, "--watermark, --register: wanted two files"),
        ({"--recipients": "none.txt"}, "recipients: wanted at least one name"),
        ({"--recipients": "bytes.txt"}, "--recipients: wanted names as UTF-8 text"),
        ({"--recipients": "slash.txt"}, "recipients: wanted letters"),
        ({"--recipients": "out.txt", "--copies": "."}, "--copies: .* is a file of another argument"),
    ],
)
def test_embed_refuses_before_any_work(
    owner: Owner, tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    for name, content in (
        ("names.txt", b"Ada\n"),
        ("none.txt", b"\n"),
        ("bytes.txt", b"\xff\xfe\xff"),
        ("slash.txt", b"a/b\n"),
        ("out.txt", b"out\n"),
    ):
        (tmp_path / name).write_bytes(content)
    options: dict[str, str | None] = {
        "--recipients": "names.txt",
        "--copies": ".",
        "--register": "register",
        "--out": "out.safetensors",
        "--watermark": "watermark.safetensors",
    }
    args: list[object] = ["embed", owner.folder / "original.safetensors", "--key", owner.folder / "owner.key"]
    for option, value in (options | changes).items():
        args += [] if value is None else [option, tmp_path / value]
    before = sorted(tmp_path.iterdir())
    done = process(*args)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_trace_refuses_what_is_no_register(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "register").write_bytes(b"something else")
    done = owner.trace(owner.folder / "release.safetensors", "--register", tmp_path / "register")
    assert done.returncode == 2
    assert "not a register" in done.stderr
    other = tmp_path / "other.key"
    Key(b"o" * 32).write(other)
    done = owner.issue(owner.folder / "names.txt", "--force", "--key", other)
    assert done.returncode == 2
    assert "the key it was made with" in done.stderr


def test_a_committed_recipient_is_opened_alone(owner: Owner, tmp_path: Path) -> None:
    commitment, proof = tmp_path / "commitment.json", tmp_path / "proof.json"
    key, register = ("--key", owner.folder / "owner.key"), ("--register", owner.folder / "register")
    assert process("commit", *register, *key, "--out", commitment).returncode == 0
    ada = ("--recipient", "Ada Lovelace", "--proof", proof)
    opened = process("open", commitment, *register, *ada, *key)
    assert opened.returncode == 0, opened.stderr
    assert "Grace" not in commitment.read_text() + proof.read_text()
    shown = process("open", commitment, "--recipient-proof", proof)  # without a key
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("recipient Ada Lovelace: committed")
    proof.write_text(proof.read_text().replace("Ada Lovelace", "Eve"))
    assert process("open", commitment, "--recipient-proof", proof).returncode == 1
    half = process("open", commitment, *register, *key)
    assert half.returncode == 2
    assert "--register, --recipient, --proof: wanted all three" in half.stderr


def test_nothing_that_is_written_shows_the_key(owner: Owner) -> None:
    secret = bytes(range(32))
    for path in owner.folder.rglob("*"):
        if path.is_file() and path.suffix != ".key":
            content = path.read_bytes()
            assert secret not in content, path
            assert secret.hex().encode() not in content, path
