from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from activemark_fast.backbone import Backbone
from activemark_fast.profile import TOP, Profile, profile

DEPTH, WIDTH, TOKENS = 5, 32, 17


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=0
    ).eval()


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def reference(model: VisionTransformer, pixels: torch.Tensor) -> list[torch.Tensor]:
    streams: list[torch.Tensor] = []
    handles = [
        b.register_forward_hook(lambda _m, _a, out: streams.append(out.detach())) for b in model.blocks
    ]
    with torch.no_grad():
        model(pixels)
    for handle in handles:
        handle.remove()
    return streams


def test_magnitudes_are_those_of_every_block_of_a_plain_run() -> None:
    model, pixels = vit(), images()
    measured = profile(Backbone(model), pixels)
    assert measured.top.shape == (DEPTH, TOP)
    assert measured.top.dtype == np.float64
    assert measured.median.shape == (DEPTH,)
    for block, stream in enumerate(reference(model, pixels)):
        magnitudes = stream.abs().flatten(1)
        largest = magnitudes.sort(dim=1, descending=True).values[:, :TOP].mean(dim=0)
        np.testing.assert_allclose(measured.top[block], largest.numpy(), rtol=1e-5)
        # The compiled kernel bins float32 magnitudes: its median is within 0.25 % of the true one.
        np.testing.assert_allclose(
            measured.median[block], magnitudes.median(dim=1).values.mean(), rtol=0.0025
        )
    assert measured.massive == ((),) * DEPTH
    assert measured.first_sharp_rise() is None


def profile_of(top: list[float], median: list[float]) -> Profile:
    return Profile(np.repeat(np.array(top)[:, None], TOP, axis=1), np.array(median), ((),) * len(top))


@pytest.mark.parametrize(
    ("top", "median", "block"),
    [
        ([1, 1, 1, 1], [0.5] * 4, None),
        ([1, 1, 100, 100], [0.5] * 4, 2),
        ([1, 1, 100, 1000], [0.5] * 4, 2),  # the first, not the largest
        ([1, 10, 100, 100], [0.5] * 4, 2),  # 10 is a rise, but not massive
        ([1, 30, 80, 81], [1.0] * 4, None),  # massive, but by small steps
        ([100, 100, 100, 100], [0.5] * 4, None),  # massive from the start: nothing rises
        ([1, 1, 2.9, 50], [0.5] * 4, 3),
        ([1, 1, 1, 150], [3.0] * 4, 3),
        ([1, 1, 1, 149], [3.0] * 4, None),
    ],
)
def test_first_sharp_rise(top: list[float], median: list[float], block: int | None) -> None:
    assert profile_of(top, median).first_sharp_rise() == block


class Amplifier(nn.Module):
    """Stands in for a backbone whose blocks only plant values: what a profile should find is known."""

    depth, width = 3, 8

    def __init__(self, planted: torch.Tensor) -> None:
        super().__init__()
        self.planted = planted

    def stem(self, pixels: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.rand(len(pixels), 6, self.width, generator=generator) + 0.5

    def run(self, tokens: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return torch.where(self.planted != 0, self.planted, tokens) if start == 1 else tokens


def test_massive_places_recur_in_at_least_half_of_the_images() -> None:
    planted = torch.zeros(8, 6, 8)
    planted[:, 0, 7] = 900  # in all
    planted[:4, 4, 2] = -700  # in half, negative
    planted[:3, 5, 1] = 800  # in fewer
    planted[:, 3, 3] = 40  # large, but not massive
    measured = profile(Amplifier(planted), torch.zeros(8, 3, 4, 4))  # type: ignore[arg-type]
    assert measured.massive[0] == ()
    assert measured.massive[1] == ((0, 7), (4, 2))
    assert measured.massive[2] == ((0, 7), (4, 2))
    assert measured.first_sharp_rise() == 1


def test_profile_in_half_precision_and_of_a_model_in_it() -> None:
    model, pixels = vit(), images()
    exact = profile(Backbone(model), pixels)
    backbone = Backbone(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = profile(backbone, pixels)
    np.testing.assert_allclose(mixed.top, exact.top, rtol=0.05)
    half = profile(Backbone(model.bfloat16()), pixels.bfloat16())
    np.testing.assert_allclose(half.top, exact.top, rtol=0.05)


def test_profile_leaves_the_model_alone() -> None:
    model = vit().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    profile(Backbone(model), images())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
