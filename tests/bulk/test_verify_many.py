from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from small import KEY, Marked, save
from tiny import vit
from torch import nn

from activemark_fast import looks
from activemark_fast.bulk import JournalError, SuspectResult, find_suspects, read_journal, verify_many
from activemark_fast.bulk import sweep as sweeping
from activemark_fast.embedding import embed
from activemark_fast.verification import verify
from activemark_fast.watermark import WatermarkError


def sweep(suspects: Any, marked: Marked, **settings: Any) -> list[SuspectResult]:
    results = list(verify_many(suspects, *marked.arguments(), **({"in_order": True} | settings)))
    for result in results:
        json.dumps(result.to_dict(), allow_nan=False)
        assert [result.verdict, result.error, result.skipped].count(None) == 2
    return results


def outcome(result: SuspectResult) -> str:
    return "error" if result.verdict is None else result.verdict.decision


def noisy(model: nn.Module, seed: int, strength: float = 0.02) -> nn.Module:
    disturbed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in disturbed.parameters():
            parameter.add_(strength * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return disturbed


def pruned(model: nn.Module, share: float) -> nn.Module:
    smaller = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in smaller.parameters():
            if parameter.ndim == 2:
                parameter[parameter.abs() < parameter.abs().flatten().quantile(share)] = 0
    return smaller


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/activemark-was-here",)


def broken(marked: Marked, folder: Path) -> None:
    """Ten suspects that are broken or hostile."""
    folder.mkdir()
    whole = save(marked.model, folder / "truncated.safetensors")
    os.truncate(whole, whole.stat().st_size // 2)
    torch.save({"state_dict": Bomb()}, folder / "pickle.pth")
    torch.save(marked.model.state_dict(), folder / "cut.pt")
    os.truncate(folder / "cut.pt", 1000)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    (folder / "up").symlink_to(folder)
    (folder / "empty.bin").write_bytes(b"")
    (folder / "text.ckpt").write_text("these are no weights")
    os.mkfifo(folder / "pipe.pt")
    (folder / "huge.safetensors").write_bytes(
        (74).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[999999999999999],"data_offsets":[0,99999999]}}'
    )


def fifty(marked: Marked, folder: Path) -> Path:
    """10 that match, 30 innocents, 10 broken ones."""
    save(marked.model, folder / "match" / "0.safetensors")
    save(marked.model, folder / "match" / "1.safetensors", prefix="module.")
    save(marked.model, folder / "match" / "2.safetensors", dtype=torch.bfloat16)
    save(pruned(marked.model, 0.3), folder / "match" / "3.safetensors")
    torch.save({"state_dict": marked.model.state_dict()}, folder / "match" / "4.pth")
    for index in range(5, 10):
        save(noisy(marked.model, index), folder / "match" / f"{index}.safetensors")
    for index in range(30):
        save(
            vit(seed=100 + index % 10) if index < 10 else noisy(vit(seed=0), index),
            folder / "innocent" / f"{index}.safetensors",
        )
    broken(marked, folder / "broken")
    return folder


