from __future__ import annotations

import copy
import importlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from activemark_fast.attacks import (
    cast,
    cut,
    noise,
    permute_inside,
    permute_residual,
    prune,
    reinitialise,
    rotate_residual,
)
from activemark_fast.attacks.matrices import reset_parameters
from activemark_fast.checkpoints import CheckpointError, save_model
from activemark_fast.commitment import Commitment, Opening
from activemark_fast.descent import ASSUMPTION, MATRICES, SHARED, Sketch, compare
from activemark_fast.descent.basis import pair_blocks
from activemark_fast.descent.exact import SMALLEST, chance_of_agreement
from activemark_fast.descent.matching import Pairs, head_likeness, nearest, rank_correlation, runners_up
from activemark_fast.descent.sketch import Index, ranked
from activemark_fast.descent.weights import Weights
from activemark_fast.key import Key
from activemark_fast.report import descent_figure

SIZES: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 48,
    "depth": 5,
    "num_heads": 3,
    "num_classes": 0,
}
ARCHITECTURE = f"timm:VisionTransformer?{json.dumps(SIZES)}"
KEY = Key(bytes(range(32)))
MODULE = importlib.import_module("activemark_fast.descent.compare")  # the package's `compare` is the function


def vit(seed: int, **more: Any) -> Any:
    """A small ViT whose norms, biases and LayerScales are not those that every model starts with."""
    torch.manual_seed(seed)
    model: Any = VisionTransformer(**(SIZES | more))
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name in ("cls_token", "pos_embed"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return vit(0)


@torch.no_grad()
def renumbered(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The same function, units and heads in a random order; nothing else is changed."""
    moved: Any = copy.deepcopy(model)
    for block in moved.blocks:
        units = torch.randperm(block.mlp.fc1.out_features, generator=generator)
        block.mlp.fc1.weight.copy_(block.mlp.fc1.weight[units])
        block.mlp.fc1.bias.copy_(block.mlp.fc1.bias[units])
        block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, units])
        heads = torch.randperm(block.attn.num_heads, generator=generator)
        rows = block.attn.qkv.weight.unflatten(0, (3, block.attn.num_heads, -1))[:, heads].flatten(0, 2)
        block.attn.qkv.weight.copy_(rows)
        columns = block.attn.proj.weight.unflatten(1, (block.attn.num_heads, -1))[:, heads].flatten(1)
        block.attn.proj.weight.copy_(columns)
    return moved


# ---- the exact distribution


def by_counting(m: int, n: int) -> dict[int, Fraction]:
    """How many of m labels agree, over all ways to number m things by n labels."""
    orders = list(itertools.permutations(range(n), m))
    counts = Counter(sum(i == j for i, j in enumerate(order)) for order in orders)
    return {count: Fraction(times, len(orders)) for count, times in counts.items()}


@pytest.mark.parametrize(
    "groups", [[(3, 3)], [(2, 4)], [(4, 4), (3, 5)], [(0, 3), (5, 5), (1, 2)], [(6, 6)], [(2, 2)] * 5]
)
def test_the_chance_is_the_share_of_all_numberings(groups: list[tuple[int, int]]) -> None:
    total = {0: Fraction(1)}
    for group in groups:
        more: dict[int, Fraction] = {}
        for (a, x), (b, y) in itertools.product(total.items(), by_counting(*group).items()):
            more[a + b] = more.get(a + b, Fraction(0)) + x * y
        total = more
    for count in range(sum(m for m, _ in groups) + 1):
        wanted = sum((share for found, share in total.items() if found >= count), Fraction(0))
        found = chance_of_agreement(groups, count)
        assert found == pytest.approx(float(wanted), rel=1e-12, abs=SMALLEST)


def test_the_chance_of_many_agreements() -> None:
    assert chance_of_agreement([(4, 4)] * 12, 48) == pytest.approx(24.0**-12)
    assert chance_of_agreement([(512, 512)] * 12, 6144) == SMALLEST
    assert chance_of_agreement([(512, 512)], 513) == SMALLEST
    assert chance_of_agreement([(512, 512)] * 12, 0) == 1
    # Fixed points of large random permutations are Poisson's, one a permutation.
    poisson = 1 - sum(12.0**k / float(np.prod(np.arange(1.0, k + 1))) for k in range(20)) * np.exp(-12)
    assert chance_of_agreement([(512, 512)] * 12, 20) == pytest.approx(poisson, rel=1e-9)
    with pytest.raises(ValueError, match=r"groups: wanted 0 <= m <= n, got m = 3 and n = 2"):
        chance_of_agreement([(3, 2)], 1)


# ---- what the p-value promises


@pytest.mark.parametrize("which", ["a", "b"])
def test_p_is_valid_for_whichever_model_is_numbered_at_random(
    which: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer units of A are looked at than there are, and some of both are dead: numbers then have gaps.
    monkeypatch.setattr(MODULE, "UNITS", 100)
    generator = torch.Generator().manual_seed(5)
    a, b = prune(model, None, 0, 0.25, scope="units"), prune(vit(1), None, 0, 0.1, scope="units")
    p_values = []
    for _ in range(60):
        first, second = (renumbered(a, generator), b) if which == "a" else (a, renumbered(b, generator))
        with Weights(first) as mine, Weights(second) as theirs, torch.no_grad():
            found = MODULE._judged(mine, theirs, "same", [(i, i, None) for i in range(5)])
        p_values.append(found.p_value)
    for bound in (0.02, 0.05, 0.1, 0.2):  # of units or heads; the other basis is not asked here
        share = 2 * bound
        allowed = 60 * share + 3 * (60 * share * (1 - share)) ** 0.5
        assert sum(p <= 4 * bound for p in p_values) <= allowed
    assert min(p_values) < 1  # some number does agree now and then


def test_agreements_of_random_numberings_have_the_distribution_that_is_claimed() -> None:
    generator = torch.Generator().manual_seed(3)
    likeness = torch.randn(20, 30, generator=generator)
    looked_at, counts = torch.arange(5, 25), []
    for _ in range(4000):
        numbers = torch.randperm(30, generator=generator)
        order = torch.randperm(30, generator=generator)
        first, second = nearest(likeness[:, order])
        pairs = Pairs(looked_at[first], numbers[order][second], looked_at, 30)
        counts.append(pairs.agreements)
    for count in (1, 2, 3):
        wanted = chance_of_agreement([pairs.groups[0]], count)
        share = sum(found >= count for found in counts) / 4000
        assert abs(share - wanted) <= 4 * (wanted / 4000) ** 0.5


def test_ties_favour_no_number(model: Any) -> None:
    # All units of a block alike: whoever breaks ties by position would find them all in place.
    alike = copy.deepcopy(model)
    with torch.no_grad():
        for block in alike.blocks:
            block.mlp.fc1.weight.copy_(block.mlp.fc1.weight[:1].expand_as(block.mlp.fc1.weight))
            block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, :1].expand_as(block.mlp.fc2.weight))
    assert compare(alike, vit(1)).p_value > 1e-3
    zero = copy.deepcopy(vit(1))
    with torch.no_grad():
        for block in zero.blocks:
            block.mlp.fc2.weight.zero_()
    found = compare(model, zero)
    assert found.units == (0, 0)
    assert found.decision == "no descent found"


def test_independent_models(model: Any) -> None:
    found = [compare(model, vit(seed)) for seed in range(1, 9)]
    assert all(descent.decision == "no descent found" for descent in found)
    assert max(descent.score for descent in found) < SHARED / 3
    assert min(descent.p_value for descent in found) > 1e-4


def test_a_forger_renumbers_an_innocent_model(model: Any) -> None:
    """p is theirs to choose, which the result says; the score is not."""
    innocent = vit(1)
    with Weights(model) as mine, Weights(innocent) as theirs, torch.no_grad():
        for index, block in enumerate(innocent.blocks):
            a, b = mine.block(index), theirs.block(index)
            rows = [torch.cat([x.reads.flatten(1), x.writes], dim=1) for x in (a, b)]
            likeness = nn.functional.normalize(rows[0]) @ nn.functional.normalize(rows[1]).T
            first, second = nearest(likeness)
            order = torch.full((len(rows[0]),), -1)
            order[first] = second
            order[order < 0] = torch.tensor(sorted(set(range(len(order))) - set(second.tolist())))
            block.mlp.fc1.weight.copy_(block.mlp.fc1.weight[order])
            block.mlp.fc1.bias.copy_(block.mlp.fc1.bias[order])
            block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, order])
    plain, forged = compare(model, vit(1)), compare(model, innocent)
    assert forged.p_value < 1e-12
    assert forged.score == pytest.approx(plain.score, abs=0.02)
    assert forged.decision == "inconclusive"
    assert "renumbered" in forged.reason
    assert "can renumber an innocent model" in " ".join(str(forged).split())
    assert "older than B" in forged.to_dict()["assumption"]


# ---- descendants, and what a thief does to them


def descends(model: nn.Module, other: nn.Module, **wanted: Any) -> Any:
    found = compare(model, other)
    assert found.decision == "descent"
    for name, value in wanted.items():
        assert getattr(found, name) == value
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda model: noise(model, None, 0, 0.3),
        lambda model: prune(model, None, 0, 0.6),
        lambda model: prune(model, None, 0, 0.5, scope="units"),
        lambda model: cast(model, None, 0, 16),
        lambda model: cut(model, None, 0, 2),
        lambda model: reinitialise(model, None, 0, 2),
    ],
    ids=["noise", "pruned", "units pruned", "bfloat16", "cut", "last blocks re-initialised"],
)
def test_descendants(change: Callable[[Any], Any], model: Any) -> None:
    found = descends(model, change(model), basis="same")
    assert found.p_value <= 1e-12
    assert "still numbered alike" in found.reason


@pytest.mark.parametrize(
    ("change", "basis"),
    [
        (lambda model: permute_inside(model, None, 0, 1), "same"),
        (lambda model: permute_residual(model, None, 0, 1), "rotated"),
        (lambda model: rotate_residual(model, None, 0, 1), "rotated"),
        (
            lambda model: noise(rotate_residual(permute_inside(model, None, 0, 1), None, 0, 1), None, 0, 0.2),
            "rotated",
        ),
    ],
    ids=["renumbered", "permuted", "rotated", "all of it and noise"],
)
def test_thieves_who_move_weights(change: Callable[[Any], Any], basis: str, model: Any) -> None:
    found = descends(model, change(model), basis=basis)
    assert len(found.shared) == 5


def test_a_rotation_does_not_hide_numbers(model: Any) -> None:
    assert compare(model, rotate_residual(model, None, 0, 1)).p_value <= 1e-12
    moved = compare(model, renumbered(model, torch.Generator().manual_seed(0)))
    assert moved.p_value > 1e-3
    assert "the p-value says nothing" in moved.reason


@torch.no_grad()
def test_mlps_that_were_replaced_leave_the_heads(model: Any) -> None:
    replaced = copy.deepcopy(model)
    for block in replaced.blocks:
        reset_parameters(block.mlp, torch.Generator().manual_seed(0))
    found = descends(model, replaced)
    assert found.heads == (15, 15)
    assert found.blocks[0].states["mlp.fc1"] == "re-initialised"
    assert found.blocks[0].states["attn.qk"] == "frozen"


@torch.no_grad()
def test_units_split_into_twins_and_decoys(model: Any) -> None:
    for decoys in (False, True):
        wide = vit(0, mlp_ratio=8.0)
        state = model.state_dict()
        for name in [name for name in state if ".mlp." in name]:
            value = state[name]
            if "fc1" in name:
                state[name] = torch.cat([value, value])
            elif "fc2.weight" in name:
                other = 1e-6 * torch.randn(value.shape) if decoys else value / 2
                state[name] = torch.cat([value if decoys else value / 2, other], dim=1)
        wide.load_state_dict(state)
        found = descends(model, wide)
        assert min(block.unit_score for block in found.blocks) >= SHARED


@torch.no_grad()
def test_blocks_put_in_front(model: Any) -> None:
    longer = copy.deepcopy(model)
    idle = copy.deepcopy(longer.blocks[0])
    for linear in (idle.attn.proj, idle.mlp.fc2):
        linear.weight.zero_()
        linear.bias.zero_()
    longer.blocks = nn.Sequential(idle, copy.deepcopy(idle), *longer.blocks)
    found = descends(model, longer, depths=(5, 7))
    assert [(block.a, block.b) for block in found.blocks] == [(i, i + 2) for i in range(5)]
    assert found.p_value <= 1e-12


def test_states_of_matrices(model: Any) -> None:
    same = compare(model, model)
    assert {state for block in same.blocks for state in block.states.values()} == {"frozen"}
    assert all(block.states.keys() == set(MATRICES) for block in same.blocks)
    assert compare(model, cast(model, None, 0, 16)).blocks[0].states["mlp.fc1"] == "frozen"
    noisy = compare(model, noise(model, None, 0, 0.1))
    assert {state for block in noisy.blocks for state in block.states.values()} == {"tuned"}
    reset = compare(model, reinitialise(model, None, 0, 1))
    assert set(reset.blocks[4].states.values()) == {"re-initialised"}
    assert reset.blocks[3].states["mlp.fc2"] == "frozen"


def test_only_the_stem_is_left(model: Any) -> None:
    found = compare(model, reinitialise(model, None, 0, 5))
    assert found.decision == "inconclusive"
    assert "patch embeddings" in found.reason


def test_heuristics_are_called_so(model: Any) -> None:
    pruned = compare(model, prune(model, None, 0, 0.4))
    assert "B was pruned (40%" in pruned.order
    assert "A is rounded to bfloat16" in compare(cast(model, None, 0, 16), model).order
    assert "heuristics, no evidence" in str(pruned)
    assert compare(model, vit(1)).order == ""


def test_too_few_blocks() -> None:
    found = compare(vit(0, depth=2), vit(0, depth=2))
    assert (found.decision, found.score) == ("inconclusive", 0)
    assert "wanted at least 3" in found.reason


# ---- parts


def test_pairs_of_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(6, 4, 32, generator=generator)
    assert pair_blocks(vectors, vectors) == [(i, i) for i in range(6)]
    assert pair_blocks(vectors, vectors[2:]) == [(i + 2, i) for i in range(4)]
    assert pair_blocks(vectors[[0, 2, 5]], vectors) == [(0, 0), (1, 2), (2, 5)]
    strange = torch.randn(5, 4, 32, generator=generator)
    assert pair_blocks(vectors, strange) == [(i, i) for i in range(5)]


def test_ranks_and_runners_up() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0, 9.0], [4.0, 3.0, 2.0, 1.0]])
    assert rank_correlation(rows, rows.exp()).tolist() == pytest.approx([1, 1])
    assert rank_correlation(rows, rows.flip(1)).tolist() == pytest.approx([-1, -1])
    likeness = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.2, 0.7]])
    assert [part.tolist() for part in nearest(likeness)] == [[0, 1], [0, 2]]
    kinship = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.0, 1.0]])
    assert runners_up(likeness, kinship).tolist() == [2, 1]


def test_what_is_mixed_within_a_head_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 8, 24, generator=generator)
    mix = torch.randn(3, 8, 8, generator=generator) + 3 * torch.eye(8)
    moved = mix @ q, torch.linalg.inv(mix).transpose(1, 2) @ k
    assert torch.allclose(head_likeness((q, k), moved).diagonal(), torch.ones(3), atol=1e-4)
    forms = torch.einsum("had,hae->hde", q, k).flatten(1)
    wanted = nn.functional.normalize(forms) @ nn.functional.normalize(forms).T
    assert torch.allclose(head_likeness((q, k), (q, k)), wanted, atol=1e-5)


# ---- checkpoints


def saved(model: nn.Module, path: Path, architecture: str = ARCHITECTURE) -> Path:
    save_model(model, path, architecture)
    return path


def test_files_and_modules_give_the_same(model: Any, tmp_path: Path) -> None:
    other = noise(model, None, 0, 0.1)
    first, second = saved(model, tmp_path / "a.safetensors"), saved(other, tmp_path / "b.safetensors")
    from_files = compare(first, second)
    assert replace(from_files, a="module", b="module") == compare(model, other)
    assert from_files.heads_known
    torch.save({"state_dict": {f"module.{k}": v for k, v in other.state_dict().items()}}, tmp_path / "b.pt")
    unknown = compare(first, tmp_path / "b.pt")
    assert (unknown.decision, unknown.heads_known) == ("descent", False)
    assert "not counted" in str(unknown)


def test_names_of_other_libraries(model: Any, tmp_path: Path) -> None:
    names = {
        "blocks.": "vision_model.encoder.layers.",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.proj": "self_attn.out_proj",
        "patch_embed.proj": "vision_model.embeddings.patch_embedding",
    }
    state = {}
    for name, value in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "attn.qkv" in name:
            for part, share in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"self_attn.{part}_proj")] = share.clone()
        else:
            state[name] = value
    state["text_model.encoder.layers.0.mlp.fc2.weight"] = torch.randn(48, 192)
    save_file(state, tmp_path / "hf.safetensors")
    descends(model, tmp_path / "hf.safetensors", depths=(5, 5), units=(5 * 192, 5 * 192))


def test_gated_mlps() -> None:
    from timm.layers import SwiGLUPacked

    gated = [vit(seed, mlp_layer=SwiGLUPacked, depth=4) for seed in (0, 1)]
    assert compare(gated[0], noise(gated[0], None, 0, 0.2)).p_value <= 1e-12
    assert compare(*gated).decision == "no descent found"
    assert compare(gated[0], vit(1, depth=4)).decision == "no descent found"


@torch.no_grad()
def test_what_cannot_be_compared(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a, b: wanted models of one width, got 48 channels .* and 96 in"):
        compare(model, vit(0, embed_dim=96))
    with pytest.raises(CheckpointError, match="neither a file nor a model string"):
        compare(model, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="found no block with an MLP"):
        compare(model, nn.Sequential(nn.Linear(3, 3)))
    broken = copy.deepcopy(model)
    broken.blocks[2].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="block 2 holds values that are not finite"):
        compare(model, broken)
    state = {name: t for name, t in model.state_dict().items() if name != "blocks.1.mlp.fc1.weight"}
    save_file(state, tmp_path / "gap.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.weight is missing"):
        compare(model, tmp_path / "gap.safetensors")
    state = model.state_dict() | {"blocks.1.mlp.fc1.weight": torch.zeros(7, 48)}
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"fc1\.weight is float32 of shape \(7, 48\)"):
        compare(model, tmp_path / "odd.safetensors")
    state = model.state_dict() | {"blocks.1.mlp.fc1.weight": torch.zeros(192, 48, dtype=torch.int8)}
    save_file(state, tmp_path / "int8.safetensors")
    with pytest.raises(CheckpointError, match="is int8 of shape"):
        compare(model, tmp_path / "int8.safetensors")
    with pytest.raises(TypeError):
        compare(model, 5)  # type: ignore[arg-type]


# ---- sketches and commitments


def test_sketches(model: Any) -> None:
    sketch = Sketch.of(model)
    assert sketch.values.shape == (5, 128)
    changed = [
        noise(model, None, 0, 0.1),
        renumbered(model, torch.Generator().manual_seed(0)),
        cut(model, None, 0, 2),
    ]
    assert min(ranked(sketch, [Sketch.of(other) for other in changed])) > 0.9
    assert max(abs(sketch.likeness(Sketch.of(vit(seed)))) for seed in range(1, 9)) < 0.5
    assert sketch.likeness(Sketch.of(vit(0, embed_dim=96))) == 0
    assert sketch.digest() == Sketch.of(copy.deepcopy(model)).digest()
    assert sketch.digest() != Sketch.of(noise(model, None, 0, 0.3)).digest()


def test_an_index_is_read_back_and_only_changed_files_are_opened(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = saved(model, tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    index = Index()
    entries = list(index.update([good, bad]))
    assert entries[0].sketch is not None
    assert entries[0].sketch.likeness(Sketch.of(model)) == pytest.approx(1)
    assert entries[1].sketch is None
    assert entries[1].error
    index.save(tmp_path / "index")
    again = Index.load(tmp_path / "index")
    opened = []
    made = Sketch.of
    monkeypatch.setattr(Sketch, "of", lambda path: opened.append(Path(path).name) or made(path))
    assert [entry.error for entry in again.update([good, bad])] == [None, entries[1].error]
    assert opened == []
    saved(vit(1), good)
    list(again.update([good, bad]))
    assert opened == ["good.safetensors"]
    for content in (b"", b"{}", bad.read_bytes(), good.read_bytes()):
        (tmp_path / "index").write_bytes(content)
        with pytest.raises(ValueError, match="wanted an index of sketches"):
            Index.load(tmp_path / "index")


def test_a_model_is_committed_to_and_opened(model: Any) -> None:
    digest, court = Sketch.of(model).digest(), KEY.subkey("court")
    commitment = Commitment.make(KEY, [], [(KEY, digest), (court, digest)])
    assert Opening.of_model(commitment, KEY, digest).committed
    assert Opening.of_model(commitment, court, digest).committed
    assert not Opening.of_model(commitment, KEY.subkey("other"), digest).committed
    assert not Opening.of_model(commitment, KEY, Sketch.of(vit(1)).digest()).committed
    assert digest.hex() not in commitment.to_bytes().decode()
    assert len(set(commitment.claims)) == 2
    with pytest.raises(ValueError, match="digest: wanted 32 bytes, got 3"):
        Commitment.make(KEY, [], [(KEY, b"abc")])


# ---- the command line


def process(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "activemark_fast", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    path = tmp_path_factory.mktemp("models")
    saved(model, path / "a.safetensors")
    (path / "candidates").mkdir()
    saved(noise(model, None, 0, 0.2), path / "candidates" / "child.safetensors")
    saved(vit(1), path / "candidates" / "stranger.safetensors")
    (path / "candidates" / "broken.safetensors").write_bytes(b"no checkpoint")
    return path


def test_compare_as_a_process(folder: Path) -> None:
    child, picture = folder / "candidates" / "child.safetensors", folder / "heat.png"
    done = process("compare", folder / "a.safetensors", child, "--out", picture)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("descent: 5 of 5 pairs of blocks share their units or heads")
    assert ASSUMPTION in " ".join(done.stdout.split())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from activemark_fast.cli import main

    stranger = folder / "candidates" / "stranger.safetensors"
    assert main(["compare", str(folder / "a.safetensors"), str(stranger), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["decision"] == "no descent found"
    assert record["score"] < record["score_wanted"]
    assert len(record["blocks"]) == 5


def test_compare_against_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from activemark_fast.cli import main

    args = ["compare", str(folder / "a.safetensors"), "--against", str(folder / "candidates")]
    for more in ([], ["--index", str(folder / "index")], ["--index", str(folder / "index")]):
        assert main([*args, *more, "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        best, other = record["candidates"]
        assert (Path(best["path"]).name, best["decision"]) == ("child.safetensors", "descent")
        assert other["decision"] == "no descent found"
        assert [Path(name).name for name in record["unread"]] == ["broken.safetensors"]
    assert main(args) == 0
    assert "child.safetensors" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["A"], "B, --against: wanted one of the two"),
        (["A", "A", "--against", "."], "B, --against: wanted one of the two"),
        (["A", "--against", ".", "--out", "x.png"], "--out: wanted with two models only"),
        (["A", "A", "--index", "x"], "--index: wanted with --against only"),
        (["A", "A", "--out", "x.jpg"], "--out: wanted a file name that ends in .png"),
        (["A", "A", "--out", "nowhere/x.png"], "--out: there is no folder nowhere"),
        (["A", "none"], "'none': neither a file nor a model string"),
        (["A", "--against", "none/*"], "suspects: nothing matches"),
        (["A", "--against", "."], "--against: wanted checkpoints, found none in ."),
    ],
)
def test_bad_input(
    args: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from activemark_fast.cli import main

    monkeypatch.chdir(tmp_path)
    args = [str(folder / "a.safetensors") if arg == "A" else arg for arg in args]
    assert main(["compare", *args]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert message in written.err


def test_commit_to_a_model_and_open_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from activemark_fast.cli import main

    KEY.write(tmp_path / "owner.key")
    published, original = str(tmp_path / "c.json"), str(folder / "a.safetensors")
    key = ["--key", str(tmp_path / "owner.key")]
    assert main(["commit", "--model", original, *key, "--label", "court", "--out", published, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["claims"] == 2
    assert main(["open", published, "--model", original, *key]) == 0
    assert capsys.readouterr().out.startswith("committed, signed by")
    assert main(["open", published, "--model", str(folder / "candidates" / "child.safetensors"), *key]) == 1
    assert capsys.readouterr().out.startswith("not committed")
    assert main(["commit", *key, "--out", str(tmp_path / "d.json")]) == 2
    assert "--watermark, --model, --register: wanted at least one of them" in capsys.readouterr().err


def test_the_picture_of_any_result(model: Any, tmp_path: Path) -> None:
    for other in (model, vit(1), cut(model, None, 0, 2), vit(0, depth=1)):
        descent_figure(compare(model, other)).savefig(tmp_path / "d.png")


def test_a_file_that_lacks_attention(model: Any, tmp_path: Path) -> None:
    saved(model, tmp_path / "a.safetensors")
    state = {k: v for k, v in load_file(tmp_path / "a.safetensors").items() if ".attn." not in k}
    save_file(state, tmp_path / "mlps.safetensors")
    found = descends(tmp_path / "a.safetensors", tmp_path / "mlps.safetensors")  # type: ignore[arg-type]
    assert found.heads == (0, 0)
    assert "-" in str(found).splitlines()[-2]
