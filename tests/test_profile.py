from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from tiny import profile_of
from torch import Tensor, nn

from activemark_fast import profile
from activemark_fast.backbone import Backbone, NotAViTError
from activemark_fast.profiling import KEPT, Massive, measure

DEPTH, WIDTH, TOKENS = 5, 32, 17


def vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
    return VisionTransformer(**(sizes | {"num_classes": 0} | kwargs)).eval()


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer as TorchvisionViT

    torch.manual_seed(0)
    return TorchvisionViT(32, 8, DEPTH, 2, WIDTH, 64, num_classes=3).eval()


def dino_with_registers() -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        num_register_tokens=3,
    )
    return Dinov2WithRegistersModel(config).eval()


MODELS = {
    "class token": vit,
    "class token and registers": lambda: vit(reg_tokens=4),
    "registers only": lambda: vit(class_token=False, reg_tokens=2, global_pool="avg"),
    "patches only": lambda: vit(class_token=False, global_pool="avg"),
    "a norm before the blocks": lambda: vit(pre_norm=True),
    "torchvision": torchvision_vit,
    "transformers, registers": dino_with_registers,
}


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plant(model: nn.Module, block: int, token: int, channel: int, value: float = 300.0) -> None:
    """Makes the output of `block` massive at one place; the residual stream carries it on."""

    def add(_module: nn.Module, _args: object, output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        tokens[:, token, channel] += value

    Backbone(model).blocks[block].register_forward_hook(add)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block", range(DEPTH))
def test_planted_massive_activations_are_found_at_every_block(name: str, block: int) -> None:
    model = MODELS[name]()
    view = Backbone(model)
    token, channel = (5 * block) % view.num_tokens, (11 * block + 3) % view.width
    plant(model, block, token, channel)
    measured = profile(model, images())
    assert measured.stem.massive == ()
    for earlier in measured.blocks[:block]:
        assert earlier.massive == ()
    for later in measured.blocks[block:]:
        assert [m[:3] for m in later.massive] == [(token, channel, 6)]
        assert later.massive[0].magnitude == pytest.approx(300, rel=0.1)
    for rule in ("paper", "reference"):
        placement = measured.site(rule)
        assert placement.emergence == block
        assert placement.agreement == 1
        in_time = block <= DEPTH - 4
        assert placement.site.block == (block if in_time else 1)
        assert ("too late" in placement.reason) != in_time
        if block <= placement.site.block:
            assert placement.site.massive_tokens == (token,)
            assert placement.site.massive_channels == (channel,)


@settings(max_examples=30)
@given(st.integers(0, DEPTH - 1), st.integers(0, TOKENS - 1), st.integers(0, WIDTH - 1), st.booleans())
def test_planted_anywhere_of_either_sign(block: int, token: int, channel: int, negative: bool) -> None:
    model = vit()
    plant(model, block, token, channel, -300.0 if negative else 300.0)
    measured = measure(Backbone(model), images(2))
    assert [m[:3] for m in measured.massive[block]] == [(token, channel, 2)]
    assert measured.site().emergence == block


@pytest.mark.parametrize("name", MODELS)
def test_magnitudes_are_those_of_every_block_of_a_plain_run(name: str) -> None:
    model, pixels = MODELS[name](), images()
    view = Backbone(model)
    streams: list[Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out: streams.append((out[0] if isinstance(out, tuple) else out).detach())
        )
        for block in view.blocks
    ]
    with torch.no_grad():
        model(pixels)
    for handle in handles:
        handle.remove()
    measured = profile(model, pixels, precision="fp32")
    assert measured.depth == len(streams) == DEPTH
    assert measured.images == 6
    assert (measured.num_tokens, measured.width) == (view.num_tokens, WIDTH)
    assert measured.top.shape == measured.ratio.shape == (DEPTH, KEPT)
    assert measured.median.shape == (DEPTH,)
    for found, stream in zip(measured.blocks, streams, strict=True):
        ordered = stream.abs().flatten(1).sort(dim=1, descending=True)
        np.testing.assert_allclose(found.values, ordered.values[:, :KEPT].numpy(), rtol=1e-5)
        there = stream.abs().numpy()[np.arange(6)[:, None], found.tokens, found.channels]
        np.testing.assert_allclose(there, found.values, rtol=1e-5)
        np.testing.assert_allclose(found.top, found.values.mean(axis=0))
        # The compiled kernel bins float32 magnitudes: its median is within 0.25 % of the true one.
        np.testing.assert_allclose(found.medians, stream.abs().flatten(1).median(dim=1).values, rtol=0.0025)
        np.testing.assert_allclose(found.ratio, found.top / found.medians.mean())
        assert found.massive == ()
        assert not found.nonfinite.any()
    placement = measured.site()
    assert placement.emergence is None
    assert placement.site.block == 1
    assert "no massive activations" in placement.reason


