from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny import vit
from torch import Tensor, nn

from activemark_fast.baselines import Classifier, Cost, adv_tra, ipguard, reference_recipe
from activemark_fast.marking.suffix import read_mark, site_activations

KEY = b"k" * 32
CLASSES = 4


def small(seed: int = 0, **kwargs: Any) -> Any:
    return vit(seed, **({"embed_dim": 64, "depth": 4} | kwargs))


def images(count: int = 24, seed: int = 0) -> Tensor:
    pixels = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return (255 * pixels).to(torch.uint8)


def classifier(seed: int = 0) -> Classifier:
    """A head on random features that tells apart which of four gratings an image shows."""
    waves = torch.arange(32) * torch.tensor([0.2, 0.4, 0.8, 1.6])[:, None]
    gratings = 0.5 + 0.3 * torch.sin(waves)[:, None, None, :]
    labels = torch.arange(80) % CLASSES
    noise = 0.1 * torch.randn(80, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return Classifier.fit(small(seed), (gratings[labels] + noise).clamp(0, 1), labels)


@pytest.fixture(scope="module")
def owner() -> Classifier:
    return classifier()


@pytest.fixture(scope="module")
def stranger() -> Classifier:
    return classifier(seed=1)


def test_the_head_is_fitted_to_the_features_of_images_in_0_1() -> None:
    model = small()
    pixels = torch.rand(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.norm(model.blocks(model._pos_embed(model.patch_embed((pixels - 0.5) / 0.5))))
    features = torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).flatten(1)
    labels = (features[:, 3] > features[:, 3].median()).long()
    fitted = Classifier.fit(model, pixels, labels)
    torch.testing.assert_close(fitted.features(pixels), features, rtol=1e-4, atol=1e-4)
    assert bool((fitted(pixels).argmax(dim=1) == labels).all())
    assert fitted.model is model
    with pytest.raises(ValueError, match=r"^images, labels: wanted as many of each, .* got 48, 3"):
        Classifier.fit(model, pixels, labels[:3])


def test_ipguards_points_lie_where_the_paper_wants_them(owner: Classifier, stranger: Classifier) -> None:
    found = ipguard.generate(owner, KEY, images(), points=16, margin=0.5, iterations=200)
    assert found.points.shape == (16, 3, 32, 32)
    assert 0 <= float(found.points.min()) <= float(found.points.max()) <= 1
    start = owner.base_images(images(), ipguard.Key.of(KEY), 16)
    top = owner(found.points).topk(2, dim=1)
    before = owner(start).argmax(dim=1)
    arrived = (top.indices[:, 1] == before) & (top.values[:, 0] - top.values[:, 1] >= 0.499)
    assert float(arrived.double().mean()) >= 0.75  # the others ran out of iterations
    assert ipguard.verify(owner, found).detection_rate == 1
    assert ipguard.verify(owner, found).matched
    assert ipguard.verify(stranger, found).detection_rate < 1


def test_ipguard_with_two_classes_and_a_fraction() -> None:
    pixels = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = Classifier.fit(small(), pixels, torch.arange(40) % 2)
    found = ipguard.generate(both, KEY, images(), points=16, iterations=3, fraction=0.25)
    assert len(found.points) == 4
    assert found.cost.fraction == 0.25
    assert found.cost.minutes == pytest.approx(4 * found.cost.seconds / 60)


def test_trajectories_cross_each_boundary_in_the_middle(owner: Classifier, stranger: Classifier) -> None:
    found = adv_tra.generate(owner, KEY, images(), trajectories=6, length=4, iterations=40)
    count, points = found.labels.shape
    assert 1 <= count <= 6
    assert points == (CLASSES - 1) * 4 + 1
    assert found.points.shape == (count, points, 3, 32, 32)
    assert 0 <= float(found.points.min()) <= float(found.points.max()) <= 1
    for labels in found.labels:
        targets = [int(labels[2 + 4 * hop]) for hop in range(CLASSES - 1)]
        assert sorted([int(labels[0]), *targets]) == list(range(CLASSES))  # every class once
        for hop, target in enumerate(targets):
            assert int(labels[4 * hop + 1]) != target
    steps = (found.points[:, 1:] - found.points[:, :-1]).abs().amax(dim=(2, 3, 4))
    assert bool((steps > 0).all())
    torch.testing.assert_close(
        steps[:, 1] / steps[:, 0], torch.full((count,), adv_tra.DECAY), rtol=1e-2, atol=0
    )
    assert adv_tra.verify(owner, found).detection_rate == 1
    assert adv_tra.verify(stranger, found).detection_rate < 1
    again = adv_tra.generate(owner, KEY, images(), trajectories=6, length=4, iterations=40)
    assert torch.equal(found.points, again.points)


def test_the_mutation_rate_decides_on_a_trajectory(owner: Classifier) -> None:
    points = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = owner(points.flatten(0, 1)).argmax(dim=1).view(2, 4)
    labels[0, :1] = (labels[0, :1] + 1) % CLASSES  # 1 of 4 mutated: recognised
    labels[1, :2] = (labels[1, :2] + 1) % CLASSES  # 2 of 4: not below one half
    finding = adv_tra.verify(owner, adv_tra.Fingerprint(points, labels, Cost(1.0, 1.0)))
    assert finding.detection_rate == 0.5
    assert not finding.matched


def test_the_reference_recipe_trains_the_suffix_and_the_codec() -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mark = reference_recipe.generate(model, KEY, images(), epochs=2, steps_per_epoch=5, fraction=0.5)
    assert mark.cost.fraction == 0.5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    changed = {n for n, t in mark.model.state_dict().items() if not torch.equal(t, before[n])}
    trained = range(mark.site.block + 1, mark.site.taps[-1] + 1)
    assert changed == {n for n in before if any(n.startswith(f"blocks.{block}.") for block in trained)}
    again = reference_recipe.generate(model, KEY, images(), epochs=1, steps_per_epoch=5)
    assert all(torch.equal(t, mark.model.state_dict()[n]) for n, t in again.model.state_dict().items())

    rate = reference_recipe.verify(mark.model, mark).detection_rate
    view = reference_recipe.Backbone(mark.model)
    activations = site_activations(view, mark.pixels, mark.site.block, nullcontext)
    read = read_mark(view, mark.codec, activations, mark.messages, mark.site.block, nullcontext)
    wrong = ((read[mark.site.taps[-1]].logits > 0) != mark.messages.bool()).sum(dim=1)
    assert rate == float((wrong <= 5).double().mean())


def test_the_reference_recipe_learns() -> None:
    model: nn.Module = small()
    mark = reference_recipe.generate(model, KEY, images(), bits=8, epochs=1, steps_per_epoch=1)
    trained = reference_recipe.generate(model, KEY, images(), bits=8, epochs=1, steps_per_epoch=150)

    def wrong(made: reference_recipe.Mark) -> float:
        view = reference_recipe.Backbone(made.model)
        activations = site_activations(view, made.pixels, made.site.block, nullcontext)
        read = read_mark(view, made.codec, activations, made.messages, made.site.block, nullcontext)
        return float(read[made.site.taps[-1]].errors.double().mean()) / 8

    assert wrong(trained) < wrong(mark) - 0.05


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5])
def test_fractions_out_of_range(owner: Classifier, fraction: float) -> None:
    for call in (
        lambda: ipguard.generate(owner, KEY, images(), fraction=fraction),
        lambda: adv_tra.generate(owner, KEY, images(), fraction=fraction),
        lambda: reference_recipe.generate(owner.model, KEY, images(), fraction=fraction),
    ):
        with pytest.raises(ValueError, match=r"^fraction: wanted above 0 and at most 1"):
            call()


@pytest.mark.parametrize("length", [0, 1, 3])
def test_trajectories_of_an_odd_length(owner: Classifier, length: int) -> None:
    with pytest.raises(ValueError, match=r"^length: wanted an even number from 2 on"):
        adv_tra.generate(owner, KEY, images(), length=length)
