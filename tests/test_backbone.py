from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.mlp import GluMlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from activemark_fast.backbone import Backbone, NotAViTError

WIDTH, DEPTH, HEADS, SIZE, PATCH = 32, 4, 2, 32, 8
PATCHES = (SIZE // PATCH) ** 2
TINY: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
IMAGES: dict[str, Any] = {"image_size": SIZE, "patch_size": PATCH}


def timm_vit(**kwargs: Any) -> Any:
    sizes: dict[str, Any] = {
        "img_size": SIZE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
    }
    return VisionTransformer(**{**sizes, "num_classes": 5, **kwargs})


def clip(**vision: Any) -> Any:
    sizes: dict[str, Any] = {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, **IMAGES}
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=WIDTH, heads=HEADS, layers=DEPTH)
    return open_clip.model.CLIP(16, open_clip.CLIPVisionCfg(**{**sizes, **vision}), text)


def sequence_first_tower() -> nn.Module:
    tower = clip().visual
    tower.transformer = open_clip.transformer.Transformer(WIDTH, DEPTH, HEADS, batch_first=False)
    return tower


def hf_clip() -> transformers.CLIPModel:
    vision = {**TINY, **IMAGES, "intermediate_size": 64}
    text = {**TINY, "intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 8}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    )


def hf_dinov2(**kwargs: Any) -> Any:
    return transformers.Dinov2Model(
        transformers.Dinov2Config(**TINY, **IMAGES, mlp_ratio=2, layerscale_value=1e-5, **kwargs)
    )


class HomeMade(nn.Module):
    """A ViT of torch's own encoder layers, patches by a linear layer, no class token."""

    def __init__(self, *, batch_first: bool = True, norm_first: bool = True) -> None:
        super().__init__()
        self.image_size = SIZE
        self.patches = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(torch.randn(PATCHES, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 64, 0.1, "gelu", batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3)
        tokens = self.patches(patches.permute(0, 2, 1, 3, 4).flatten(2)) + self.position
        if self.batch_first:
            return self.encoder(tokens)
        return self.encoder(tokens.transpose(0, 1)).transpose(0, 1)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    family: str
    prefix: int
    has_class: bool
    mlp_out: str  # where block 2's last linear layer is, from the model
    expected: Callable[[Any, Tensor], Tensor]  # the model's own output
    ours: Callable[[Tensor], Tensor] = lambda normed: normed  # the same from all tokens after the final norm
    gain: float = 1.0


def last_state(model: Any, images: Tensor) -> Tensor:
    return model(images).last_hidden_state


def projected(visual: Callable[[Any], Any]) -> Callable[[Any, Tensor], Tensor]:
    """What an open_clip tower returns, without its projection."""

    def expected(model: Any, images: Tensor) -> Tensor:
        tower = visual(model)
        tower.proj = nn.Parameter(torch.eye(WIDTH))
        return tower(images)

    return expected


def headless(model: Any, images: Tensor) -> Tensor:
    model.heads = nn.Identity()
    return model(images)


CASES = {
    "open_clip": Case(
        clip, "open_clip", 1, True, "visual.transformer.resblocks.2.mlp.c_proj",
        projected(lambda m: m.visual), lambda x: x[:, 0],
    ),
    "open_clip_tower": Case(
        lambda: clip(ls_init_value=1e-5).visual, "open_clip", 1, True, "transformer.resblocks.2.mlp.c_proj",
        projected(lambda m: m), lambda x: x[:, 0], gain=1e-5,
    ),
    "open_clip_sequence_first": Case(
        sequence_first_tower, "open_clip", 1, True, "transformer.resblocks.2.mlp.c_proj",
        projected(lambda m: m), lambda x: x[:, 0],
    ),
    "open_clip_custom_block": Case(
        lambda: clip(qk_norm=True, scale_fc=True).visual, "open_clip", 1, True,
        "transformer.resblocks.2.mlp.c_proj", projected(lambda m: m), lambda x: x[:, 0],
    ),
    "open_clip_no_ln_pre_avg": Case(
        lambda: clip(no_ln_pre=True, pool_type="avg").visual, "open_clip", 1, True,
        "transformer.resblocks.2.mlp.c_proj", projected(lambda m: m), lambda x: x[:, 1:].mean(1),
    ),
    "timm": Case(timm_vit, "timm", 1, True, "blocks.2.mlp.fc2", lambda m, x: m.forward_features(x)),
    "timm_clip": Case(
        lambda: timm_vit(pre_norm=True), "timm", 1, True, "blocks.2.mlp.fc2",
        lambda m, x: m.forward_features(x),
    ),
    "timm_dinov2": Case(
        lambda: timm_vit(init_values=1e-5, num_classes=0), "timm", 1, True, "blocks.2.mlp.fc2",
        lambda m, x: m.forward_features(x), gain=1e-5,
    ),
    "timm_registers": Case(
        lambda: timm_vit(reg_tokens=4, init_values=0.3), "timm", 5, True, "blocks.2.mlp.fc2",
        lambda m, x: m.forward_features(x), gain=0.3,
    ),
    "timm_registers_only": Case(
        lambda: timm_vit(reg_tokens=4, class_token=False, global_pool="avg", fc_norm=False), "timm", 4, False,
        "blocks.2.mlp.fc2", lambda m, x: m.forward_features(x),
    ),
    "timm_no_class": Case(
        lambda: timm_vit(class_token=False, global_pool="avg", fc_norm=False), "timm", 0, False,
        "blocks.2.mlp.fc2", lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
        lambda x: x.mean(1),
    ),
    "timm_swiglu": Case(
        lambda: timm_vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU), "timm", 1, True, "blocks.2.mlp.fc2",
        lambda m, x: m.forward_features(x),
    ),
    "timm_dropping": Case(
        lambda: timm_vit(patch_drop_rate=0.5, drop_path_rate=0.5, proj_drop_rate=0.5), "timm", 1, True,
        "blocks.2.mlp.fc2", lambda m, x: m.forward_features(x),
    ),
    "timm_unnormed": Case(
        lambda: timm_vit(final_norm=False), "timm", 1, True, "blocks.2.mlp.fc2",
        lambda m, x: m.forward_features(x),
    ),
    "timm_oblong": Case(
        lambda: timm_vit(img_size=(16, 48)), "timm", 1, True, "blocks.2.mlp.fc2",
        lambda m, x: m.forward_features(x),
    ),
    "timm_eva_rope": Case(
        lambda: timm.models.eva.Eva(
            img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=5,
            swiglu_mlp=True, use_rot_pos_emb=True, global_pool="token", num_reg_tokens=2,
        ),
        "timm", 3, True, "blocks.2.mlp.fc2", lambda m, x: m.forward_features(x),
    ),
    "timm_eva_registers_only": Case(
        lambda: timm.models.eva.Eva(
            img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=5,
            class_token=False, num_reg_tokens=2, use_fc_norm=False,
        ),
        "timm", 2, False, "blocks.2.mlp.fc2", lambda m, x: m.forward_features(x),
    ),
    "hf_clip": Case(
        hf_clip, "transformers", 1, True, "vision_model.encoder.layers.2.mlp.fc2",
        lambda m, x: m.vision_model(x).pooler_output, lambda x: x[:, 0],
    ),
    "hf_clip_tower": Case(
        lambda: hf_clip().vision_model, "transformers", 1, True, "encoder.layers.2.mlp.fc2",
        lambda m, x: m(x).pooler_output, lambda x: x[:, 0],
    ),
    "hf_dinov2": Case(
        hf_dinov2, "transformers", 1, True, "encoder.layer.2.mlp.fc2", last_state, gain=1e-5
    ),
    "hf_dinov2_swiglu_eager": Case(
        lambda: hf_dinov2(use_swiglu_ffn=True, attn_implementation="eager"), "transformers", 1, True,
        "encoder.layer.2.mlp.down_proj", last_state, gain=1e-5,
    ),
    "hf_dinov2_registers": Case(
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**TINY, **IMAGES, num_register_tokens=4)
        ),
        "transformers", 5, True, "encoder.layer.2.mlp.fc2", last_state,
    ),
    "hf_vit": Case(
        lambda: transformers.ViTModel(transformers.ViTConfig(**TINY, **IMAGES, intermediate_size=64)),
        "transformers", 1, True, "layers.2.mlp.fc2", last_state,
    ),
    "hf_vit_classifier": Case(
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**TINY, **IMAGES, intermediate_size=64)
        ),
        "transformers", 1, True, "vit.layers.2.mlp.fc2", lambda m, x: last_state(m.vit, x),
    ),
    "torchvision": Case(
        lambda: torchvision.models.VisionTransformer(SIZE, PATCH, DEPTH, HEADS, WIDTH, 64),
        "torchvision", 1, True, "encoder.layers.encoder_layer_2.mlp.3",
        headless, lambda x: x[:, 0],
    ),
    "home_made": Case(HomeMade, "structure", 0, False, "encoder.layers.2.linear2", lambda m, x: m(x)),
    "home_made_sequence_first": Case(
        lambda: HomeMade(batch_first=False), "structure", 0, False, "encoder.layers.2.linear2",
        lambda m, x: m(x),
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]


