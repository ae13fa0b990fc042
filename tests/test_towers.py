"""Image towers of every shape: found by structure, run block by block, marked and verified."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from test_backbone import HomeMade, timm_vit
from torch import Tensor, nn

from activemark_fast import Key, embed, verify
from activemark_fast.attacks.noise import noise
from activemark_fast.backbone import Backbone, NotAViTError
from activemark_fast.embedding import Embedding
from activemark_fast.towers import find_towers
from activemark_fast.watermark import fingerprint

KEY = Key(b"k" * 32)
WIDTH, DEPTH = 96, 5
VIT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
}
IMAGES: dict[str, Any] = {"image_size": 64, "patch_size": 16}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
STAGES = (1, 1, DEPTH, 1)
WIDTHS = (24, 48, WIDTH, 192)


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VIT, **IMAGES),
        text_config=transformers.LlamaConfig(**TEXT),
    )
    return transformers.LlavaForConditionalGeneration(config)


def pixtral() -> nn.Module:
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**VIT, **IMAGES),
        text_config=transformers.MistralConfig(**TEXT),
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def qwen() -> nn.Module:
    vision = {"depth": DEPTH, "hidden_size": WIDTH, "intermediate_size": 192, "out_hidden_size": 32}
    blocks = {"num_heads": 4, "fullatt_block_indexes": [1, 4], "window_size": 56}
    text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision | blocks, text_config=text)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


class Masked(HomeMade):
    """Hands its blocks a mask of as many rows as there are images."""

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)
        tokens = self.patches(patches.permute(0, 2, 1, 3, 4).flatten(2)) + self.position
        for layer in self.encoder.layers:
            tokens = layer(tokens, src_key_padding_mask=torch.zeros(tokens.shape[:2], dtype=torch.bool))
        return tokens


@dataclass(frozen=True)
class Case:
    build: Callable[[], Any]
    tower: str
    tokens: int
    mlp_out: str  # where block 2's last linear layer is, from the tower
    width: int = WIDTH
    depth: int = DEPTH


CASES = {
    "in LLaVA": Case(llava, "model.vision_tower", 17, "encoder.layers.2.mlp.fc2"),
    "in an encoder-decoder": Case(
        lambda: transformers.VisionEncoderDecoderModel(
            transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
                transformers.ViTConfig(**VIT, **IMAGES),
                transformers.GPT2Config(
                    n_embd=32, n_layer=9, n_head=2, vocab_size=99, add_cross_attention=True,
                    bos_token_id=1, eos_token_id=2,
                ),
            )
        ),
        "encoder", 17, "layers.2.mlp.fc2",
    ),
    "packed by Qwen2.5-VL": Case(qwen, "model.visual", 256, "blocks.2.mlp.down_proj"),
    "packed by Pixtral": Case(
        pixtral, "model.vision_tower", 16, "transformer.layers.2.feed_forward.down_proj"
    ),
    "flat patches of SigLIP 2": Case(
        lambda: transformers.Siglip2VisionModel(
            transformers.Siglip2VisionConfig(**VIT, patch_size=32, num_patches=49)
        ),
        "", 49, "encoder.layers.2.mlp.fc2",
    ),
    "maps of SAM": Case(
        lambda: timm.create_model(
            "samvit_base_patch16", embed_dim=WIDTH, depth=DEPTH, num_heads=4, img_size=128, window_size=4,
            global_attn_indexes=(1, 4), num_classes=0,
        ),
        "", 64, "blocks.2.mlp.fc2",
    ),
    "maps of ViTDet, channels first": Case(
        lambda: transformers.VitDetModel(
            transformers.VitDetConfig(
                hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, mlp_ratio=2, **IMAGES
            )
        ),
        "", 16, "encoder.layer.2.mlp.fc2",
    ),
    "videos": Case(
        lambda: transformers.VideoMAEModel(transformers.VideoMAEConfig(**VIT, **IMAGES, num_frames=4)),
        "", 32, "encoder.layer.2.output.dense",
    ),
    "masking": Case(
        lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**VIT, **IMAGES)),
        "", 17, "layers.2.mlp.fc2",
    ),
    "Swin": Case(
        lambda: timm.models.SwinTransformer(
            64, 4, embed_dim=24, depths=STAGES, num_heads=(1, 2, 3, 6), window_size=4, num_classes=3
        ),
        "", 16, "layers.2.blocks.2.mlp.fc2",
    ),
    "Swin of torchvision": Case(
        lambda: torchvision.models.SwinTransformer(
            [4, 4], 24, list(STAGES), [1, 2, 3, 6], [4, 4], num_classes=3
        ),
        "", 196, "features.5.2.mlp.3",
    ),
    "ConvNeXt": Case(
        lambda: timm.models.ConvNeXt(depths=STAGES, dims=WIDTHS, num_classes=3),
        "", 196, "stages.2.blocks.2.mlp.fc2",
    ),
    "ConvNeXt with 1 x 1 convolutions": Case(
        lambda: timm.models.ConvNeXt(depths=STAGES, dims=WIDTHS, conv_mlp=True, num_classes=3),
        "", 196, "stages.2.blocks.2.mlp.fc2",
    ),
    "Segformer": Case(
        lambda: transformers.SegformerModel(
            transformers.SegformerConfig(
                depths=list(STAGES), hidden_sizes=list(WIDTHS), num_attention_heads=[1, 2, 3, 6]
            )
        ),
        "", 196, "stages.2.blocks.2.mlp.fc2",
    ),
    "Hiera": Case(
        lambda: timm.models.Hiera((64, 64), embed_dim=24, num_heads=1, stages=STAGES),
        "", 16, "blocks.5.mlp.fc2", depth=DEPTH - 1,  # the first block of the stage halves the map
    ),
    "a mask for each image": Case(Masked, "", 16, "encoder.layers.2.linear2", width=32, depth=4),
}  # fmt: skip


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """The model with weights of the size that trained ones have: no zero hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(values * max(1, parameter[0].numel()) ** -0.5)
        else:
            parameter.copy_(0.02 * values if name.endswith("bias") else 1 + 0.1 * values)
    return model.eval()