@pytest.fixture(scope="module")
def fifty_suspects(marked: Marked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fifty(marked, tmp_path_factory.mktemp("fifty"))


@pytest.fixture(scope="module")
def swept(marked: Marked, fifty_suspects: Path) -> list[SuspectResult]:
    """What one sweep says of them."""
    return sweep(fifty_suspects, marked)


WANTED = {"match": "match", "innocent": "no match", "broken": "error"}


def test_fifty_suspects(fifty_suspects: Path, swept: list[SuspectResult]) -> None:
    assert len(swept) == 50
    assert [r.suspect for r in swept] == [s.name for s in find_suspects(fifty_suspects)]
    for result in swept:
        assert outcome(result) == WANTED[Path(result.suspect).parent.name], result.to_dict()
    assert not os.path.exists("/tmp/activemark-was-here")
    identical = [Path(r.suspect).name for r in swept if r.verdict is not None and r.verdict.identical]
    assert identical == ["0.safetensors", "1.safetensors", "4.pth"]


def test_an_exhaustive_sweep_says_what_verify_says(marked: Marked, tmp_path: Path) -> None:
    models = [marked.model, noisy(marked.model, 3, 0.2), vit(seed=5), pruned(marked.model, 0.5)]
    paths = [save(model, tmp_path / f"{index}.safetensors") for index, model in enumerate(models)]
    results = sweep([*paths, *models], marked, power=None)
    for result, model in zip(results, [*models, *models], strict=True):
        assert result.verdict is not None
        verdict = verify(model, marked.watermark, KEY, marked.images, exhaustive=True)
        assert result.verdict.to_dict() == verdict.to_dict()
    assert [r.suspect for r in results[4:]] == [f"module {index}" for index in range(4, 8)]


def nan_weights() -> nn.Module:
    model = vit(seed=3)
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[3, 4] = float("nan")
    return model


def zeros() -> nn.Module:
    model = vit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def decoys(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with tensors beside the model's that its users' loaders pass over."""
    matrices = [n for n in state if re.fullmatch(r"blocks\.[34]\..*(fc1|fc2|proj|qkv)\.weight", n)]
    noise = {n: state[n].std() * torch.randn_like(state[n]) for n in matrices}
    if name == "other spelling":
        return {
            n.replace("fc1", "linear_fc1").replace("fc2", "linear_fc2"): t for n, t in state.items()
        } | noise
    if name == "wrapper":
        return {n.replace("blocks.", "blocks.module."): t for n, t in state.items()} | noise
    if name == "adapter":
        for n in [n for n in noise if "fc2" in n]:
            state[n.replace("weight", "lora_A.weight")] = torch.randn(4, state[n].shape[1])
            state[n.replace("weight", "lora_B.weight")] = torch.randn(state[n].shape[0], 4)
        return state
    return state | {(n.replace(".", "/") if name == "slashes" else f"{n}._data"): t for n, t in noise.items()}


@pytest.mark.parametrize(
    ("name", "decision"),
    [
        ("slashes", "match"),
        ("suffix", "match"),
        ("other spelling", "inconclusive"),
        ("wrapper", "inconclusive"),
        ("adapter", "match"),  # by the passive band
    ],
)
def test_decoys_beside_a_marked_model_do_not_clear_it(
    name: str, decision: str, marked: Marked, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    state = {n: tensor.clone() for n, tensor in marked.model.state_dict().items()}
    save_file(decoys(name, state), tmp_path / "m.safetensors")
    (result,) = sweep(tmp_path / "m.safetensors", marked)
    assert result.verdict is not None
    assert result.verdict.decision == decision


def test_an_adapter_beside_a_marked_model_does_not_clear_it(marked: Marked, tmp_path: Path) -> None:
    """Whoever loads the model's own file never sees the adapter."""
    torch.manual_seed(0)
    save(marked.model, tmp_path / "model" / "model.safetensors")
    loud = {}
    for name, tensor in marked.model.state_dict().items():
        if re.fullmatch(r"blocks\.\d\..*(fc1|fc2|proj|qkv)\.weight", name):
            place = f"base_model.model.{name.removesuffix('weight')}"
            loud[f"{place}lora_A.weight"] = torch.randn(4, tensor.shape[1])
            loud[f"{place}lora_B.weight"] = torch.randn(tensor.shape[0], 4)
    save_file(loud, tmp_path / "model" / "adapter_model.safetensors")
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "r": 4}))
    (result,) = sweep(tmp_path / "model", marked)
    assert result.verdict is not None
    assert result.verdict.decision == "match"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (nan_weights, r"NaN or infinite weights in 'blocks\.1\.mlp\.fc1\.weight'"),
        (zeros, "no token .* depends on the image"),
        (lambda: vit(embed_dim=64), "too little .* missing or of another shape: .*patch_embed"),
        (lambda: vit(depth=3), "no sign of the mark, but the suspect has 3 blocks, the marked model 6"),
        (lambda: vit(init_values=1.0), "does not quite fit the marked model: .*ls1"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), "too little"),
    ],
    ids=["nan", "zeros", "width", "blocks", "layer scale", "no vit"],
)
def test_suspects_that_cannot_be_judged(
    make: Callable[[], nn.Module], reason: str, marked: Marked, tmp_path: Path
) -> None:
    paths = [save(marked.model, tmp_path / "0.safetensors"), save(make(), tmp_path / "1.safetensors")]
    good, bad, again = sweep([*paths, save(marked.model, tmp_path / "2.safetensors")], marked)
    assert outcome(good) == outcome(again) == "match"
    assert bad.verdict is not None
    assert bad.verdict.decision == "inconclusive"
    assert re.search(reason, bad.verdict.reason), bad.verdict.reason
    assert not bad.verdict.identical


