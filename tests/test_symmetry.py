from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer
from tiny import vit
from torch import nn

from activemark_fast.attacks import permute_inside, permute_residual, rotate_residual
from activemark_fast.backbone import Backbone

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"embed_dim": 48, "depth": 3}


def disturbed(**kwargs: Any) -> Any:
    """A ViT whose norms and biases are not those it starts with, which would hide a mistake."""
    model = vit(**(SMALL | kwargs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or "gamma" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def stream(model: nn.Module, block: int) -> torch.Tensor:
    view = Backbone(model)
    return view.run(view.stem(IMAGES), 0, block)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"init_values": 0.5},
        {"global_pool": "avg"},
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
        {"qkv_bias": False, "proj_bias": False},
        {"pos_embed": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("attack", [permute_residual, rotate_residual, permute_inside])
@torch.no_grad()
def test_the_function_is_the_same(attack: Callable[..., nn.Module], kwargs: dict[str, Any]) -> None:
    model = disturbed(**kwargs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = attack(model, None, 1, 1)
    assert torch.allclose(moved(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(moved.blocks[1].attn.proj.weight, model.blocks[1].attn.proj.weight)
    again, other = attack(model, None, 1, 1), attack(model, None, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(moved.parameters(), again.parameters(), strict=True))
    assert not torch.equal(moved.blocks[1].attn.proj.weight, other.blocks[1].attn.proj.weight)


@torch.no_grad()
def test_what_happens_to_the_stream() -> None:
    model = disturbed()
    plain = stream(model, 2)
    permuted = stream(permute_residual(model, None, 1, 1), 2)
    assert torch.allclose(permuted.sort(dim=-1).values, plain.sort(dim=-1).values, atol=1e-4)
    assert not torch.allclose(permuted, plain, atol=1e-2)
    rotated = stream(rotate_residual(model, None, 1, 1), 2)
    assert torch.allclose(rotated.norm(dim=-1), plain.norm(dim=-1), rtol=1e-4)
    assert torch.allclose(rotated.mean(dim=-1), plain.mean(dim=-1), atol=1e-4)
    assert not torch.allclose(rotated.sort(dim=-1).values, plain.sort(dim=-1).values, atol=1e-2)
    assert torch.allclose(stream(permute_inside(model, None, 1, 1), 2), plain, atol=1e-4)


@torch.no_grad()
def test_norms_without_a_place_to_go() -> None:
    before = disturbed(pre_norm=True)
    assert torch.allclose(permute_residual(before, None, 1, 1)(IMAGES), before(IMAGES), atol=1e-5)
    with pytest.raises(ValueError, match="model: its norm_pre cannot be folded"):
        rotate_residual(before, None, 1, 1)
    with pytest.raises(ValueError, match="model: its pooling, 'max', does not pass a rotation"):
        rotate_residual(disturbed(global_pool="max"), None, 1, 1)
    headless = disturbed(num_classes=0)
    lengths = [m(IMAGES).norm(dim=-1) for m in (rotate_residual(headless, None, s, 1) for s in (1, 2))]
    assert torch.allclose(*lengths, rtol=1e-4)


@torch.no_grad()
def test_gated_mlps() -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_heads": 4, "num_classes": 3}
    model = VisionTransformer(**SMALL, **sizes, mlp_layer=SwiGLU).eval()
    for attack in (permute_residual, rotate_residual, permute_inside):
        if attack is permute_inside:
            with pytest.raises(ValueError, match="model: wanted plain MLPs"):
                attack(model, None, 1, 1)
        else:
            assert torch.allclose(attack(model, None, 1, 1)(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attack", [permute_residual, rotate_residual, permute_inside])
def test_other_models(attack: Callable[..., nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"model: wanted a timm VisionTransformer .*, got Linear"):
        attack(nn.Linear(3, 3), None, 1, 1)
