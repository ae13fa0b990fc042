from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from tiny import vit as larger_vit
from torch import Tensor, nn

from activemark_fast import attacks
from activemark_fast.attacks import finetune, prune, quantise
from activemark_fast.attacks.overwrite import overwriting_key
from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled
from activemark_fast.embedding import embed
from activemark_fast.utility import features, probe_accuracy
from activemark_fast.verification import verify

DEPTH = 4


def vit(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
    return VisionTransformer(**(sizes | kwargs), num_classes=3).eval()


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(16, 8, DEPTH, 2, 32, 64, num_classes=3).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and ("blocks." in name or "encoder_layer_" in name)


def data(count: int = 24, dense: bool = False) -> Labelled:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.randn(count, 3, 16, 16, generator=generator) + 2 * labels[:, None, None, None]
    return Labelled(images, labels[:, None, None].repeat(1, 16, 16) if dense else labels)


# Every attack of the package as `attack(model, data, seed)`, at a strength that changes something.
ATTACKS: dict[str, Callable[[nn.Module, Labelled, int], nn.Module]] = {
    "finetune": lambda m, d, s: finetune(m, d, s, 1e-3, epochs=1, batch_size=8),
    "finetune last": lambda m, d, s: finetune(m, d, s, 1e-3, layers="last", epochs=1, batch_size=8),
    "lora": lambda m, d, s: finetune(m, d, s, 1e-2, layers="lora", epochs=1, batch_size=8),
    "from a probe": lambda m, d, s: finetune(m, d, s, 1e-3, probe_first=True, epochs=1, batch_size=8),
    "layer decay": lambda m, d, s: finetune(m, d, s, 1e-3, layer_decay=0.5, epochs=1, batch_size=8),
    "segmentation": lambda m, d, s: finetune(m, data(24, True), s, 1e-3, epochs=1, batch_size=8),
    "prune": lambda m, d, s: prune(m, d, s, 0.5),
    "prune layer": lambda m, d, s: prune(m, d, s, 0.5, scope="layer"),
    "prune heads": lambda m, d, s: prune(m, d, s, 0.5, scope="heads"),
    "prune units": lambda m, d, s: prune(m, d, s, 0.5, scope="units"),
    "fine_prune": lambda m, d, s: attacks.fine_prune(m, data(64), s, 0.5),
    "int8": lambda m, d, s: quantise(m, d, s, 8, activations=True),
    "int4": lambda m, d, s: quantise(m, d, s, 4),
    "bf16": lambda m, d, s: attacks.cast(m, d, s, 16),
    "fp8": lambda m, d, s: attacks.cast(m, d, s, 8),
    "noise": lambda m, d, s: attacks.noise(m, d, s, 0.1),
    "average": lambda m, d, s: attacks.average(m, d, s, 0.5, other=vit(1)),
    "add_task": lambda m, d, s: attacks.add_task(m, data(64), s, 1.0, other=vit(1)),
    "reinitialise": lambda m, d, s: attacks.reinitialise(m, d, s, 1),
    "cut": lambda m, d, s: attacks.cut(m, d, s, 1),
    "remove_head": lambda m, d, s: attacks.remove_head(m, d, s, 1),
    "resize": lambda m, d, s: attacks.resize(m, d, s, 1.5),
    "distil": lambda m, d, s: attacks.distil(m, d, s, 1, batch_size=8),
}
RANDOM = {
    "finetune",
    "finetune last",
    "lora",
    "segmentation",
    "fine_prune",
    "noise",
    "reinitialise",
    "distil",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_returns_a_changed_copy_of_its_seed(name: str) -> None:
    model = vit().train()
    model.get_parameter("cls_token").requires_grad_(False)
    before = state(model)
    first, again = (ATTACKS[name](model, data(), 1) for _ in range(2))
    assert same(state(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert same(state(first), state(again))
    assert not same(state(first), before)
    assert first.training
    assert not first.get_parameter("cls_token").requires_grad
    assert all(p.requires_grad for n, p in first.named_parameters() if n != "cls_token")
    assert all(p.grad is None for p in first.parameters())
    if name in RANDOM:
        assert not same(state(ATTACKS[name](model, data(), 2)), state(first))
    size = Backbone(first).image_size
    assert torch.isfinite(first(torch.zeros(1, 3, *size))).all()
    if name not in {"cut", "remove_head"}:
        fresh = vit(img_size=size[0])
        fresh.load_state_dict(first.state_dict())


@pytest.mark.parametrize("build", [vit, torchvision_vit])
@pytest.mark.parametrize("fraction", [0, 0.25, 0.6, 1.0, 1])
def test_prune_zeroes_the_smallest_weights_of_all_blocks_together(build: Any, fraction: float) -> None:
    model = build()
    before = state(model)
    after = state(prune(model, None, 0, fraction))
    matrices = [name for name, tensor in before.items() if is_block_matrix(name, tensor)]
    assert len(matrices) == 4 * DEPTH
    old = torch.cat([before[name].flatten() for name in matrices])
    new = torch.cat([after[name].flatten() for name in matrices])
    zeroed = new == 0
    assert int(zeroed.sum()) == pytest.approx(fraction * len(old), abs=1)
    assert torch.equal(new[~zeroed], old[~zeroed])
    if 0 < fraction < 1:
        assert old[zeroed].abs().max() <= old[~zeroed].abs().min()
    for name in before.keys() - set(matrices):
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("build", [vit, torchvision_vit])
def test_structured_pruning_takes_whole_heads_and_units(build: Any) -> None:
    for scope, find in (("heads", attention_out), ("units", mlp_out)):
        pruned = build()
        layers = [find(block) for block in Backbone(pruned).blocks]
        with torch.no_grad():
            layers[0].weight[:, : layers[0].in_features // 2] *= 0.1
        pruned = prune(pruned, None, 0, 0.5, scope=scope)
        for index, block in enumerate(Backbone(pruned).blocks):
            silent = (find(block).weight == 0).all(dim=0)
            assert int(silent.sum()) == len(silent) // 2
            if scope == "heads":  # two of them: one goes
                assert silent[: len(silent) // 2].unique().numel() == 1
            if index == 0:
                assert silent[: len(silent) // 2].all()


def attention_out(block: nn.Module) -> nn.Linear:
    return block.attn.proj if hasattr(block, "attn") else block.self_attention.out_proj  # type: ignore


def mlp_out(block: nn.Module) -> nn.Linear:
    return block.mlp.fc2 if hasattr(block, "attn") else block.mlp[3]  # type: ignore


def test_fine_pruning_takes_the_units_that_clean_images_leave_silent() -> None:
    model = vit()
    with torch.no_grad():
        fc1 = model.get_submodule("blocks.1.mlp.fc1")
        fc1.weight[:7] = 0  # type: ignore[index, operator]
        fc1.bias[:7] = 0  # type: ignore[index, operator]
    # No training follows at this rate, so that what is silenced stays.
    pruned = attacks.fine_prune(model, data(64), 0, 7 / 128, lr=0.0)
    silent = (pruned.get_parameter("blocks.1.mlp.fc2.weight") == 0).all(dim=0)
    assert silent.nonzero().flatten().tolist() == list(range(7))


def test_head_only_training_leaves_the_backbone_alone() -> None:
    model = vit()
    assert same(state(finetune(model, data(), 0, 1e-2, layers="head", batch_size=8)), state(model))


def test_last_trains_the_last_quarter_and_lora_every_matrix_of_the_blocks() -> None:
    model = vit()
    before = state(model)
    last = state(finetune(model, data(), 0, 1e-3, layers="last", batch_size=8))
    moved = {name for name in before if not torch.equal(last[name], before[name])}
    assert moved
    assert all(name.startswith((f"blocks.{DEPTH - 1}.", "norm.")) for name in moved)
    low_rank = state(finetune(model, data(), 0, 1e-2, layers="lora", batch_size=8))
    for name in before:
        change = low_rank[name] - before[name]
        assert bool(change.any()) == is_block_matrix(name, before[name]), name
        if change.any():
            assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 8


def test_layer_decay_slows_every_block_below_the_head() -> None:
    model, images = vit(), data()
    before = state(model)
    settings: dict[str, Any] = {"epochs": 1, "batch_size": len(images), "weight_decay": 0.0}
    tuned = state(finetune(model, images, 0, 1e-3, layer_decay=0.5, **settings))
    # The first step of Adam moves every weight that has a gradient by the learning rate.
    moved = {name: float((tuned[name] - before[name]).abs().max()) for name in before}
    assert moved["norm.weight"] == pytest.approx(1e-3, rel=0.01)
    for block in range(DEPTH):
        name = f"blocks.{block}.mlp.fc2.weight"
        assert moved[name] == pytest.approx(1e-3 * 0.5 ** (DEPTH - block), rel=0.01)
    assert moved["patch_embed.proj.weight"] == pytest.approx(1e-3 * 0.5 ** (DEPTH + 1), rel=0.01)


def test_tuning_from_a_probe_starts_with_the_task_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    entropy = nn.functional.cross_entropy

    def recorded(scores: Tensor, labels: Tensor) -> Tensor:
        losses.append(float(entropy(scores.detach(), labels)))
        return entropy(scores, labels)

    monkeypatch.setattr(nn.functional, "cross_entropy", recorded)
    for first in (False, True):
        finetune(vit(), data(64), 0, 0.0, epochs=1, batch_size=64, probe_first=first)
    assert losses[1] < losses[0] / 5


def test_finetune_learns_the_task_it_is_given() -> None:
    task = data(64)
    tuned = finetune(vit(), task, 0, 1e-3, epochs=4, batch_size=16)
    found = features(tuned, task.images)
    assert probe_accuracy(found, task.labels, found, task.labels) == 1.0
    steps: list[int] = []
    finetune(vit(), task, 0, batch_size=20, epochs=2, on_step=lambda: steps.append(1))
    assert len(steps) == 2 * 3


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantised_weights_lie_on_the_integers_grid(bits: int) -> None:
    model = vit()
    weight = model.get_parameter("blocks.2.mlp.fc1.weight").detach()
    rounded = quantise(model, None, 0, bits).get_parameter("blocks.2.mlp.fc1.weight").detach()
    rows = weight if bits == 8 else weight.reshape(-1, 32)
    largest = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(dim=1) / largest
    zero = torch.zeros(len(rows), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, -largest - 1, largest)
    torch.testing.assert_close(rounded.reshape(rows.shape), expected, rtol=1e-5, atol=1e-7)


def test_int8_activations_change_the_outputs_a_little() -> None:
    model, images = vit(), data().images
    plain, dynamic = (quantise(model, None, 0, 8, activations=choice)(images) for choice in (False, True))
    assert not torch.equal(plain, dynamic)
    torch.testing.assert_close(plain, dynamic, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(("bits", "largest_error"), [(16, 2**-8), (8, 2**-3)])
def test_casts_round_as_their_format_does(bits: int, largest_error: float) -> None:
    model = vit()
    weight = model.get_parameter("blocks.0.attn.qkv.weight").detach()
    narrow = attacks.cast(model, None, 0, bits).get_parameter("blocks.0.attn.qkv.weight").detach()
    normal = weight.abs() > weight.abs().max() / 1000
    error = ((narrow - weight).abs() / weight.abs())[normal]
    assert 0 < error.max() <= largest_error


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_average_is_the_weighted_mean(share: float) -> None:
    one, other = vit(0), vit(1)
    merged = attacks.average(one, None, 0, share, other=other)
    for found, a, b in zip(merged.parameters(), one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, (1 - share) * a + share * b, rtol=1e-5, atol=1e-6)


def test_a_task_vector_of_weight_one_on_the_model_itself_is_fine_tuning() -> None:
    model, task = vit(), data(64)
    tuned = state(finetune(model, task, 3, 1e-4, epochs=1))
    merged = state(attacks.add_task(model, task, 3, 1.0, other=model))
    for name in tuned:
        torch.testing.assert_close(merged[name], tuned[name], rtol=1e-5, atol=1e-6)


def test_cut_and_reinitialise_touch_the_last_blocks_only() -> None:
    model, images = vit(), data().images
    inner = Backbone(model).run(Backbone(model).stem(images), 0, DEPTH - 1)
    for build in (vit, torchvision_vit):
        shorter = Backbone(attacks.cut(build(), None, 0, 1))
        assert shorter.depth == DEPTH - 1
        kept = Backbone(build())
        found = shorter.run(shorter.stem(images), 0, DEPTH - 1)
        torch.testing.assert_close(found, kept.run(kept.stem(images), 0, DEPTH - 1))
    reset = Backbone(attacks.reinitialise(model, None, 0, 1))
    torch.testing.assert_close(reset.run(reset.stem(images), 0, DEPTH - 1), inner)
    new = state(reset.model)
    assert float(new[f"blocks.{DEPTH - 1}.mlp.fc1.weight"].std()) == pytest.approx(0.0176, rel=0.1)
    assert not new[f"blocks.{DEPTH - 1}.mlp.fc1.bias"].any()
    assert (new[f"blocks.{DEPTH - 1}.norm1.weight"] == 1).all()


def test_without_a_head_the_features_are_given_out() -> None:
    assert attacks.remove_head(vit(), None, 0, 1)(data().images).shape == (24, 32)


def test_a_resized_model_can_be_resized_back() -> None:
    model = vit(img_size=32)
    back = attacks.resize(attacks.resize(model, None, 0, 2), None, 0, 0.5)
    assert Backbone(back).image_size == (32, 32)
    before, after = (m.get_parameter("pos_embed").detach().flatten() for m in (model, back))
    assert torch.cosine_similarity(before, after, dim=0) > 0.9


def test_distillation_takes_over_features_and_no_weight() -> None:
    model, task = vit(), data(64)
    student = attacks.distil(model, task, 0, 30, batch_size=32)
    teacher, found = (features(m, task.images) for m in (model, student))
    assert torch.cosine_similarity(found, teacher, dim=-1).mean() > 0.9
    before, after = (state(m)["blocks.1.mlp.fc2.weight"].flatten() for m in (model, student))
    assert abs(float(torch.cosine_similarity(before, after, dim=0))) < 0.1


@pytest.mark.filterwarnings("ignore:the mark did not reach its targets:RuntimeWarning")
def test_overwriting_leaves_a_second_mark() -> None:
    model = larger_vit(depth=4)
    marked = attacks.overwrite(model, None, 7, 0.02)
    key = overwriting_key(7)
    watermark = embed(model, key, fidelity=0.98).watermark
    assert verify(marked, watermark, key).decision == "match"
    assert verify(model, watermark, key).decision == "no match"


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda m: prune(m, None, 0, -0.1), "strength: wanted 0 to 1, got -0.1"),
        (lambda m: prune(m, None, 0, float("nan")), "strength: wanted 0 to 1, got nan"),
        (lambda m: prune(m, None, 0, 0.1, scope="rows"), "scope: wanted one of global, layer, heads, units"),
        (lambda m: attacks.fine_prune(m, data(), 0, 2), "strength: wanted 0 to 1, got 2"),
        (lambda m: finetune(m, data(7), 0, batch_size=8), "data: wanted at least 8 images, got 7"),
        (lambda m: finetune(m, data(), 0, layers="first"), "layers: wanted one of head, last, all, lora"),
        (lambda m: finetune(m, data(), 0, layer_decay=0.0), "layer_decay: wanted above 0 and at most 1"),
        (lambda m: finetune(m, data(24, True), 0, probe_first=True), "probe_first: wanted one label"),
        (lambda m: attacks.distil(m, data(7), 0, 1), "data: wanted at least 64 images, got 7"),
        (lambda m: quantise(m, None, 0, 9), "strength: wanted 2 to 8 bits, got 9"),
        (lambda m: attacks.cast(m, None, 0, 4), "strength: wanted 16 or 8 bits, got 4"),
        (lambda m: attacks.noise(m, None, 0, -1), "strength: wanted 0 or more, got -1"),
        (lambda m: attacks.average(m, None, 0, 2, other=m), "strength: wanted 0 to 1, got 2"),
        (lambda m: attacks.average(m, None, 0, 1, other=vit(depth=3)), "other: wanted a model with the same"),
        (lambda m: attacks.add_task(m, data(), 0, 1, other=vit(depth=3)), "other: wanted a model with"),
        (lambda m: attacks.reinitialise(m, None, 0, 5), "strength: wanted 1 to 4 blocks, got 5"),
        (lambda m: attacks.cut(m, None, 0, 2), "strength: wanted 1 to 1 blocks, got 2"),
        (lambda m: attacks.resize(m, None, 0, 1.2), "strength: wanted a size of whole patches"),
        (lambda m: attacks.resize(torchvision_vit(), None, 0, 2), "model: wanted one of timm's"),
    ],
)
def test_errors(attack: Callable[[nn.Module], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(vit())