def marked(model: nn.Module, **settings: Any) -> Embedding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return embed(model, KEY, **({"bits": 32, "fidelity": 0.95} | settings))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]


def size_of(case: Case) -> tuple[int, int] | None:
    return (64, 64) if case.build is CASES["Hiera"].build else None  # which does not say it


def test_what_is_found(case: Case) -> None:
    model = case.build().eval()
    backbone = Backbone(model, image_size=size_of(case))
    assert backbone.tower == case.tower
    assert backbone.encoder is model.get_submodule(case.tower)
    assert (backbone.depth, backbone.width, backbone.num_tokens) == (case.depth, case.width, case.tokens)
    assert backbone.carrier(2) is backbone.encoder.get_submodule(case.mlp_out)


def test_the_blocks_run_as_within_the_model(case: Case) -> None:
    backbone = Backbone(trained(case.build()), image_size=size_of(case))
    images = torch.randn(3, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    left: list[Tensor] = []
    handle = backbone.blocks[-1].register_forward_hook(
        lambda _m, _a, out: left.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        backbone.final_tokens(backbone.run(backbone.stem(images[:1]), 0, backbone.depth))
        left.clear()
        tokens = backbone.stem(images)
        assert tokens.shape == (3, case.tokens, case.width)
        halves = backbone.run(backbone.run(tokens, 0, 2), 2, backbone.depth)
        (ours,) = left
        one = backbone.run(backbone.stem(images[1:2]), 0, backbone.depth)
    handle.remove()
    assert halves.shape == tokens.shape
    torch.testing.assert_close(backbone.batch_first(ours, 3), halves)
    torch.testing.assert_close(one, halves[1:2], rtol=1e-4, atol=1e-4)  # whatever stands beside it


def test_an_edit_adds_what_the_gain_says(case: Case) -> None:
    if case.build is Masked:
        pytest.skip("post-norm")
    backbone = Backbone(trained(case.build()).double(), image_size=size_of(case))
    images = torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0)).double()
    seen: list[Tensor] = []
    with torch.no_grad():
        tokens = backbone.run(backbone.stem(images), 0, 2)
        gain = backbone.mlp_gain(2)
        handle = backbone.carrier(2).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        before = backbone.run(tokens, 2, 3)
        handle.remove()
        matrix = backbone.mlp_matrix(2)
        change = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1)).to(matrix)
        matrix += change
        after = backbone.run(tokens, 2, 3)
    added = backbone.hidden(backbone.carrier(2), seen[0], 2) @ change.T * gain
    torch.testing.assert_close(after - before, added, rtol=1e-6, atol=1e-9)