def test_massive_places_and_how_often_they_recur() -> None:
    values = np.ones((3, 4, 5))
    values[1:, :, 0] = 900  # in all images
    values[1:, :2, 1] = 700  # in half
    values[1:, :1, 2] = 800  # in fewer
    values[1:, :, 3] = 49.9  # large, but not massive
    measured = profile_of(values)
    first, second, third = measured.massive[0]
    assert first == Massive(token=0, channel=7, images=4, magnitude=900)
    assert second == Massive(0, 9, 2, 700)
    assert third == Massive(4, 7, 1, 800)
    assert measured.stem.massive == ()
    assert measured.blocks[0].massive_tokens == (0,)
    assert measured.blocks[0].massive_channels == (7, 9)


def test_a_channel_recurs_at_whatever_token() -> None:
    """As in models whose massive tokens are patches that hold no object, other ones in every image."""
    model = vit()
    wandering = iter(range(100))

    def add(_module: nn.Module, _args: object, output: Tensor) -> None:
        for image in output:
            image[1 + next(wandering) % 16, 21] += 300.0

    view = Backbone(model)
    view.blocks[1].register_forward_hook(add)
    measured = measure(view, images(8))
    assert [m.images for m in measured.massive[1]] == [1] * 8
    assert measured.blocks[1].massive_tokens == ()
    assert measured.blocks[1].massive_channels == (21,)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    model = vit()
    plant(model, 2, 3, 4, torch.inf)
    measured = profile(model, images(3))
    assert not measured.blocks[1].nonfinite.any()
    assert measured.blocks[2].nonfinite.tolist() == [1] * 3
    assert np.isfinite(measured.top[2]).all()
    assert measured.massive[2] == ()
    assert np.isnan(measured.top[3]).all()  # the infinity has spread to every token
    assert measured.site().emergence is None
    json.dumps(measured.to_dict(), allow_nan=False)
    assert "nan" in str(measured)


def test_zeros_are_not_massive() -> None:
    measured = profile_of([0.0] * 6, medians=0.0)
    assert measured.massive == ((),) * 5
    assert "no massive activations" in measured.site().reason


def test_images_in_many_forms_and_none(tmp_path: Path) -> None:
    model = vit()
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    given_as = [profile(model, source).top for source in (pixels, tmp_path, list(pixels), [(pixels, [1])])]
    for top in given_as[1:]:
        np.testing.assert_array_equal(top, given_as[0])
    made = profile(model)
    assert made.images == 32
    np.testing.assert_array_equal(made.top, profile(model).top)


def test_batches_are_put_together() -> None:
    model, pixels = vit(), images(70)
    whole = profile(model, pixels)
    parts = [profile(model, part) for part in (pixels[:50], pixels[50:])]
    for name in ("values", "tokens", "channels", "medians"):
        together = np.concatenate([getattr(part.blocks[3], name) for part in parts])
        np.testing.assert_allclose(getattr(whole.blocks[3], name), together, rtol=0.0025)


