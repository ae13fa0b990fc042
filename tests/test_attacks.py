from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from activemark_fast.attacks import finetune, prune

DEPTH = 4


def vit(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
    return VisionTransformer(**sizes, num_classes=3, **kwargs).eval()


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(16, 8, DEPTH, 2, 32, 64, num_classes=3).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and ("blocks." in name or "encoder_layer_" in name)


@pytest.mark.parametrize("build", [vit, torchvision_vit])
@pytest.mark.parametrize("fraction", [0, 0.0, 0.25, 0.6, 1.0, 1])
def test_prune_zeroes_the_smallest_weights_of_all_blocks_together(build: Any, fraction: float) -> None:
    model = build()
    before = state(model)
    pruned = prune(model, fraction)
    after = state(pruned)
    assert after.keys() == before.keys()
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
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert {n: p.requires_grad for n, p in pruned.named_parameters()} == dict.fromkeys(
        (n for n, _ in model.named_parameters()), True
    )


def test_pruned_models_are_plain_models() -> None:
    pruned = prune(vit(), 0.5)
    assert not any(m._forward_pre_hooks for m in pruned.modules())
    pruned(torch.zeros(1, 3, 16, 16))
    vit().load_state_dict(pruned.state_dict())


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_prune_errors(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction: wanted 0 to 1, got"):
        prune(vit(), fraction)


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    return torch.randn(count, 3, 16, 16, generator=generator) + 2 * labels[:, None, None, None], labels


def test_finetune_changes_every_block_of_a_copy() -> None:
    model = vit().train()
    model.get_parameter("cls_token").requires_grad_(False)
    before, (images, labels) = state(model), data()
    steps: list[int] = []
    tuned = finetune(model, images, labels, seed=1, batch_size=8, epochs=2, on_step=lambda: steps.append(1))
    assert len(steps) == 2 * 3
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model.get_parameter("blocks.0.mlp.fc1.weight").grad is None
    after = state(tuned)
    assert after.keys() == before.keys()
    for name in before:
        if is_block_matrix(name, before[name]):
            assert not torch.equal(after[name], before[name]), name
    assert tuned.training
    assert not tuned.get_parameter("cls_token").requires_grad
    assert tuned.get_parameter("pos_embed").requires_grad
    assert all(p.grad is None for p in tuned.parameters())


def test_finetune_is_seeded_and_leaves_the_modes_of_the_model() -> None:
    images, labels = data()

    def tuned(seed: int) -> dict[str, Tensor]:
        model = finetune(vit(), images, labels, seed=seed, batch_size=8, epochs=1)
        assert not any(m.training for m in model.modules())
        return state(model)

    first, again, other = tuned(1), tuned(1), tuned(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_learning_rate_is_how_far_finetune_goes() -> None:
    images, labels = data(32)
    model = vit()
    before = model.get_parameter("blocks.2.mlp.fc2.weight").detach().clone()
    near = finetune(model, images, labels, seed=0, batch_size=8, epochs=1, lr=1e-6)
    far = finetune(model, images, labels, seed=0, batch_size=8, epochs=1, lr=1e-3)
    moved = [
        float((tuned.get_parameter("blocks.2.mlp.fc2.weight").detach() - before).norm())
        for tuned in (near, far)
    ]
    assert 0 < moved[0] < moved[1] / 50


@pytest.mark.parametrize(("images", "labels"), [(24, 23), (7, 7)])
def test_finetune_errors(images: int, labels: int) -> None:
    x, y = data()
    with pytest.raises(ValueError, match=rf"images, labels: wanted .* at least 8, got {images}, {labels}"):
        finetune(vit(), x[:images], y[:labels], seed=0, batch_size=8)