def randomised(case: Case) -> nn.Module:
    """The case's model with all parameters but LayerScale random: no zero bias or token hides a mistake."""
    model = case.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("gamma", "lambda1")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images_for(backbone: Backbone, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *backbone.image_size)


def test_facts(case: Case) -> None:
    model = case.build()
    backbone = Backbone(model)
    assert backbone.model is model
    assert backbone.family == case.family
    assert (backbone.depth, backbone.width) == (DEPTH, WIDTH)
    assert backbone.prefix_tokens == case.prefix
    assert backbone.has_class_token == case.has_class
    height, width = backbone.image_size
    assert backbone.num_tokens == case.prefix + height * width // PATCH**2
    assert backbone.dtype == torch.float32
    assert backbone.device == torch.device("cpu")
    assert all(any(block is m for m in model.modules()) for block in backbone.blocks)


def test_stem_blocks_and_norm_are_the_model(case: Case) -> None:
    model = randomised(case)
    backbone = Backbone(model)
    images = images_for(backbone)
    tokens = backbone.stem(images)
    assert tokens.shape == (3, backbone.num_tokens, WIDTH)
    normed = backbone.norm(backbone.run(tokens, 0, DEPTH))
    torch.testing.assert_close(case.ours(normed), case.expected(model, images), rtol=1e-4, atol=1e-5)