def test_no_activation_is_kept_longer_than_its_block() -> None:
    model = vit()
    view = Backbone(model)
    alive: list[weakref.ref[Tensor]] = []

    def note(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        assert sum(ref() is not None for ref in alive) <= 1  # what this block has read
        alive.append(weakref.ref(output))

    for block in view.blocks:
        block.register_forward_hook(note)
    measure(view, images())
    assert len(alive) == DEPTH
    assert all(ref() is None for ref in alive)


@pytest.mark.parametrize("k", [5, 40, TOKENS * WIDTH])
def test_k_largest(k: int) -> None:
    assert profile(vit(), images(2), k=k).top.shape == (DEPTH, k)


def test_precision_and_dtype() -> None:
    model, pixels = vit(), images()
    exact = profile(model, pixels)
    np.testing.assert_allclose(profile(model, pixels, precision="bf16").top, exact.top, rtol=0.05)
    np.testing.assert_allclose(profile(model.bfloat16(), pixels).top, exact.top, rtol=0.05)


def test_the_model_is_left_alone() -> None:
    model = vit(drop_path_rate=0.9, proj_drop_rate=0.9)
    quiet = profile(model, images())
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    np.testing.assert_array_equal(profile(model, images()).top, quiet.top)  # nothing was dropped
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_names_of_tokens() -> None:
    measured = profile(vit(reg_tokens=4), images(1))
    assert [measured.token_name(token) for token in (0, 1, 4, 5, 20)] == [
        "class token",
        "register 0",
        "register 3",
        "patch 0",
        "patch 15",
    ]
    bare = profile(vit(class_token=False, reg_tokens=1, global_pool="avg"), images(1))
    assert [bare.token_name(token) for token in (0, 1)] == ["register 0", "patch 0"]


def test_as_text_and_as_json() -> None:
    model = vit(reg_tokens=4)
    plant(model, 3, 2, 30)
    measured = profile(model, images())
    lines = str(measured).splitlines()
    assert lines[0].split() == ["after", "largest", "median", "ratio", "massive", "at", "(images)"]
    assert [line.split("  ")[0] for line in lines[1:]] == ["stem", *(f"block {i}" for i in range(DEPTH))]
    assert lines[5].endswith("register 1, channel 30 (6)")
    record = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert record["images"] == 6
    assert len(record["blocks"]) == DEPTH
    (massive,) = record["blocks"][3]["massive"]
    magnitude = massive.pop("magnitude")
    assert massive == {"name": "register 1", "token": 2, "channel": 30, "images": 6}
    assert magnitude == pytest.approx(measured.top[3, 0])
    assert record["blocks"][3]["top"] == pytest.approx(measured.top[3])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "demo"}, TypeError, "model: wanted a torch.nn.Module, got str"),
        ({"model": nn.Linear(3, 3)}, NotAViTError, "looked for"),
        ({"k": 4}, ValueError, r"k: wanted 5 to 544, .*, got 4"),
        ({"k": 545}, ValueError, r"k: wanted 5 to 544, .*, got 545"),
        ({"k": 5.0}, TypeError, "k: wanted int, got float"),
        ({"images": torch.zeros(0, 3, 32, 32)}, ValueError, "images: wanted at least 1, got none"),
        ({"images": 7}, TypeError, "images: wanted None, a tensor, a folder or an iterable"),
        ({"images": torch.full((1, 3, 32, 32), torch.nan)}, ValueError, "images: wanted finite"),
        ({"device": "cuda:99"}, ValueError, "device: wanted a device of this machine"),
        ({"precision": "int8"}, ValueError, "precision: wanted"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        profile(**({"model": vit(), "images": images(1)} | arguments))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = vit()
    plant(model, 1, 4, 9)
    expected = profile(model, images())
    measured = profile(model, images(), device="cuda", precision="fp32")
    assert next(model.parameters()).device.type == "cpu"
    np.testing.assert_allclose(measured.top, expected.top, rtol=1e-2)
    assert [m[:3] for m in measured.massive[1]] == [(4, 9, 6)]