def test_features_are_those_of_the_whole_tower() -> None:
    model = trained(CASES["Swin"].build())
    backbone = Backbone(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = backbone.features(backbone.run(backbone.stem(images), 0, DEPTH))
        expected = model.forward_features(images).mean(dim=(1, 2))
    torch.testing.assert_close(features[:, 0], expected)


@pytest.mark.parametrize("name", ["in LLaVA", "packed by Pixtral", "Swin"])
def test_marked_and_verified(name: str) -> None:
    model = trained(CASES[name].build())
    embedding = marked(model)
    verdict = verify(embedding.model, embedding.watermark, KEY)
    assert (verdict.decision, verdict.identical) == ("match", True)
    assert verify(noise(embedding.model, None, 0, 0.02), embedding.watermark, KEY).decision == "match"
    assert verify(model, embedding.watermark, KEY).decision != "match"
    outside = [n for n, _ in model.named_parameters() if not n.startswith(CASES[name].tower)]
    theirs = dict(embedding.model.named_parameters())
    assert all(torch.equal(model.get_parameter(n), theirs[n]) for n in outside)


def test_in_place_the_language_model_is_neither_run_nor_copied() -> None:
    model = trained(llava())
    beside = model.model.language_model
    beside.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    type(beside).__deepcopy__ = lambda *_: pytest.fail("it was copied")
    try:
        inner = model.model.vision_tower
        embedding = marked(model, inplace=True)
        assert embedding.model is model
        assert model.model.vision_tower is inner
        assert verify(model, embedding.watermark, KEY).identical
    finally:
        del type(beside).__deepcopy__


def test_of_several_towers_one_is_chosen_and_said() -> None:
    model = nn.ModuleDict({"left": trained(timm_vit(embed_dim=WIDTH, num_heads=4, depth=5)),
                           "right": trained(timm_vit(embed_dim=WIDTH, num_heads=4, depth=6))})  # fmt: skip
    assert Backbone(model).towers == ("right", "left")
    embedding = marked(model, tower="left")
    assert "in the tower 'left', not in 'right'" in embedding.site_reason
    assert fingerprint(embedding.model["right"]) == fingerprint(model["right"])
    assert verify(embedding.model, embedding.watermark, KEY).decision == "match"
    assert verify(embedding.model["left"], embedding.watermark, KEY).decision == "match"
    assert verify(embedding.model["right"], embedding.watermark, KEY).decision != "match"
    with pytest.raises(ValueError, match="tower: wanted one of 'right', 'left', got 'middle'"):
        embed(model, KEY, tower="middle")


def test_a_masking_model_is_left_as_it_was() -> None:
    model = CASES["masking"].build()
    before = copy.deepcopy(model.config.to_dict())
    Backbone(model)
    assert model.config.to_dict() == before


class Conditioned(HomeMade):
    """Its blocks are told something of the image besides its tokens."""

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)
        tokens = self.patches(patches.permute(0, 2, 1, 3, 4).flatten(2)) + self.position
        for layer in self.encoder.layers:
            tokens = layer(tokens, src_mask=images.mean() * torch.ones(16, 16))
        return tokens


class Normalised(HomeMade):
    """With a batch norm before its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.before(images))


def relu_after_the_sum() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 5, 1], num_classes=2)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Conditioned, "further arguments do not depend on the image"),
        (lambda: HomeMade(norm_first=False), "block 1 is not pre-norm residual"),
        (Normalised, "batch norms have never seen an image"),
        (lambda: trained(relu_after_the_sum()), "block 1 is not pre-norm residual"),
        (lambda: torchvision.models.vgg11(num_classes=2), "found none in VGG"),
    ],
)
def test_what_cannot_be_marked_is_refused_in_one_sentence(build: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        embed(build().eval(), KEY, bits=8)
    assert "\n" not in str(caught.value)


def test_a_text_tower_is_no_image_tower() -> None:
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(hidden_size=32, num_attention_heads=2))
    with pytest.raises(NotAViTError, match="takes token ids, and images only beside them"):
        find_towers(text, (32, 32))
