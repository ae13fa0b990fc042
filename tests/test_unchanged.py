"""Marks and verdicts of a small fixed model, pinned: what only tidies the code must leave them as they are.

`python tests/test_unchanged.py` writes tests/fixtures/unchanged.json anew, after a change that is meant.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny import vit
from torch import Tensor, nn

from activemark_fast import Commitment, Embedding, Key, embed, verify, verify_many
from activemark_fast.attacks.symmetry import rotate_residual
from activemark_fast.runtime import resolve_autocast

FIXTURE = Path(__file__).parent / "fixtures" / "unchanged.json"
KEY = Key(b"u" * 32)


def digest(model: nn.Module) -> str:
    """Of all weights, bit for bit."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def arithmetic() -> str:
    """How this machine rounds: two that agree in it are expected to agree in marks, bit for bit."""
    with torch.no_grad(), resolve_autocast("auto", torch.device("cpu"))(torch.float32):
        features = vit().forward_features(images(64)).flatten(0, 1).double()
    solved = torch.linalg.solve(features.T @ features + torch.eye(128), features[:128].T)
    singular = torch.linalg.svdvals(solved.float())
    parts = (features, solved, torch.linalg.eigh(features.T @ features)[0], singular)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def marked(**settings: Any) -> Embedding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return embed(vit(), KEY, **({"fidelity": 0.95, "clean": images(32, 1)} | settings))


def cut(model: Any, depth: int) -> Any:
    """A model of the first `depth` blocks of `model`."""
    made = vit(seed=3, depth=depth)
    wanted = made.state_dict()
    made.load_state_dict({n: t for n, t in model.state_dict().items() if n in wanted})
    return made


def faint(model: Any, share: float) -> Any:
    """The unmarked model, moved a part of the way to the marked `model`."""
    made, target = vit(), model.state_dict()
    made.load_state_dict({n: t.lerp(target[n], share) for n, t in made.state_dict().items()})
    return made


def broken(model: Any) -> Any:
    """`model` with one weight that is no number."""
    with torch.no_grad():
        model.blocks[2].mlp.fc1.weight[0, 0] = float("nan")
    return model


def outcomes() -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Of every case its name, the verdict, and the digests that belong to it."""
    own, learned = marked(images=images(32)), marked(images=images(32), codec="learned", max_steps=2)
    keyed, traced = marked(bits=48), marked(images=images(32), recipients=["ada", "bob"])
    assert traced.register is not None
    made = {"own": own, "learned": learned, "keyed": keyed, "traced": traced}
    with tempfile.TemporaryDirectory() as folder:
        for name, embedding in made.items():
            path = Path(folder) / name
            embedding.watermark.save(path)
            facts = {"model": digest(embedding.model), "mark": hashlib.sha256(path.read_bytes()).hexdigest()}
            given = None if name == "keyed" else images(32)
            yield name, verify(embedding.model, embedding.watermark, KEY, given).to_dict(), facts
        torch.save(keyed.model.state_dict(), Path(folder) / "marked.pt")
        torch.save(vit(1).state_dict(), Path(folder) / "innocent.pt")
        torch.save(cut(keyed.model, 4).state_dict(), Path(folder) / "cut.pt")
        short = vit(1, depth=5).state_dict()
        torch.save(short, Path(folder) / "short.pt")
        files = [Path(folder) / f"{name}.pt" for name in ("marked", "innocent", "cut", "short")]
        for result in verify_many(files, keyed.watermark, KEY, model=vit(), power=0.9, in_order=True):
            assert result.verdict is not None
            yield f"swept {Path(result.suspect).name}", result.verdict.to_dict(), {}
    commitment = Commitment.make(KEY, [(KEY, own.watermark)])
    suspects: list[tuple[str, nn.Module, dict[str, Any]]] = [
        ("committed", own.model, {"commitment": commitment, "exhaustive": True, "architecture": "hf:x"}),
        ("floored", own.model, {"alpha": 1e-70}),
        ("innocent", vit(1), {}),
        ("innocent, aligned", vit(1), {"align": True}),
        ("shallower", cut(own.model, 5), {}),
        ("shallower, innocent", vit(1, depth=5), {}),
        ("wider", vit(1, embed_dim=192), {}),
        ("broken", broken(vit(1)), {}),
        ("faint", faint(own.model, 0.06), {}),
        ("rotated", rotate_residual(own.model, None, 0, 1.0), {}),
    ]
    for name, suspect, settings in suspects:
        verdict = verify(suspect, own.watermark, KEY, images(32), **settings).to_dict()
        if verdict["commitment"] is not None:
            del verdict["commitment"]["created"]
        yield name, verdict, {}
    few = marked(images=images(16), bits=16)
    verdict = verify(vit(2), few.watermark, KEY, images(16), alpha=1e-5, tau=0).to_dict()
    yield "innocent, few images", verdict, {"model": digest(few.model)}
    always = verify(learned.model, learned.watermark, KEY, images(32), tau=31)
    yield "learned, always", always.to_dict(), {}
    copy = traced.register.copy(KEY, traced.model, "ada")
    told = verify(copy, traced.watermark, KEY, images(32), register=traced.register)
    yield "copy", told.to_dict(), {"model": digest(copy)}


def table() -> dict[str, Any]:
    return {name: {"verdict": verdict, **facts} for name, verdict, facts in outcomes()}


def told(verdict: dict[str, Any]) -> tuple[Any, ...]:
    """What rounding leaves as it is, of a verdict that is clear."""
    p = verdict["p_value"]
    return (
        *(
            verdict[name]
            for name in ("decision", "codec", "bits", "tau", "aligned", "chosen", "alternatives")
        ),
        None if p is None else p < 1e-9,
    )


def test_marks_and_verdicts_are_what_they_were() -> None:
    written = json.loads(FIXTURE.read_text())
    found = json.loads(json.dumps(table()))
    same_machine = arithmetic() == written["arithmetic"]
    assert found.keys() == written["table"].keys()
    for name, row in found.items():
        assert told(row["verdict"]) == told(written["table"][name]["verdict"]), name
        if same_machine:
            assert row == written["table"][name], name


if __name__ == "__main__":
    torch.set_num_threads(1)
    FIXTURE.write_text(json.dumps({"arithmetic": arithmetic(), "table": table()}, indent=1) + "\n")