def test_features_are_class_token_and_patch_mean(case: Case) -> None:
    backbone = Backbone(randomised(case))
    last = backbone.run(backbone.stem(images_for(backbone)), 0, DEPTH)
    features = backbone.features(last)
    normed = backbone.norm(last)
    assert features.shape == (3, 2 if case.has_class else 1, WIDTH)
    torch.testing.assert_close(features[:, -1], normed[:, case.prefix :].mean(1))
    if case.has_class:
        torch.testing.assert_close(features[:, 0], normed[:, 0])


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(sorted(CASES)), site=st.integers(0, DEPTH), batch=st.integers(1, 3))
def test_run_can_be_split_anywhere(name: str, site: int, batch: int) -> None:
    torch.manual_seed(0)
    backbone = Backbone(CASES[name].build().eval())
    tokens = backbone.stem(images_for(backbone, batch))
    halves = backbone.run(backbone.run(tokens, 0, site), site, DEPTH)
    torch.testing.assert_close(halves, backbone.run(tokens, 0, DEPTH))


def test_mlp_out_and_its_gain(case: Case) -> None:
    model = randomised(case)
    backbone = Backbone(model)
    linear = backbone.mlp_out(2)
    assert linear is model.get_submodule(case.mlp_out)
    gain = backbone.mlp_gain(2)
    torch.testing.assert_close(gain, torch.full((WIDTH,), case.gain), rtol=1e-6, atol=0)


def test_an_edit_of_mlp_out_adds_what_the_gain_says(case: Case) -> None:
    backbone = Backbone(randomised(case).double())
    tokens = backbone.run(backbone.stem(images_for(backbone).double()), 0, 2)
    linear, gain = backbone.mlp_out(2), backbone.mlp_gain(2)
    hidden: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
    before = backbone.run(tokens, 2, 3)
    delta = torch.randn_like(linear.weight)
    with torch.no_grad():
        linear.weight += delta
    after = backbone.run(tokens, 2, 3)
    handle.remove()
    added = hidden[0] @ delta.T * gain
    if added.shape[0] != tokens.shape[0]:
        added = added.transpose(0, 1)
    torch.testing.assert_close(after - before, added, rtol=1e-6, atol=1e-12)


def test_an_edit_of_attention_adds_what_its_gain_says(case: Case) -> None:
    backbone = Backbone(randomised(case).double())
    tokens = backbone.run(backbone.stem(images_for(backbone).double()), 0, 2)
    found = backbone.attention_out(2)
    assert found is not None
    linear, gain = found
    last, weight = backbone.mlp_out(2), linear.weight
    assert linear is not last
    with torch.no_grad():
        last.weight.zero_()  # what the MLP makes of what attention adds is left out
        expected = backbone.run(tokens, 2, 3)
        with backbone.inputs_of(linear) as seen:
            before = backbone.run(tokens, 2, 3)
            assert linear.weight is weight
        torch.testing.assert_close(before, expected, rtol=1e-9, atol=1e-12)
        delta = torch.randn_like(weight)
        weight += delta
        after = backbone.run(tokens, 2, 3)
    added = seen[0] @ delta.T * gain
    if added.shape[0] != tokens.shape[0]:
        added = added.transpose(0, 1)
    torch.testing.assert_close(after - before, added, rtol=1e-6, atol=1e-12)


