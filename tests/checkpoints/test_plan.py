from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip.transformer
import pytest
import torch
import torchvision
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from activemark_fast.backbone import Backbone, evaluating
from activemark_fast.checkpoints.names import common_name, stray_stacks
from activemark_fast.checkpoints.plan import Plan, plans
from activemark_fast.checkpoints.target import Target
from activemark_fast.site import Site

WIDTH, DEPTH = 32, 4


@dataclass(frozen=True)
class Known:
    """What a plan is made from."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Weights that matter, everywhere: libraries start biases and tokens at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def timm_vit(seed: int = 1, **kwargs: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": 4,
        "num_classes": 3,
    }
    return randomised(VisionTransformer(**(sizes | kwargs)), seed)


def timm_clip(seed: int = 1) -> nn.Module:
    return timm_vit(seed, pre_norm=True, norm_layer="layernorm")


def timm_dino(seed: int = 1) -> nn.Module:
    return timm_vit(seed, init_values=1e-5, num_classes=0)


def timm_registers(seed: int = 1) -> nn.Module:
    return timm_vit(seed, init_values=1e-5, reg_tokens=4, no_embed_class=True, num_classes=0)


def timm_swiglu(seed: int = 1) -> nn.Module:
    from timm.layers import SwiGLUPacked

    hidden = 2 * 88  # as many as transformers makes of this width
    return timm_vit(
        seed,
        init_values=1e-5,
        num_classes=0,
        mlp_ratio=hidden / WIDTH,
        mlp_layer=SwiGLUPacked,
        act_layer=nn.SiLU,
    )


def sizes() -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "intermediate_size": 4 * WIDTH,
        "image_size": 32,
        "patch_size": 8,
    }


def hf_vit(seed: int = 1) -> nn.Module:
    return randomised(transformers.ViTModel(transformers.ViTConfig(**sizes(), layer_norm_eps=1e-6)), seed)


def hf_clip(seed: int = 1) -> nn.Module:
    return randomised(
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes(), hidden_act="gelu")), seed
    )


def hf_dino(seed: int = 1, **more: Any) -> nn.Module:
    return randomised(
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes(), mlp_ratio=4, **more)), seed
    )


def hf_swiglu(seed: int = 1) -> nn.Module:
    return hf_dino(seed, use_swiglu_ffn=True)


def hf_registers(seed: int = 1) -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(**sizes(), mlp_ratio=4, num_register_tokens=4)
    return randomised(transformers.Dinov2WithRegistersModel(config), seed)


class Clip(nn.Module):
    """An open_clip image tower beside a text tower with the same names."""

    def __init__(self) -> None:
        super().__init__()
        more = {"image_size": 32, "patch_size": 8, "width": WIDTH, "layers": DEPTH, "heads": 4}
        self.visual = open_clip.transformer.VisionTransformer(**more, mlp_ratio=4, output_dim=16)
        self.transformer = open_clip.transformer.Transformer(WIDTH, DEPTH, 4)
        self.positional_embedding = nn.Parameter(torch.zeros(7, WIDTH))


def oc_clip(seed: int = 1) -> nn.Module:
    return randomised(Clip(), seed)


def tv_vit(seed: int = 1) -> nn.Module:
    return randomised(
        torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=DEPTH, num_heads=4, hidden_dim=WIDTH, mlp_dim=4 * WIDTH
        ),
        seed,
    )


def test_names_without_end_are_not_searched() -> None:
    names = ["layers.0." * 200_000 + "norm1.weight", "b.layers.0.norm1.weight"]
    assert stray_stacks([], names) == {"b.": {0: [("norm1.weight", "b.layers.0.norm1.weight")]}}


def target(model: nn.Module) -> Target:
    view = Backbone(model)
    site = Site(0, (1, 2), view.num_tokens, view.prefix_tokens, view.width, (), ())
    return Target(model, site)


def carried(
    state: dict[str, Tensor], model: nn.Module, lora: dict[str, Any] | None = None
) -> tuple[Target, Plan]:
    """The model, loaded with a state dict of whatever kind."""
    loaded = target(model)
    chosen = plans(loaded.wanted, {n: Known(t.dtype, tuple(t.shape)) for n, t in state.items()}, lora)[0]
    assert set(chosen.names) <= state.keys()
    loaded.load(chosen.tensors({name: state[name] for name in chosen.names}))
    loaded.fill(chosen.neutral)
    return loaded, chosen


@torch.no_grad()
def streams(view: Backbone) -> Tensor:
    pixels = torch.randn(2, 3, *view.image_size, generator=torch.Generator().manual_seed(3))
    with evaluating(view.model):
        return view.run(view.stem(pixels), 0, 3)


def assert_the_same_function(source: nn.Module, loaded: Target) -> None:
    torch.testing.assert_close(streams(loaded.backbone), streams(Backbone(source)), rtol=1e-3, atol=1e-3)


SAME: list[list[Callable[..., nn.Module]]] = [
    [timm_vit, hf_vit, tv_vit],
    [timm_clip, hf_clip, oc_clip],
    [timm_dino, hf_dino],
    [timm_registers, hf_registers],
    [timm_swiglu, hf_swiglu],
]
PAIRS = [(a, b) for group in SAME for a in group for b in group]


@pytest.mark.parametrize(("source", "into"), PAIRS, ids=lambda make: make.__name__)
def test_a_model_of_one_library_becomes_the_same_function_in_another(
    source: Callable[..., nn.Module], into: Callable[..., nn.Module]
) -> None:
    model = source(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, chosen = carried(model.state_dict(), into(seed=2))
    assert chosen.depth == 3
    assert chosen.fit.missing == ()
    assert chosen.fit.odd == ()
    assert_the_same_function(model, loaded)
    needed = len(loaded.wanted.stem) + sum(len(block) for block in loaded.wanted.blocks)
    assert chosen.fit.matched + sum(chosen.fit.converted.values()) >= needed
    assert {name.split(".")[-1] for name in chosen.fit.ignored} <= {
        "weight",
        "bias",
        "gamma",
        "lambda1",
        "mask_token",
        "proj",
        "positional_embedding",
        "in_proj_weight",
        "in_proj_bias",
        "logit_scale",
    }


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "visual.",
        "backbone.",
        "base_model.model.",
        "_orig_mod.module.",
        "student.backbone.",
    ],
)
def test_wrappers(prefix: str) -> None:
    model = timm_vit(1)
    loaded, chosen = carried({prefix + n: t for n, t in model.state_dict().items()}, timm_vit(2))
    assert (chosen.depth, chosen.fit.missing, chosen.fit.converted) == (3, (), {})
    assert_the_same_function(model, loaded)


def test_only_what_is_read_up_to_the_last_tap_is_wanted() -> None:
    model = timm_vit(1)
    _, chosen = carried(model.state_dict(), timm_vit(2))
    assert not [n for n in chosen.names if n.startswith(("blocks.3.", "norm.", "head."))]
    _, chosen = carried(oc_clip().state_dict(), oc_clip(2))
    assert all(n.startswith("visual.") for n in chosen.names)
    assert "visual.proj" not in chosen.names


def test_heads_may_be_missing_or_replaced_and_blocks_cut_off_or_added() -> None:
    for more in ({"num_classes": 0}, {"num_classes": 77}, {"depth": 3}, {"depth": 9}):
        model = timm_vit(1, **more)
        loaded, chosen = carried(model.state_dict(), timm_vit(2))
        assert (chosen.depth, chosen.fit.missing) == (3, ())
        assert_the_same_function(model, loaded)
    _, chosen = carried(timm_vit(1, depth=3).state_dict() | {"x": torch.zeros(1)}, timm_vit(2))
    assert "x" in chosen.fit.ignored
    short = {n: t for n, t in timm_vit(1).state_dict().items() if ".2." not in n}
    assert carried(short, timm_vit(2))[1].depth == 2


def test_positions_of_another_resolution() -> None:
    large = timm_vit(1, img_size=64)
    loaded, chosen = carried(large.state_dict(), timm_vit(2))
    assert chosen.fit.converted == {"positions resized": 1}
    assert loaded["pos_embed"].shape == (1, 17, WIDTH)
    torch.testing.assert_close(loaded["pos_embed"][:, 0], large.state_dict()["pos_embed"][:, 0])
    # A plane stays the plane it is, whatever it is sampled at.
    ramp = torch.arange(8.0).repeat(8, 1).reshape(64, 1).expand(64, WIDTH)
    state = large.state_dict() | {"pos_embed": torch.cat([torch.zeros(1, WIDTH), ramp])[None]}
    resized = carried(state, timm_vit(2))[0]["pos_embed"][0, 1:].reshape(4, 4, WIDTH)
    middle = resized[:, 1:3, 0]
    torch.testing.assert_close(middle, torch.tensor([2.5, 4.5]).expand(4, 2), atol=0.1, rtol=0)
    torch.testing.assert_close(resized[0], resized[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = timm_vit(1)
    loaded, chosen = carried({n: t.to(dtype) for n, t in model.state_dict().items()}, timm_vit(2))
    assert chosen.fit.converted == {str(dtype).removeprefix("torch."): chosen.fit.matched + len(chosen.steps)}
    torch.testing.assert_close(
        loaded["blocks.0.mlp.fc1.weight"], model.blocks[0].mlp.fc1.weight, rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("ending", ["SCB", "weight_scale", "scale", "zero_point"])
def test_eight_bit_weights_with_their_scales(ending: str) -> None:
    model = timm_vit(1)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("weight") or tensor.ndim != 2:
            state[name] = tensor
            continue
        top = tensor.abs().amax(dim=1)
        module = name.removesuffix(".weight")
        whole = (127 * tensor / top[:, None]).round()
        if ending == "zero_point":
            state |= {
                name: (whole + 128).clamp(0, 255).to(torch.uint8),
                f"{module}.weight_scale": (top / 127)[:, None],
            }
            state[f"{module}.weight_zero_point"] = torch.full((len(top), 1), 128, dtype=torch.uint8)
        else:
            state[name] = whole.to(torch.int8)
            state[f"{module}.{ending}"] = top if ending == "SCB" else top / 127
    loaded, chosen = carried(state, timm_vit(2))
    assert (chosen.depth, chosen.fit.odd) == (3, ())
    wanted = model.blocks[1].attn.qkv.weight
    assert (loaded["blocks.1.attn.qkv.weight"] - wanted).abs().max() < 0.02 * wanted.abs().max()
    bare = {n: t for n, t in state.items() if n.endswith((".weight", ".bias")) or "." not in n}
    assert carried(bare, timm_vit(2))[1].depth == 0


@pytest.mark.parametrize("own_file", [False, True])
def test_lora_adapters_are_merged(own_file: bool) -> None:
    model, config = timm_vit(1), {"lora_alpha": 6, "r": 3}
    generator = torch.Generator().manual_seed(0)
    state, merged = {}, model.state_dict()
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        lora = module.endswith(("attn.qkv", "mlp.fc2")) and kind == "weight"
        plain = (
            name
            if own_file
            else f"base_model.model.{module}.base_layer.{kind}"
            if lora
            else f"base_model.model.{name}"
        )
        state[plain] = tensor
        if lora:
            a = 0.1 * torch.randn(3, tensor.shape[1], generator=generator)
            b = 0.1 * torch.randn(tensor.shape[0], 3, generator=generator)
            infix = "" if own_file else ".default"
            state |= {f"base_model.model.{module}.lora_A{infix}.weight": a}
            state |= {f"base_model.model.{module}.lora_B{infix}.weight": b}
            merged[name] = tensor + 2 * b @ a
    loaded, chosen = carried(state, timm_vit(2), config)
    assert chosen.fit.converted == {"LoRA merged with the factor 2": 6}
    assert chosen.fit.odd == ()
    for name in ("blocks.0.attn.qkv.weight", "blocks.2.mlp.fc2.weight", "blocks.1.mlp.fc1.weight"):
        torch.testing.assert_close(loaded[name], merged[name])
    del state["base_model.model.blocks.0.attn.qkv.lora_B" + ("" if own_file else ".default") + ".weight"]
    assert len(carried(state, timm_vit(2), config)[1].fit.odd) == 1


def test_what_does_not_fit_is_told() -> None:
    model = timm_vit(1)
    narrow = carried(timm_vit(1, embed_dim=16).state_dict(), timm_vit(2))[1]
    assert narrow.depth == 0
    assert "patch_embed.proj.weight" in narrow.fit.missing
    nothing = carried({"fc.weight": torch.zeros(3, 3)}, timm_vit(2))[1]
    assert (nothing.depth, nothing.fit.ignored) == (0, ("fc.weight",))
    assert set(nothing.fit.missing) == {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    # LayerScale that the model does not have is computed with by the suspect, so it is odd.
    odd = carried(timm_dino(1).state_dict(), timm_vit(2))[1]
    assert sorted(odd.fit.odd) == sorted(f"blocks.{i}.ls{n}.gamma" for i in range(3) for n in (1, 2))
    # What a model has that the suspect lacks is set to what changes nothing, and told.
    neutral = carried(model.state_dict(), timm_dino(2))[1]
    assert neutral.neutral == {f"blocks.{i}.ls{n}.gamma": 1.0 for i in range(3) for n in (1, 2)}
    assert set(neutral.fit.missing) == neutral.neutral.keys()
    no_bias = {n: t for n, t in model.state_dict().items() if not n.endswith("qkv.bias")}
    assert set(carried(no_bias, timm_vit(2))[1].neutral.values()) == {0.0}


def test_a_model_that_no_library_knows_is_compared_by_its_own_names() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = timm_vit()
            self.stages = self.inner.blocks
            self.inner.blocks = None
            self.image_size = 32

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner._pos_embed(self.inner.patch_embed(x))
            for stage in self.stages:
                x = stage(x)
            return x

    model, into = randomised(Own(), 1), randomised(Own(), 2)
    loaded, chosen = carried({f"module.{n}": t for n, t in model.state_dict().items()}, into)
    assert (chosen.depth, chosen.fit.missing, chosen.fit.converted) == (3, (), {})
    assert_the_same_function(model, loaded)


@pytest.mark.parametrize(
    ("name", "common"),
    [
        ("encoder.layer.3.attention.attention.query.weight", "blocks.3.attn.q.weight"),
        ("encoder.layer.3.attention.output.dense.bias", "blocks.3.attn.proj.bias"),
        ("encoder.layer.3.output.dense.bias", "blocks.3.mlp.fc2.bias"),
        ("encoder.layer.3.intermediate.dense.weight", "blocks.3.mlp.fc1.weight"),
        ("blocks.1.17.mlp.w12.weight", "blocks.17.mlp.fc1.weight"),
        ("encoder.layers.encoder_layer_5.mlp.linear_1.bias", "blocks.5.mlp.fc1.bias"),
        ("pre_layrnorm.weight", "norm_pre.weight"),
        ("head.weight", "head.weight"),
        ("blocks.99999999999.norm1.weight", "blocks.99999999999.norm1.weight"),
    ],
)
def test_names_of_older_releases(name: str, common: str) -> None:
    assert common_name(name) == common


@pytest.mark.parametrize("gate_up_back", [("w1", "w2", "w3"), ("w1", "w3", "w2"), ("w12", "", "w3")])
def test_three_matrices_of_a_gated_mlp(gate_up_back: tuple[str, str, str]) -> None:
    """DINOv3's order, Llama's, and DINOv2's."""
    gate, up, back = gate_up_back
    model = timm_swiglu(1)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".mlp.fc1." in name:
            for matrix, rows in zip((gate, up), tensor.chunk(2) if up else (tensor,), strict=False):
                state[name.replace("fc1", matrix)] = rows
        else:
            state[name.replace("mlp.fc2", f"mlp.{back}")] = tensor
    loaded, chosen = carried(state, timm_swiglu(2))
    assert (chosen.depth, chosen.fit.missing, chosen.fit.odd) == (3, (), ())
    assert_the_same_function(model, loaded)


def test_a_bias_of_keys_is_not_missed() -> None:
    """Softmax takes it out, so that neither its lack nor its presence is a doubt."""
    model = timm_vit(1)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".attn.qkv." in name:
            q, k, v = tensor.chunk(3)
            named = {"q": q, "v": v} if name.endswith("bias") else {"q": q, "k": k, "v": v}
            state |= {name.replace("attn.qkv", f"attn.{part}"): rows for part, rows in named.items()}
        else:
            state[name] = tensor
    for into in (timm_vit, hf_vit):
        loaded, chosen = carried(state, into(2))
        assert (chosen.depth, chosen.fit.missing, chosen.fit.doubts) == (3, (), ())
        assert_the_same_function(model, loaded)