def test_innocents_of_other_mlp_widths_are_no_match(marked: Marked, tmp_path: Path) -> None:
    widths = (1, 3.5, 8)
    paths = [save(vit(seed=5, mlp_ratio=width), tmp_path / f"{width}.safetensors") for width in widths]
    for result in sweep([*paths, save(marked.model, tmp_path / "marked.safetensors")], marked):
        wanted = "match" if "marked" in result.suspect else "no match"
        assert outcome(result) == wanted, result.to_dict()


def test_a_mark_is_found_in_what_does_not_quite_fit(marked: Marked, tmp_path: Path) -> None:
    state = {n: t.contiguous() for n, t in marked.model.state_dict().items() if n != "blocks.0.mlp.fc2.bias"}
    save_file(state, tmp_path / "a.safetensors")
    (result,) = sweep(tmp_path / "a.safetensors", marked)
    assert outcome(result) == "match"
    assert result.fit is not None
    assert result.fit.missing == ("blocks.0.mlp.fc2.bias",)


def test_only_what_is_needed_is_read(marked: Marked, tmp_path: Path) -> None:
    (result,) = sweep(save(vit(num_classes=9999), tmp_path / "a.safetensors"), marked)
    needed = [n for n in vit().state_dict() if not n.startswith(("blocks.5", "norm", "head"))]
    assert result.bytes_read == sum(vit().state_dict()[n].nbytes for n in needed)
    assert result.bytes_read < result.size / 1.7