def test_gated_mlps_are_told_by_their_widths() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
    plain = VisionTransformer(**sizes)
    two = VisionTransformer(**sizes, mlp_layer=SwiGLU)
    one = VisionTransformer(**sizes, mlp_layer=GluMlp)
    found = [Backbone(model.eval()).gated(1) for model in (plain, two, one)]
    assert found == [False, True, True]


def test_a_run_that_fails_leaves_attention_as_it_was() -> None:
    backbone = Backbone(clip())
    linear, _ = backbone.attention_out(2) or pytest.fail("none found")
    weight, bias = linear.weight, linear.bias

    def fail(_module: nn.Module, _args: Any) -> None:
        raise RuntimeError("in the middle")

    handle = backbone.mlp_out(2).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), backbone.inputs_of(linear):
        backbone.run(backbone.stem(images_for(backbone)), 2, 3)
    handle.remove()
    assert linear.weight is weight
    assert linear.bias is bias


def test_gradients_flow(case: Case) -> None:
    backbone = Backbone(randomised(case))
    tokens = backbone.stem(images_for(backbone)).detach().requires_grad_()
    backbone.features(backbone.run(tokens, 1, DEPTH)).square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
    assert all(p.grad is not None for p in backbone.mlp_out(3).parameters())


def test_building_a_view_changes_nothing(case: Case) -> None:
    model = case.build().train()
    first = next(iter(model.children())).eval()
    flags = [m.training for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    backbone = Backbone(model)
    backbone.mlp_gain(1)
    assert not first.training
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gain_in_half_precision(dtype: torch.dtype) -> None:
    backbone = Backbone(timm_vit(init_values=0.01).to(dtype))
    assert backbone.dtype == dtype
    gain = backbone.mlp_gain(1)
    assert gain.dtype == torch.float32
    torch.testing.assert_close(gain, torch.tensor(0.01, dtype=dtype).float().expand(WIDTH), rtol=0, atol=0)


def test_gain_is_per_channel() -> None:
    model = timm_vit(init_values=1e-5)
    with torch.no_grad():
        model.blocks[1].ls2.gamma.copy_(torch.logspace(-5, 0, WIDTH) * (-1) ** torch.arange(WIDTH))
    torch.testing.assert_close(Backbone(model).mlp_gain(1), model.blocks[1].ls2.gamma.detach())


def test_gain_of_a_mixed_precision_clip() -> None:
    cfg = {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, **IMAGES}
    tower = open_clip.model._build_vision_tower(16, cfg, cast_dtype=torch.bfloat16)
    open_clip.model.convert_weights_to_lp(tower, torch.bfloat16)
    backbone = Backbone(tower)
    assert backbone.dtype == torch.bfloat16
    assert backbone.mlp_gain(0).tolist() == [1.0] * WIDTH


def test_post_norm_blocks_have_no_gain() -> None:
    with pytest.raises(ValueError, match="block 1 is not pre-norm residual"):
        Backbone(HomeMade(norm_first=False)).mlp_gain(1)


def test_blocks_without_linear_layers_have_no_mlp_out() -> None:
    model = HomeMade()
    model.encoder.layers[1].linear2 = nn.Conv1d(PATCHES, PATCHES, 33)
    backbone = Backbone(model)
    with pytest.raises(ValueError, match=r"block 1 called no torch\.nn\.Linear"):
        backbone.mlp_out(1)


def test_blocks_that_gate_their_mlp_have_no_gain() -> None:
    model = timm_vit()
    model.blocks[1].ls2 = nn.SiLU()
    with pytest.raises(ValueError, match="block 1 is not pre-norm residual"):
        Backbone(model).mlp_gain(1)


def test_nan_weights_are_viewed_like_any_others() -> None:
    model = timm_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[0] = float("nan")
    backbone = Backbone(model)
    assert backbone.prefix_tokens == 1
    assert backbone.run(backbone.stem(images_for(backbone)), 0, DEPTH).isnan().any()


def test_normalisation() -> None:
    clip_mean = (0.48145466, 0.4578275, 0.40821073)
    imagenet_mean = (0.485, 0.456, 0.406)
    assert Backbone(clip()).mean == clip_mean
    assert Backbone(hf_clip()).mean == clip_mean
    assert Backbone(hf_dinov2()).mean == imagenet_mean
    assert Backbone(CASES["hf_vit"].build()).std == (0.5, 0.5, 0.5)
    assert Backbone(CASES["torchvision"].build()).mean == imagenet_mean
    assert Backbone(HomeMade()).mean == (0.5, 0.5, 0.5)
    model = timm_vit()
    assert Backbone(model).mean == (0.5, 0.5, 0.5)
    model.pretrained_cfg = {"mean": [0.1, 0.2, 0.3], "std": (0.4, 0.5, 0.6)}
    assert Backbone(model).mean == (0.1, 0.2, 0.3)
    assert Backbone(model).std == (0.4, 0.5, 0.6)
    tower = clip()
    open_clip.model.set_model_preprocess_cfg(tower, {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    assert Backbone(tower).mean == (0.1, 0.2, 0.3)


def test_image_size_can_be_given() -> None:
    backbone = Backbone(timm_vit(dynamic_img_size=True), image_size=(16, 64))
    assert (backbone.image_size, backbone.num_tokens) == ((16, 64), 17)
    model = HomeMade()
    del model.image_size
    with pytest.raises(NotAViTError, match="image_size: not given"):
        Backbone(model)
    assert Backbone(model, image_size=(SIZE, SIZE)).num_tokens == PATCHES
    with pytest.raises(NotAViTError, match="does not take images of shape"):
        Backbone(model, image_size=(16, 16))


class Unruly(HomeMade):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3)
        tokens = self.patches(patches.permute(0, 2, 1, 3, 4).flatten(2)) + self.position
        if self.how == "blank":
            tokens = tokens * 0
        layers = list(self.encoder.layers)
        if self.how == "idle":
            return tokens
        if self.how == "reordered":
            layers[1], layers[2] = layers[2], layers[1]
        for layer in layers:
            tokens = layer(tokens) + (1 if self.how == "skipping" else 0)
        return tokens


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("blank", "depends on the image"),
        ("idle", "does not call"),
        ("reordered", "not once each, in order"),
        ("skipping", "what the one before returned"),
    ],
)
def test_unruly_models_are_refused(how: str, message: str) -> None:
    with pytest.raises(NotAViTError, match=message):
        Backbone(Unruly(how))


