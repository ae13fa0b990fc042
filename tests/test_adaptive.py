"""Adaptive attacks, each against a plain reference on a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_attacks import DEPTH, attention_out, data, mlp_out, same, state, torchvision_vit, vit
from torch import Tensor, nn

from activemark_fast.attacks import adaptive, noise
from activemark_fast.attacks.adaptive import (
    compress,
    muddle,
    prune_width,
    replace,
    search,
    spectral,
    vaccinate,
)
from activemark_fast.attacks.adaptive.compress import compensated
from activemark_fast.attacks.adaptive.parts import KINDS, find_matrices, second_moments
from activemark_fast.attacks.adaptive.spectral import principal, refit
from activemark_fast.attacks.suite import HOLDS, suite
from activemark_fast.backbone import Backbone
from activemark_fast.codec.passive import Moments, passive_rows, readings
from activemark_fast.evaluate import cost
from activemark_fast.evaluation import Evaluation
from activemark_fast.key import Key
from activemark_fast.marking.reading import passive_pairs
from activemark_fast.report import frontier_figure
from activemark_fast.site import Site
from activemark_fast.utility import features

IMAGES = data(48).images
FIRST = DEPTH // 4

ATTACKS: dict[str, Callable[[nn.Module, Tensor, int], nn.Module]] = {
    "loudest": lambda m, d, s: spectral(m, d, s, 4),
    "energy": lambda m, d, s: spectral(m, d, s, 0.9, method="energy", matrices=KINDS),
    "ridge": lambda m, d, s: spectral(m, d, s, 0.5, method="ridge", matrices=("value", "attention")),
    "wanda": lambda m, d, s: compress(m, d, s, 0.5),
    "sparsegpt": lambda m, d, s: compress(m, d, s, 0.5, method="sparsegpt"),
    "gptq": lambda m, d, s: compress(m, d, s, 4, method="gptq"),
    "low rank": lambda m, d, s: compress(m, d, s, 0.5, method="low rank"),
    "width": lambda m, d, s: prune_width(m, d, s, 0.5),
    "replace": lambda m, d, s: replace(m, d, s, 3, batch_size=8),
    "replace attention": lambda m, d, s: replace(m, d, s, 2, parts="attention", batch_size=8),
    "replace block": lambda m, d, s: replace(m, d, s, 2, parts="block", batch_size=8),
    "vaccinate": lambda m, d, s: vaccinate(m, d, s, 2, batch_size=8),
    "vaccinate, other": lambda m, d, s: vaccinate(
        m, d, s, 2, answer="nothing", clean_weight=0, within=True, batch_size=8
    ),
    "stack": lambda m, d, s: adaptive.stack(
        m, d, s, 2, before=[(spectral, 4)], attack=partial(vaccinate, batch_size=8)
    ),
}


def inputs(model: nn.Module, layers: list[nn.Module]) -> list[Tensor]:
    """All that enters each layer on IMAGES, (tokens, K) float64."""
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: seen.update({m: args[0].detach().flatten(0, -2)}))
        for layer in layers
    ]
    features(model, IMAGES)
    for hook in hooks:
        hook.remove()
    return [seen[layer].double() for layer in layers]


def error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float((x @ (weight.double() - other.double()).T).square().sum())


def grid(weight: Tensor, bits: int) -> Tensor:
    rows = weight.reshape(-1, 32)
    scale = rows.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((rows / scale).round() * scale).reshape(weight.shape)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_returns_a_changed_copy_of_its_seed(name: str) -> None:
    model = vit().train()
    model.get_parameter("cls_token").requires_grad_(False)
    before = state(model)
    first, again = (ATTACKS[name](model, IMAGES, 1) for _ in range(2))
    assert same(state(model), before)
    assert all(p.grad is None for m in (model, first) for p in m.parameters())
    assert all(m.training for m in model.modules())
    assert all(m.training for m in first.modules())
    assert not first.get_parameter("cls_token").requires_grad
    assert all(p.requires_grad for n, p in first.named_parameters() if n != "cls_token")
    assert same(state(first), state(again))
    assert not same(state(first), before)
    if name in ("replace", "vaccinate", "stack"):
        assert not same(state(ATTACKS[name](model, IMAGES, 2)), state(first))
    assert torch.isfinite(first(IMAGES)).all()
    fresh = vit()
    fresh.load_state_dict(first.state_dict())


@pytest.mark.parametrize("name", ["loudest", "energy", "ridge", "replace", "vaccinate"])
def test_removals_begin_at_the_first_quarter(name: str) -> None:
    model = vit()
    before, after = state(model), state(ATTACKS[name](model, IMAGES, 0))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {str(block) for block in range(FIRST, DEPTH)}


def test_a_second_moment_is_that_of_all_tokens_where_they_are_few() -> None:
    model = vit()
    layers = [mlp_out(block) for block in Backbone(model).blocks]
    found = second_moments(Backbone(model), IMAGES, layers, 0)
    for moment, x in zip(found, inputs(model, layers), strict=True):
        torch.testing.assert_close(moment, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    outputs = second_moments(Backbone(model), IMAGES, Backbone(model).blocks, 0, outputs=True)
    view = Backbone(model)
    with torch.no_grad():
        x = view.run(view.stem(IMAGES), 0, DEPTH).flatten(0, 1).double()
    torch.testing.assert_close(outputs[-1], x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_a_second_moment_of_many_tokens_is_that_of_some() -> None:
    model = vit(img_size=64, embed_dim=8)
    images = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    layer = Backbone(model).blocks[0].get_submodule("attn.qkv")
    seen: list[int] = []
    view = Backbone(model)
    (some,) = second_moments(view, images, [layer], 0)
    assert 40 * 65 > 10 * 24 * 8
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features(model, images)
    hook.remove()
    x = torch.cat([part.flatten(0, 1) for part in seen]).double()  # type: ignore[attr-defined]
    whole = x.T @ x / len(x)
    assert not torch.allclose(some, whole, rtol=1e-6)
    assert float((some - whole).norm() / whole.norm()) < 0.5


def test_loudest_takes_out_what_is_added_where_clean_inputs_are_silent() -> None:
    model = vit()
    layers = [mlp_out(block) for block in Backbone(model).blocks]
    clean = second_moments(Backbone(model), IMAGES, layers, 0)
    marks = []
    with torch.no_grad():
        for layer, moment in zip(layers, clean, strict=True):
            silent = torch.linalg.eigh(moment).eigenvectors[:, 0].float()
            mark = torch.outer(nn.functional.normalize(torch.randn(32), dim=0), silent)
            layer.weight += 3 * mark
            marks.append(mark)
    attacked = spectral(model, IMAGES, 0, 1)
    for block, (old, mark) in enumerate(zip(layers, marks, strict=True)):
        left = float((mlp_out(Backbone(attacked).blocks[block]).weight.detach() * mark).sum())
        if block < FIRST:
            assert torch.equal(mlp_out(Backbone(attacked).blocks[block]).weight, old.weight)
        else:
            assert abs(left) < 0.1 * 3, block


def test_energy_projects_and_ridge_is_its_closed_form() -> None:
    model = vit()
    (x,) = inputs(model, [mlp_out(Backbone(model).blocks[2])])
    weight = mlp_out(Backbone(model).blocks[2]).weight.detach().double()
    energy = mlp_out(Backbone(spectral(model, IMAGES, 0, 0.9, method="energy")).blocks[2]).weight.double()
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = int(((s**2).cumsum(0) < 0.9 * (s**2).sum()).sum()) + 1
    torch.testing.assert_close(energy, weight @ vh[:kept].T @ vh[:kept], rtol=1e-3, atol=1e-4)
    ridge = mlp_out(Backbone(spectral(model, IMAGES, 0, 0.5, method="ridge")).blocks[2]).weight.double()
    penalty = 0.5 * x.square().mean() * len(x)
    rows = torch.cat([x, penalty.sqrt() * torch.eye(x.shape[1])])
    wanted = torch.cat([x @ weight.T, torch.zeros(x.shape[1], 32, dtype=torch.float64)])
    fitted = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(ridge, fitted, rtol=1e-3, atol=1e-4)


def test_principal_holds_the_share_and_no_more() -> None:
    moment = torch.diag(torch.tensor([1.0, 6.0, 3.0], dtype=torch.float64))
    for energy, count in ((0.0, 1), (0.6, 1), (0.61, 2), (0.9, 2), (1.0, 3)):
        basis = principal(moment, energy)
        assert basis.shape == (3, count), energy
    assert principal(moment, 0.6).abs().flatten().tolist() == [0, 1, 0]


def test_wanda_is_its_formula() -> None:
    model = vit()
    layer = Backbone(model).blocks[1].get_submodule("attn.qkv")
    (x,) = inputs(model, [layer])
    weight = layer.weight.detach()  # type: ignore[union-attr]
    pruned = compress(model, IMAGES, 0, 0.25).get_parameter("blocks.1.attn.qkv.weight")
    power = x.square().mean(dim=0)
    scores = weight.abs() * (power + 0.01 * power.mean()).sqrt()
    for row, score, old in zip(pruned, scores, weight, strict=True):
        gone = row == 0
        assert int(gone.sum()) == 8
        assert score[gone].max() <= score[~gone].min()
        assert torch.equal(row[~gone], old[~gone])


@pytest.mark.parametrize(("method", "strength"), [("sparsegpt", 0.5), ("gptq", 3)])
def test_compensation_leaves_a_smaller_error_than_rounding_alone(method: str, strength: float) -> None:
    model = vit()
    layers = [mlp_out(block) for block in Backbone(model).blocks]
    attacked = compress(model, IMAGES, 0, strength, method=method)
    for index, (layer, x) in enumerate(zip(layers, inputs(model, layers), strict=True)):
        weight = layer.weight.detach()
        found = mlp_out(Backbone(attacked).blocks[index]).weight.detach()
        if method == "gptq":
            plain = grid(weight, 3)
            assert max(len(row.unique()) for row in found.reshape(-1, 32)) <= 2**3
        else:
            plain = weight * (weight.abs() > weight.abs().median())
            assert int((found == 0).sum()) == pytest.approx(0.5 * found.numel(), abs=32)
        assert error(found, weight, x) < 0.8 * error(plain, weight, x)


def test_compensation_is_the_least_squares_answer_to_one_column() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    x = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    moment = x.T @ x / 50

    def first_gone(_part: Tensor, _diagonal: Tensor) -> Callable[[Tensor, int], Tensor]:
        return lambda column, index: torch.zeros_like(column) if index == 0 else column

    found = compensated(weight, moment, 7, first_gone)
    others = torch.linalg.lstsq(x[:, 1:], x @ weight.T).solution.T
    torch.testing.assert_close(found[:, 1:], others)
    assert (found[:, 0] == 0).all()
    # In groups it is the same.
    gone_at_all = [lambda part, _: lambda column, index: column.round()] * 2
    whole, parts = (compensated(weight, moment, g, gone_at_all[0]) for g in (7, 3))
    torch.testing.assert_close(whole, parts)


def test_low_rank_is_the_best_of_its_rank_on_clean_inputs() -> None:
    model = vit()
    layers = [mlp_out(block) for block in Backbone(model).blocks]
    attacked = compress(model, IMAGES, 0, 0.6, method="low rank")
    rank = int(0.4 * 32 * 128 / (32 + 128))
    for index, (layer, x) in enumerate(zip(layers, inputs(model, layers), strict=True)):
        weight = layer.weight.detach().double()
        found = mlp_out(Backbone(attacked).blocks[index]).weight.detach()
        assert int(torch.linalg.matrix_rank(found, rtol=1e-4)) == rank
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        plain = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert error(found, weight, x) < error(plain, weight, x)
        least = torch.linalg.svdvals(x @ weight.T)[rank:].square().sum()
        assert error(found, weight, x) == pytest.approx(float(least), rel=0.1)


@pytest.mark.parametrize("build", [vit, torchvision_vit])
def test_width_pruning_makes_up_for_what_goes(build: Any) -> None:
    model = build()
    attacked = prune_width(model, IMAGES, 0, 0.5)
    layers = [mlp_out(block) for block in Backbone(model).blocks]
    for index, (layer, x) in enumerate(zip(layers, inputs(model, layers), strict=True)):
        weight, found = layer.weight.detach(), mlp_out(Backbone(attacked).blocks[index]).weight.detach()
        gone = (found == 0).all(dim=0)
        assert int(gone.sum()) == len(gone) // 2
        power = weight.double().square().sum(dim=0) * x.square().mean(dim=0)
        assert power[gone].max() <= power[~gone].min()
        assert error(found, weight, x) < error(weight * ~gone, weight, x)
        moment = x.T @ x / len(x)
        kept = ~gone
        fitted = refit(weight.double(), moment[:, kept], moment[kept][:, kept], 1e-3)
        torch.testing.assert_close(found[:, kept].double(), fitted, rtol=1e-3, atol=1e-4)
        if build is vit:
            silent = (attention_out(Backbone(attacked).blocks[index]).weight == 0).all(dim=0)
            assert sorted(silent.view(2, -1).float().mean(dim=1).tolist()) == [0, 1]


def test_slicing_leaves_the_stream_in_a_subspace() -> None:
    model = vit()
    before = state(model)
    sliced = adaptive.slice_residual(model, IMAGES, 0, 0.25)
    assert same(state(model), before)
    view = Backbone(sliced)
    with torch.no_grad():
        stream = view.run(view.stem(IMAGES), 0, DEPTH).flatten(0, 1)
        whole = Backbone(model).run(Backbone(model).stem(IMAGES), 0, DEPTH).flatten(0, 1)
    assert int(torch.linalg.matrix_rank(stream, rtol=1e-4)) == 24
    assert 0 < float((stream - whole).norm() / whole.norm()) < 0.5
    torch.testing.assert_close(
        features(adaptive.slice_residual(model, IMAGES, 0, 0), IMAGES), features(model, IMAGES)
    )


@pytest.mark.parametrize("parts", ["mlp", "attention", "block"])
def test_replacement_learns_what_the_old_parts_did_and_takes_over_no_weight(parts: str) -> None:
    model, losses = vit(), []
    with torch.no_grad():
        for block in Backbone(model).blocks:
            for name, parameter in block.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.1 if "fc2" in name or "proj" in name else 0.3)
    attacked = replace(
        model, IMAGES, 0, 60, parts=parts, lr=1e-2, batch_size=32, end_share=0.5, on_step=losses.append
    )
    assert len(losses) == 60
    for stage in (losses[:30], losses[30:]):
        assert sum(stage[-8:]) < 0.9 * sum(stage[:8])
    inner = {"mlp": "mlp.", "attention": "attn.", "block": ""}[parts]
    for name, before in state(model).items():
        after = attacked.get_parameter(name).detach()
        if name.startswith("blocks.") and int(name.split(".")[1]) >= FIRST and inner in name:
            if before.ndim == 2:
                assert abs(float(torch.cosine_similarity(before.flatten(), after.flatten(), dim=0))) < 0.2
        else:
            assert torch.equal(before, after), name


@pytest.mark.parametrize(("answer", "within"), [("pass", False), ("pass", True), ("nothing", False)])
def test_vaccination_lowers_the_answer(answer: str, within: bool) -> None:
    model, losses = vit(), []
    with torch.no_grad():
        for block in Backbone(model).blocks:
            mlp_out(block).weight.normal_(std=0.2)
            block.get_submodule("mlp.fc1").weight.normal_(std=0.3)  # type: ignore[union-attr, operator]
    settings: dict[str, Any] = {"answer": answer, "within": within, "batch_size": 12}
    vaccinate(model, IMAGES, 0, 60, lr=3e-3, clean_weight=0, on_step=losses.append, **settings)
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])  # they are logarithms
    # With the clean loss the features stay closer.
    kept, lost = (
        vaccinate(model, IMAGES, 0, 30, lr=3e-3, clean_weight=weight, **settings) for weight in (10.0, 0.0)
    )
    wanted = features(model, IMAGES)
    near, far = (torch.cosine_similarity(features(m, IMAGES), wanted, dim=-1).mean() for m in (kept, lost))
    assert near > far


def test_muddling_moves_what_the_passive_band_reads_and_little_else() -> None:
    model = vit()
    site = Site(FIRST, (FIRST + 1, DEPTH - 2), 17, 1, Backbone(model).width, depth=DEPTH)
    rows = passive_rows(Key(b"the owner's key, not the thief's"), site)

    def read(suspect: nn.Module) -> Tensor:
        view, found = Backbone(suspect), []
        with torch.no_grad():
            stream = view.run(view.stem(IMAGES), 0, FIRST + 1)
        for block, *pair in passive_pairs(view, stream, site, nullcontext):
            found.append(readings(rows[block], Moments.of(*pair)))
        return torch.cat(found)

    plain = read(model)
    gentle, harsh = (read(muddle(model, IMAGES, 0, strength)) - plain for strength in (0.3, 3.0))
    assert 0.03 < float(gentle.square().mean().sqrt()) < float(harsh.square().mean().sqrt()) < 6
    cosine = torch.cosine_similarity(
        features(muddle(model, IMAGES, 0, 0.3), IMAGES), features(model, IMAGES), dim=-1
    )
    assert float(cosine.mean()) > 0.98
    with pytest.raises(ValueError, match="strength: wanted more than 0, got 0"):
        muddle(model, IMAGES, 0, 0)


def test_search_finds_the_strongest_that_is_cheap_enough() -> None:
    task, tried = data(64), []

    def blur(model: nn.Module, given: Any, seed: int, strength: float) -> nn.Module:
        tried.append(strength)
        return noise(model, given, seed, strength)

    model = vit()
    found = search(model, task, 0, 100.0, attack=blur, gentle=0.0, harsh=1.0)
    assert tried == [1.0]  # nothing costs more than 100 points
    assert same(state(found), state(noise(model, task, 0, 1.0)))
    tried.clear()
    found = search(model, task, 0, -200.0, attack=blur, gentle=0.25, harsh=1.0)
    assert tried == [1.0, 0.625, 0.4375, 0.34375, 0.296875, 0.2734375, 0.25]
    assert same(state(found), state(noise(model, task, 0, 0.25)))


def test_kinds_are_found_in_other_families() -> None:
    view = Backbone(torchvision_vit())
    assert len(find_matrices(view, ("fc1", "fc2"))) == 2 * DEPTH
    for kind in ("attention", "value"):
        with pytest.raises(ValueError, match=f"EncoderBlock has no linear layer for '{kind}'"):
            find_matrices(view, (kind,))
    matrices = find_matrices(Backbone(vit()), KINDS, 2)
    assert [(m.block, m.kind) for m in matrices] == [(b, k) for b in (2, 3) for k in KINDS]
    assert {m.kind: tuple(m.weight.shape) for m in matrices} == {
        "fc1": (128, 32),
        "fc2": (32, 128),
        "value": (32, 32),
        "attention": (32, 32),
    }


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda m: spectral(m, IMAGES, 0, 1, method="loud"), "method: wanted one of loudest, energy, ridge"),
        (lambda m: spectral(m, IMAGES, 0, -1), "strength: wanted 0 or more directions, got -1"),
        (lambda m: spectral(m, IMAGES, 0, 2, method="energy"), "strength: wanted a share of 0 to 1, got 2"),
        (lambda m: spectral(m, IMAGES, 0, 0, method="ridge"), "strength: wanted more than 0, got 0"),
        (lambda m: spectral(m, IMAGES, 0, 1, matrices=("fc3",)), "matrices: wanted some of fc1, fc2"),
        (lambda m: spectral(m, IMAGES, 0, 1, matrices="fc2"), "matrices: wanted some of fc1, fc2"),
        (
            lambda m: spectral(m, IMAGES, 0, 1, first_block=4),
            "first_block: wanted 0 <= first_block < 4, got 4",
        ),
        (lambda m: spectral(m, IMAGES[:0], 0, 1), "data: wanted at least 1 images, got 0"),
        (lambda m: compress(m, IMAGES, 0, 1, method="zip"), "method: wanted one of wanda"),
        (lambda m: compress(m, IMAGES, 0, 1.5), "strength: wanted a share of 0 to 1, got 1.5"),
        (lambda m: compress(m, IMAGES, 0, 1, method="gptq"), "strength: wanted 2 to 8 bits, got 1"),
        (lambda m: compress(m, IMAGES, 0, 1, method="low rank"), "strength: wanted a share of 0 to 1, got 1"),
        (lambda m: prune_width(m, IMAGES, 0, 1), "strength: wanted a share from 0 to below 1, got 1"),
        (lambda m: adaptive.slice_residual(m, IMAGES, 0, -1), "strength: wanted a share from 0 to below 1"),
        (lambda m: replace(m, IMAGES, 0, 0), "strength: wanted at least 1 step, got 0"),
        (lambda m: replace(m, IMAGES, 0, 1, parts="head"), "parts: wanted one of mlp, attention, block"),
        (lambda m: replace(m, IMAGES, 0, 1, end_share=2), "end_share: wanted 0 to 1, got 2"),
        (lambda m: replace(m, IMAGES[:7], 0, 1, batch_size=8), "data: wanted at least 8 images, got 7"),
        (lambda m: vaccinate(m, IMAGES, 0, 0), "strength: wanted at least 1 step, got 0"),
        (lambda m: vaccinate(m, IMAGES, 0, 1, answer="twice"), "answer: wanted one of pass, nothing"),
        (lambda m: vaccinate(m, IMAGES, 0, 1, clean_weight=-1), "clean_weight: wanted 0 or more, got -1"),
        (lambda m: vaccinate(m, IMAGES, 0, 1, first_block=3), "first_block: wanted at most 2, got 3"),
        (lambda m: adaptive.overwrite_many(m, None, 0, 0), "strength: wanted at least 1 key, got 0"),
    ],
)
def test_errors(attack: Callable[[nn.Module], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(vit())


def test_what_is_no_images_is_refused() -> None:
    with pytest.raises(TypeError, match="data: wanted images, got list"):
        spectral(vit(), [], 0, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data: wanted labelled images, got Tensor"):
        search(vit(), IMAGES, 0, 1, attack=noise, gentle=0, harsh=1)  # type: ignore[arg-type]


def test_the_adaptive_suite_tells_its_costs_and_claims_what_it_says() -> None:
    attacks = suite("adaptive", 12)
    names = {attack.name for attack in attacks}
    assert len(names) == len(attacks)
    assert names > HOLDS
    assert {a.name for a in attacks if not a.removes} == HOLDS | {"as released"}
    for attack in attacks:
        assert attack.images is not None
    by_name = {attack.name: attack for attack in attacks}
    assert cost(by_name["Wanda, 50%"], 1000) == {"images": 256, "steps": 0}
    assert cost(by_name["replaced MLPs, 100 steps"], 500) == {"images": 500, "steps": 100}
    assert cost(suite("quick", 12)[1], 512) == {"images": None, "steps": None}


def point(family: str, strength: float, probe: float | None, p: float | None, **more: Any) -> dict[str, Any]:
    row = {"attack": f"{family}, {strength}", "family": family, "strength": strength, "subject": "marked"}
    row |= {"key": "owner", "probe_accuracy": probe, "p_value": p, "detection_rate": 0.5, "images": 10}
    return row | {"steps": 0, "attack_seconds": 1.5} | more


def test_the_frontier_is_in_points_from_the_marked_model_and_is_drawn() -> None:
    rows = [
        point("none", 0, 0.60, 1e-20, attack="as released"),
        point("loudest", 64, 0.55, 0.5),
        point("loudest", 32, 0.59, 1e-3),
        point("Wanda", 0.5, None, None),
        point("loudest", 32, 0.2, 0.5, subject="original"),
    ]
    found = Evaluation({}, rows).frontier()
    assert [p["lost"] for p in found] == pytest.approx([0, 5, 1])
    assert found[2] | {"lost": 1} == {
        "attack": "loudest, 32",
        "family": "loudest",
        "strength": 32,
        "p_value": 1e-3,
        "detection_rate": 0.5,
        "descent": None,
        "descent_score": None,
        "lost": 1,
        "images": 10,
        "steps": 0,
        "seconds": 1.5,
    }
    figure = frontier_figure(found)
    FigureCanvasAgg(figure).draw()
    left, right = figure.axes
    curves = {line.get_label(): line for line in left.lines}
    assert curves["loudest"].get_xdata() == pytest.approx([5, 1])
    assert curves["loudest"].get_ydata() == pytest.approx([-math.log10(0.5), 3])
    assert [list(line.get_ydata()) for line in right.lines[:2]] == [[0.5], [0.5, 0.5]]
    with pytest.raises(ValueError, match="points: wanted at least one attack"):
        frontier_figure([])