@pytest.mark.gpu
def test_a_suspect_is_copied_from_pinned_memory_before_its_turn(
    marked: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(6):
        save(marked.model if index % 2 else vit(seed=index), tmp_path / f"{index}.safetensors")
    pinned: list[bool] = []
    copy_over, judge = sweeping.Sweeper._on_device, sweeping.Sweeper._judge

    def watched_copy(self: Any, tensors: Any) -> Any:
        pinned.extend(tensor.is_pinned() for tensor in tensors.values())
        return copy_over(self, tensors)

    def watched_judge(self: Any, target: Any, chosen: Any, tensors: Any, *rest: Any) -> Any:
        assert all(tensor.device.type == "cuda" for tensor in tensors.values())
        return judge(self, target, chosen, tensors, *rest)

    monkeypatch.setattr(sweeping.Sweeper, "_on_device", watched_copy)
    monkeypatch.setattr(sweeping.Sweeper, "_judge", watched_judge)
    there = sweep(tmp_path, marked, device="cuda", precision="fp32")
    assert pinned
    assert all(pinned)
    here = ["match" if index % 2 else "no match" for index in range(6)]
    assert [outcome(result) for result in there] == here


def test_equal_prefixes_are_computed_once(
    marked: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = copy.deepcopy(marked.model)
    with torch.no_grad():
        tail.blocks[4].mlp.fc2.weight.mul_(0.9)
    models = [marked.model, vit(seed=1), tail, marked.model, noisy(marked.model, 1)]
    paths = [save(model, tmp_path / f"{index}.safetensors") for index, model in enumerate(models)]
    computed: list[Any] = []
    real = looks.site_activations

    def counting(*args: Any) -> Any:
        computed.append(args)
        return real(*args)

    monkeypatch.setattr(looks, "site_activations", counting)
    apart, needed = [], []
    for path in paths:
        computed.clear()
        apart.append(sweep(path, marked)[0].verdict)
        needed.append(len(computed))
    computed.clear()
    together = sweep(paths, marked)
    for result, alone in zip(together, apart, strict=True):
        assert result.verdict is not None
        assert alone is not None
        assert result.verdict.to_dict() == alone.to_dict()
    shared = max(needed[index] for index in (0, 2, 3))
    assert min(needed) >= 2  # how the tokens vary, and a look
    assert len(computed) == shared + needed[1] + needed[4]


def test_a_folder_as_transformers_saves_it_with_an_adapter(marked: Marked, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(vit(seed=8), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    save(marked.model, folder / "checkpoint-500" / "model.safetensors")
    (folder / "checkpoint-500" / "config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"never a suspect")
    (tmp_path / "config" / "config.json").parent.mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    without, inner, outer = sorted(sweep(tmp_path, marked), key=outcome)
    assert (outcome(without), outcome(inner), outcome(outer)) == ("error", "match", "no match")
    assert "wanted a file of weights" in str(without.error)


def test_a_configuration_that_the_watermark_names_is_chosen(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    original = transformers.ViTModel(config, add_pooling_layer=False)
    original.config.save_pretrained(tmp_path / "owners")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        made = embed(original, KEY, bits=16, fidelity=0.95, architecture=f"hf:{tmp_path / 'owners'}")
    suspect = save(made.model, tmp_path / "suspect.safetensors")
    (owners,) = verify_many(suspect, made.watermark, KEY)
    (experts,) = verify_many(suspect, made.watermark, KEY, f"hf:{tmp_path / 'owners'}")
    assert owners.verdict is not None
    assert experts.verdict is not None
    assert owners.verdict.p_value == experts.verdict.p_value
    assert owners.verdict.chosen == ("the model's configuration",)
    assert experts.verdict.chosen == ()


def test_finding(tmp_path: Path) -> None:
    for name in ("b.pt", "a.safetensors", "notes.txt", "deep/er/c.bin", ".hidden/d.ckpt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deep" / "link").symlink_to(tmp_path)
    (tmp_path / "elsewhere.txt").symlink_to(tmp_path / "notes.txt")
    names = [os.path.relpath(s.name, tmp_path) for s in find_suspects(tmp_path)]
    assert names == [".hidden/d.ckpt", "a.safetensors", "b.pt", "deep/er/c.bin", "deep/link"]
    assert [s.error is None for s in find_suspects(tmp_path)] == [True, True, True, True, False]
    assert [Path(s.name).name for s in find_suspects([str(tmp_path / "*.pt"), tmp_path / "b.pt"])] == ["b.pt"]
    assert [Path(s.name).name for s in find_suspects(str(tmp_path / "**" / "*.bin"))] == ["c.bin"]
    assert len(list(find_suspects([vit(), vit()]))) == 2
    (gone,) = find_suspects(tmp_path / "gone")
    assert gone.error is not None
    (tmp_path / "[x].pt").write_bytes(b"")  # a name that looks like a glob
    assert [Path(s.name).name for s in find_suspects(str(tmp_path / "[x].pt"))] == ["[x].pt"]
    with pytest.raises(ValueError, match="suspects: nothing matches"):
        list(find_suspects(str(tmp_path / "*.nothing")))
    for bad in (5, b"bytes", [5], None):
        with pytest.raises(TypeError, match="suspects: wanted"):
            list(find_suspects(bad))


def test_an_unreadable_folder(marked: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(marked.model, tmp_path / "a" / "0.safetensors")
    (tmp_path / "b").mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:  # root may read everything, so a mode of 0 would not do
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    first, second = sweep(tmp_path, marked)
    assert (outcome(first), second.error) == ("match", "PermissionError: Permission denied")


def test_whatever_goes_wrong_with_one_suspect_the_sweep_goes_on(
    marked: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [save(vit(seed=index), tmp_path / f"{index}.safetensors") for index in range(4)]
    real = sweeping.Sweeper._judge
    errors = iter([RuntimeError("CUDA out of memory"), MemoryError(), OSError(5, "Input/output error")])

    def judge(self: Any, *args: Any) -> Any:
        error = next(errors, None)
        if error is not None:
            raise error
        return real(self, *args)

    monkeypatch.setattr(sweeping.Sweeper, "_judge", judge)
    results = sweep(paths, marked)
    assert sorted(str(r.error) for r in results) == [
        "CUDA out of memory",
        "MemoryError",
        "None",
        "OSError: Input/output error",
    ]


def test_a_suspect_that_takes_too_long_is_given_up(marked: Marked, tmp_path: Path) -> None:
    path = save(marked.model, tmp_path / "a.safetensors")
    (slow,) = sweep(path, marked, timeout=1e-6)
    assert slow.error == "TimeoutError: took more than 1e-06 s"
    (result,) = sweep(path, marked, timeout=600)
    assert outcome(result) == "match"


def test_a_suspect_that_waits_for_another_takes_no_time() -> None:
    deadline, lock = sweeping._Deadline(0.2), threading.Lock()
    lock.acquire()
    threading.Timer(0.3, lock.release).start()
    with deadline.holding(lock):
        deadline.check()
    time.sleep(0.25)
    with pytest.raises(TimeoutError, match=r"took more than 0\.2 s"):
        deadline.check()


def test_memory_is_capped(marked: Marked, tmp_path: Path) -> None:
    paths = [save(marked.model, tmp_path / "a.safetensors"), tmp_path / "b.pt"]
    torch.save(marked.model.state_dict(), paths[1])
    for result in sweep(paths, marked, max_bytes=1_000_000):
        assert "max_bytes is 1000000" in str(result.error)


def test_the_given_model_is_left_alone(marked: Marked, tmp_path: Path) -> None:
    own = vit(seed=4).train()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    path = save(marked.model, tmp_path / "a.safetensors")
    (result,) = verify_many(path, marked.watermark, KEY, own, marked.images)
    assert outcome(result) == "match"
    assert own.training
    assert all(torch.equal(before[name], tensor) for name, tensor in own.state_dict().items())


def test_a_journal_is_resumed_after_the_sweep_was_left(
    marked: Marked, fifty_suspects: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "j.jsonl"
    running = verify_many(fifty_suspects, *marked.arguments(), journal=journal)
    first = [next(running) for _ in range(7)]
    running.close()  # type: ignore[attr-defined]
    rest = sweep(fifty_suspects, marked, journal=journal, resume=True)
    assert len(rest) == 43
    assert {r.suspect for r in first} | {r.suspect for r in rest} == {
        s.name for s in find_suspects(fifty_suspects)
    }
    assert [line["suspect"] for line in read_journal(journal)] == [r.suspect for r in [*first, *rest]]
    assert sweep(fifty_suspects, marked, journal=journal, resume=True) == []
    with pytest.raises(JournalError, match="exists"):
        verify_many(fifty_suspects, *marked.arguments(), journal=journal)
    with pytest.raises(JournalError, match="differs in alpha"):
        verify_many(fifty_suspects, *marked.arguments(), journal=journal, resume=True, alpha=1e-5)


def test_killed_at_random_moments(
    marked: Marked, fifty_suspects: Path, swept: list[SuspectResult], tmp_path: Path
) -> None:
    """kill -9, several times over, then the same results as of one sweep; nothing twice, nothing lost."""
    journal = tmp_path / "j.jsonl"
    draws = random.Random(0)
    processes = multiprocessing.get_context("fork")
    for kill in range(5):
        running = processes.Process(
            target=sweep, args=(fifty_suspects, marked), kwargs={"journal": journal, "resume": True}
        )
        running.start()
        wanted = 9_000 * kill + draws.randrange(9_000)
        while running.is_alive() and (not journal.exists() or journal.stat().st_size < wanted):
            time.sleep(draws.uniform(0, 0.01))
        running.kill()
        running.join()
        assert running.exitcode == -9
    before = len(read_journal(journal))
    assert 5 < before < 50
    rest = sweep(fifty_suspects, marked, journal=journal, resume=True)
    lines = read_journal(journal)
    assert before + len(rest) == len(lines) == len({line["suspect"] for line in lines}) == 50
    got = {line["suspect"]: line for line in lines}
    for result in swept:
        line, wanted = got[result.suspect], json.loads(json.dumps(result.to_dict()))
        assert line | {"seconds": 0} == wanted | {"seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"suspects": 5}, TypeError, "suspects: wanted"),
        ({"watermark": "x"}, TypeError, "watermark: wanted a Watermark, got str"),
        ({"key": b"o" * 32}, WatermarkError, "key: wanted the key this watermark was made with"),
        ({"model": 5}, TypeError, "model: wanted a torch.nn.Module or a model string, got int"),
        ({"model": None}, ValueError, "model: the watermark names no architecture"),
        ({"model": "timm:nonsense"}, ValueError, "'timm:nonsense' cannot be built"),
        ({"model": vit(embed_dim=64)}, ValueError, "model: it has width 64, the marked model 128"),
        ({"images": None}, ValueError, "images: wanted"),
        ({"alpha": 1}, ValueError, "alpha: wanted"),
        ({"power": 2}, ValueError, "power: wanted above 0 and at most 1, got 2"),
        ({"power": "high"}, TypeError, "power: wanted a number, got str"),
        ({"timeout": 0}, ValueError, "timeout: wanted above 0, got 0"),
        ({"timeout": "1"}, TypeError, "timeout: wanted a number, got str"),
        ({"max_bytes": 0}, ValueError, "max_bytes: wanted at least 1, got 0"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes: wanted int, got float"),
        ({"engine": "spark"}, ValueError, "engine: wanted 'local' or 'ray', got 'spark'"),
        ({"engine": 5}, TypeError, "engine: wanted 'local' or 'ray', got int"),
        ({"engine": "ray"}, TypeError, "key: wanted the path of a key file for the engine 'ray', got Key"),
    ],
)
def test_errors_name_the_argument(
    arguments: dict[str, Any], error: type[Exception], message: str, marked: Marked, tmp_path: Path
) -> None:
    journal = tmp_path / "j.jsonl"
    watermark, key, model, images = marked.arguments()
    given = {"suspects": tmp_path, "watermark": watermark, "key": key, "model": model, "images": images}
    with pytest.raises(error, match=f"^{message}"):
        list(verify_many(**(given | {"journal": journal} | arguments)))
    assert not journal.exists() or "suspects" in arguments


def test_a_suspect_of_other_width_leaves_nothing_behind(marked: Marked, tmp_path: Path) -> None:
    wide = vit(mlp_ratio=5)
    paths = [save(model, tmp_path / f"{i}.safetensors") for i, model in enumerate([wide, marked.model, wide])]
    first, match, last = sweep(paths, marked)
    assert outcome(first) == outcome(last) != "match"
    assert outcome(match) == "match"
    assert match.verdict is not None
    assert match.verdict.identical
    assert first.fit is not None
    assert first.fit.converted == {"MLP of 640 units": 15}


def test_the_best_of_several_towers_pays_for_all(marked: Marked, tmp_path: Path) -> None:
    ours, other = marked.model.state_dict(), vit(seed=9).state_dict()
    torch.save({"model": ours}, tmp_path / "alone.pt")
    torch.save({"a": other, "model": ours, "other": vit(seed=8).state_dict()}, tmp_path / "among.pt")
    alone, among = sweep([tmp_path / "alone.pt", tmp_path / "among.pt"], marked, power=None)
    assert among.towers == ("a.", "model.")  # the match ended it
    assert among.fit is not None
    assert among.fit.tower == "model."
    assert alone.verdict is not None
    assert among.verdict is not None
    assert among.verdict.identical
    assert alone.verdict.p_value is not None
    assert among.verdict.p_value == pytest.approx(3 * alone.verdict.p_value)


def livelier(model: nn.Module, seed: int) -> nn.Module:
    """With matrices as large as trained ones, for tokens to react to an injection."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                size = (0.15 if parameter.shape[0] > parameter.shape[1] else 0.05) * (parameter.std() > 0)
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def swin(seed: int) -> nn.Module:
    sizes: dict[str, Any] = {"depths": (1, 1, 5, 1), "num_heads": (1, 2, 3, 6), "window_size": 4}
    return livelier(timm.models.SwinTransformer(64, 4, embed_dim=24, num_classes=3, **sizes), seed)


def convnext(seed: int) -> nn.Module:
    model = timm.models.ConvNeXt(depths=(1, 1, 5, 1), dims=(24, 48, 96, 192), ls_init_value=1, num_classes=3)
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return livelier(model, seed)


@pytest.mark.parametrize("build", [swin, convnext], ids=["Swin", "ConvNeXt"])
def test_a_stage_of_a_hierarchical_model(build: Callable[[int], nn.Module], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        made = embed(build(0), KEY, fidelity=0.9)
    paths = [
        save(made.model, tmp_path / "marked.safetensors"),
        save(build(5), tmp_path / "other.safetensors"),
    ]
    ours, other = verify_many(paths, made.watermark, KEY, build(7), in_order=True)
    assert ours.verdict is not None
    assert other.verdict is not None
    assert (ours.verdict.decision, ours.verdict.identical) == ("match", True)
    assert other.verdict.decision == "no match", other.to_dict()
    assert ours.fit is not None
    assert (ours.fit.odd, ours.fit.doubts) == ((), ())