def text_transformer() -> nn.Module:
    return open_clip.transformer.TextTransformer(8, 50, WIDTH, HEADS, DEPTH)


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (lambda: nn.Linear(3, 3), "found none in Linear"),
        (lambda: torchvision.models.resnet18(), "found none in ResNet"),
        (lambda: timm.models.ConvNeXt(depths=(2, 2, 2, 2), dims=(8, 8, 8, 8)), "ConvNeXtStage"),
        (text_transformer, "does not take images"),
        (lambda: nn.ModuleDict({"a": HomeMade(), "b": HomeMade()}), "HomeMade, which does not take images"),
    ],
)  # fmt: skip
def test_other_models_are_refused(build: Callable[[], nn.Module], found: str) -> None:
    with pytest.raises(NotAViTError, match=found) as caught:
        Backbone(build(), image_size=(64, 64))
    assert "at least 3 blocks" in str(caught.value) or "does not take images" in found


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(TypeError, match=r"model: wanted a torch.nn.Module, got str"):
        Backbone("ViT-L-14")  # type: ignore[arg-type]
    for size in ((32, 0), (32, -8), (32.0, 32.0), 32, (3, 32, 32), [32, 32], (True, True)):
        with pytest.raises(TypeError, match="image_size: wanted a pair"):
            Backbone(timm_vit(), image_size=size)  # type: ignore[arg-type]
    backbone = Backbone(timm_vit())
    with pytest.raises(TypeError, match="images: wanted a floating-point tensor"):
        backbone.stem(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images: wanted shape \(B, 3, 32, 32\), got .*\(1, 3, 16, 32\)"):
        backbone.stem(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match=r"tokens: wanted .*\(B, N, 32\)"):
        backbone.run(torch.zeros(1, 17, 31), 0, 1)
    with pytest.raises(ValueError, match="tokens: wanted"):
        backbone.features(torch.zeros(17, WIDTH))
    for start, stop in ((-1, 2), (2, 1), (0, 5)):
        with pytest.raises(ValueError, match="start, stop: wanted"):
            backbone.run(torch.zeros(1, 17, WIDTH), start, stop)
    for index in (-1, 4):
        with pytest.raises(ValueError, match="index: wanted 0 <= index < 4"):
            backbone.mlp_gain(index)


def test_no_model_library_is_imported() -> None:
    code = (
        "import sys, activemark_fast.backbone;"
        "sys.exit(str({'timm', 'open_clip', 'transformers', 'torchvision'} & set(sys.modules)) != 'set()')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
