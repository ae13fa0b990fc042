"""Families of vision models as their libraries build them, at small settings, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import timm
import torchvision
import transformers
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

Build = Callable[[], nn.Module]
Settings = dict[str, Any]

WIDTH = 96
SIDE = 64
VIT: Settings = {"embed_dim": WIDTH, "depth": 6, "num_heads": 4}
HF: Settings = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
IMAGES: Settings = {"image_size": SIDE, "patch_size": 16}
QWEN: Settings = {"depth": 6, "hidden_size": WIDTH, "intermediate_size": 192, "num_heads": 4}
TEXT: Settings = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLM = TEXT | {"num_key_value_heads": 2}
STAGES, WIDTHS, HEADS = (1, 1, 6, 1), (24, 48, WIDTH, 192), (1, 2, 3, 6)
SIZES: Settings = {"depths": list(STAGES), "hidden_sizes": list(WIDTHS)}

ANY_SIZE = (
    "efficientformer_l1", "efficientvit_m0", "gemma4_vit_167m", "caformer_s18",
    "poolformer_s12", "convmixer_768_32", "resnetv2_50", "resnet50", "shvit_s1",
)  # fmt: skip
"""What is not told its images' size in pixels, which its settings here say nevertheless."""


def of_timm() -> dict[str, Build]:
    """Families of timm."""

    def plain(side: int, *names: str, **more: Any) -> dict[str, Settings]:
        return {name: {**VIT, "img_size": side, **more} for name in names}

    settings: dict[str, Settings] = {
        **plain(
            SIDE,
            "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
            "deit3_small_patch16_224", "beit_base_patch16_224", "beitv2_base_patch16_224",
            "vit_base_patch16_siglip_224", "vit_base_patch16_clip_224", "vit_small_patch16_dinov3",
            "vit_relpos_small_patch16_224", "vit_pe_core_tiny_patch16_384", "vit_base_patch16_rope_224",
            "vit_small_patch16_rope_mixed_224", "vit_small_plus_patch16_dinov3",
            "vit_so150m_patch16_reg4_gap_256", "vit_base_patch16_xp_224", "cait_xxs24_224",
            "xcit_nano_12_p16_224", "flexivit_small", "convit_tiny", "vit_pe_spatial_tiny_patch16_512",
            "vit_small_patch16_18x2_224", "vit_betwixt_patch16_reg4_gap_256", "eva02_base_patch16_clip_224",
            "beit3_base_patch16_224", "vit_base_patch16_rpn_224",
        ),
        **plain(
            56,
            "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224",
            "eva_large_patch14_196", "aimv2_large_patch14_224",
        ),
        "naflexvit_base_patch16_gap": {**VIT, "img_size": SIDE},
        "gemma4_vit_167m": {**VIT, "img_size": 96},
        "qwen3_vit_88m": {**VIT, "img_size": SIDE},
        "deepseek_vit_412m": {**VIT, "img_size": 84},
        "vit_tiny_r_s16_p8_224": {"img_size": 128, "depth": 6},
        "vitamin_small_224": {"img_size": SIDE},
        "samvit_base_patch16": {**VIT, "img_size": 128, "window_size": 4, "global_attn_indexes": (2, 5)},
        "hieradet_small": {"embed_dim": 24, "stages": STAGES, "num_heads": 1},
        "pit_ti_224": {"img_size": SIDE},
        "tnt_s_patch16_224": {"img_size": SIDE},
        "coat_lite_tiny": {},
        "swin_tiny_patch4_window7_224": {
            "embed_dim": 24, "depths": STAGES, "num_heads": HEADS, "img_size": SIDE, "window_size": 4,
        },
        "swin_s3_tiny_224": {"img_size": SIDE},
        "swinv2_tiny_window8_256": {
            "embed_dim": 24, "depths": STAGES, "num_heads": HEADS, "img_size": SIDE, "window_size": 4,
        },
        "swinv2_cr_tiny_224": {
            "embed_dim": 24, "depths": STAGES, "num_heads": HEADS, "img_size": SIDE, "window_size": 2,
        },
        "hiera_tiny_224": {"embed_dim": 24, "num_heads": 1, "stages": STAGES, "img_size": (128, 128)},
        "mvitv2_tiny": {"img_size": SIDE},
        "nest_tiny": {"img_size": SIDE},
        "twins_svt_small": {"img_size": SIDE, "embed_dims": WIDTHS, "num_heads": HEADS, "depths": STAGES},
        "visformer_tiny": {"img_size": SIDE},
        "levit_128s": {"img_size": 128},
        "tiny_vit_5m_224": {},
        "davit_tiny": {"depths": STAGES, "embed_dims": WIDTHS, "num_heads": HEADS,},
        "convnext_tiny": {"depths": STAGES, "dims": WIDTHS},
        "convnext_zepto_rms": {},
        "convnextv2_tiny": {"depths": STAGES, "dims": WIDTHS},
        "pvt_v2_b2": {"depths": STAGES, "embed_dims": WIDTHS, "num_heads": HEADS},
        "inception_next_atto": {},
        "mambaout_femto": {"depths": STAGES, "dims": WIDTHS},
        "volo_d1_224": {"img_size": SIDE},
        "caformer_s18": {"img_size": SIDE},
        "poolformer_s12": {"img_size": SIDE},
        "convmixer_768_32": {"img_size": SIDE},
        "sequencer2d_s": {"img_size": SIDE, "embed_dims": (24, 48, WIDTH, WIDTH), "layers": STAGES},
        "coatnet_nano_rw_224": {"img_size": SIDE},
        "maxvit_rmlp_pico_rw_256": {"img_size": SIDE},
        "efficientformer_l1": {"img_size": 224, "embed_dims": WIDTHS, "depths": STAGES},
        "efficientformerv2_s0": {},
        "efficientvit_b0": {},
        "efficientvit_m0": {"img_size": 224},
        "fastvit_mci0": {},
        "mobilevitv2_050": {},
        "mobilevit_xxs": {},
        "edgenext_xx_small": {},
        "gcvit_xxtiny": {},
        "nextvit_small": {},
        "repvit_m0_9": {},
        "shvit_s1": {"img_size": 256},
        "starnet_s1": {},
        "swiftformer_xs": {},
        "iformer_t": {},
        "fasternet_t0": {},
        "ghostnet_050": {},
        "mobilenetv3_small_050": {},
        "efficientnet_b0": {},
        "resnet50": {"img_size": SIDE},
        "resnetv2_50": {"img_size": SIDE},
        "vgg11": {},
        "densenet121": {},
        "regnety_002": {},
    }  # fmt: skip

    def build(name: str, more: Settings) -> Build:
        side = more.get("img_size", SIDE)
        side = side[0] if isinstance(side, tuple) else side
        fixed = {key: value for key, value in more.items() if key != "img_size" or name not in ANY_SIZE}
        return lambda: timm.create_model(
            name, num_classes=4, pretrained_cfg_overlay={"input_size": (3, side, side)}, **fixed
        )

    built = {name: build(name, more) for name, more in settings.items()}
    narrow: Settings = {"img_size": SIDE, "embed_dim": WIDTH, "num_blocks": 6, "num_classes": 4}
    built["MLP-Mixer"] = lambda: timm.models.MlpMixer(patch_size=16, **narrow)
    mixers = timm.models.mlp_mixer
    built["ResMLP"] = lambda: timm.models.MlpMixer(
        patch_size=16, block_layer=mixers.ResBlock, norm_layer=mixers.Affine, mlp_ratio=4, **narrow
    )
    built["gMLP"] = lambda: timm.models.MlpMixer(
        patch_size=16, block_layer=mixers.SpatialGatingBlock, mlp_layer=mixers.GatedMlp, mlp_ratio=6, **narrow
    )
    built["FocalNet"] = lambda: timm.models.FocalNet(embed_dim=24, depths=STAGES, num_classes=4)
    return {f"timm {name}": built[name] for name in built}


def of_transformers() -> dict[str, Build]:
    """Families of transformers."""

    def one(name: str, **more: Any) -> Build:
        def build() -> nn.Module:
            made = getattr(transformers, name, None) or getattr(transformers, f"{name}Model")
            return made(made.config_class(**more))

        return build

    plain = (
        "ViT", "DeiT", "ViTMSN", "IJepa", "SiglipVision", "CLIPVision", "MetaClip2Vision", "Data2VecVision",
        "Beit", "ViTMAE", "DINOv3ViT", "VitDet", "Aimv2Vision", "MLCDVision", "BlipVision", "Blip2Vision",
        "InstructBlipVision", "InstructBlipVideoVision", "ChineseCLIPVision", "AltCLIPVision",
        "CLIPSegVision", "OwlViTVision", "Owlv2Vision", "FlavaImage", "GitVision", "JanusVision",
        "Phi4MultimodalVision", "PixtralVision", "InternVLVision", "QianfanOCRVision", "MiniMaxM3VLVision",
        "Cosmos3EdgeVision", "HunYuanVLVisionTransformer", "MiniCPMV4_7Vision", "Kimi_K25Vision",
        "PaddleOCRVision", "Pix2StructVision", "DPT", "Radio", "Sapiens2", "Pixio", "SegGpt",
        "XCLIPVision", "ImageGPT", "GroupViTVision", "Vilt", "Tipsv2Vision", "VideoPrismVision",
        "Step3p7Vision", "GlmOcrVision", "PPFormulaNetVision", "VideoLlama3Vision", "Qwen3VLMoeVision",
        "Gemma4Vision", "Cvt",
    )  # fmt: skip
    built = {name: one(name, **HF, **IMAGES) for name in plain}
    swin: Settings = {
        "embed_dim": 24, "depths": STAGES, "num_heads": HEADS, "window_size": 4, "image_size": 128,
    }  # fmt: skip
    dino = {key: value for key, value in HF.items() if key != "intermediate_size"}
    sam: Settings = {**HF, "image_size": 128, "patch_size": 16, "window_size": 4, "mlp_dim": 192}
    built |= {
        "DINOv3ViT, gated": one("DINOv3ViT", **HF, **IMAGES, use_gated_mlp=True),
        "Yolos": one("Yolos", **HF, image_size=[SIDE, SIDE], patch_size=16, num_detection_tokens=4),
        "Dinov2": one("Dinov2", **dino, **IMAGES, mlp_ratio=2),
        "Dinov2, SwiGLU": one("Dinov2", **dino, **IMAGES, mlp_ratio=2, use_swiglu_ffn=True),
        "Dinov2WithRegisters": one("Dinov2WithRegisters", **dino, **IMAGES, mlp_ratio=2),
        "Siglip2Vision": one("Siglip2Vision", **HF, patch_size=32, num_patches=49),
        "VideoMAE": one("VideoMAE", **HF, **IMAGES, num_frames=4),
        "Timesformer": one("Timesformer", **HF, **IMAGES, num_frames=4),
        "Vivit": one("Vivit", **HF, image_size=SIDE, num_frames=4),
        "VJEPA2": one(
            "VJEPA2", **HF, patch_size=16, crop_size=SIDE, frames_per_clip=4, pred_hidden_size=48,
            pred_num_hidden_layers=2, pred_num_attention_heads=2,
        ),
        "Swin": one("Swin", **swin),
        "Swinv2": one("Swinv2", **swin),
        "DonutSwin": one("DonutSwin", **swin),
        "FocalNet": one("FocalNet", image_size=SIDE, embed_dim=24, depths=STAGES),
        "ConvNext": one("ConvNext", **SIZES, image_size=128),
        "ConvNextV2": one("ConvNextV2", **SIZES, image_size=128),
        "DINOv3ConvNext": one("DINOv3ConvNext", **SIZES, image_size=128),
        "Segformer": one("Segformer", **SIZES, num_attention_heads=list(HEADS), image_size=128),
        "PvtV2": one("PvtV2", **SIZES, num_attention_heads=list(HEADS), image_size=128),
        "Hiera": one(
            "Hiera", embed_dim=24, depths=list(STAGES), num_heads=[1, 2, 4, 8], image_size=[128, 128]
        ),
        "PoolFormer": one("PoolFormer", **SIZES, image_size=128),
        "SwiftFormer": one("SwiftFormer", image_size=SIDE),
        "MobileViT": one("MobileViT", image_size=SIDE),
        "ResNet": one("ResNet", **SIZES, image_size=128),
        "Llama4Vision": one(
            "Llama4Vision", **{**HF, "intermediate_size": 384}, **IMAGES, vision_output_dim=64,
            projector_input_dim=64, projector_output_dim=64,
        ),
        "MllamaVision": one(
            "MllamaVision", **{key: value for key, value in HF.items() if key != "num_attention_heads"},
            **IMAGES, attention_heads=4, num_global_layers=4, max_num_tiles=4, vision_output_dim=192,
            intermediate_layers_indices=[2],
        ),
        "Molmo2Vision": one(
            "Molmo2Vision", **HF, image_size=[SIDE, SIDE], patch_size=16, head_dim=24, num_key_value_heads=4
        ),
        "Qwen3_5Vision": one(
            "Qwen3_5Vision", **QWEN, out_hidden_size=32, num_position_embeddings=16, image_size=SIDE
        ),
        "Glm4vVision": one("Glm4vVision", **QWEN, **IMAGES, out_hidden_size=192),
        "GlmImageVision": one("GlmImageVision", **QWEN, **IMAGES),
        "Ernie4_5_VLMoeVision": one(
            "Ernie4_5_VLMoeVisionTransformerPretrainedModel", **QWEN, **IMAGES
        ),
        "Exaone4_5Vision": one(
            "Exaone4_5_VisionModel", **QWEN, **IMAGES, out_hidden_size=32, num_key_value_heads=4
        ),
        "SamVision": one("SamVision", **sam, global_attn_indexes=[2, 5], output_channels=32),
        "SamHQVision": one("SamHQVision", **sam, global_attn_indexes=[2, 5], output_channels=32),
        "Sam2HieraDet": one(
            "Sam2HieraDet", hidden_size=24, num_attention_heads=1, blocks_per_stage=list(STAGES),
            embed_dim_per_stage=list(WIDTHS), num_attention_heads_per_stage=[1, 2, 4, 8],
            image_size=[128, 128],
            global_attention_blocks=[5], window_positional_embedding_background_size=[7, 7],
        ),
        "Sam3ViT": one("Sam3ViT", **HF, image_size=112, patch_size=14, window_size=4, pretrain_image_size=56),
    }  # fmt: skip
    return {f"transformers {name}": build for name, build in (built | larger_models()).items()}


def larger_models() -> dict[str, Build]:
    """Towers of transformers inside larger models."""

    def around(name: str, vision: str, **more: Any) -> Build:
        def build() -> nn.Module:
            inner = getattr(transformers, f"{vision}Config")(**HF, **(IMAGES | more))
            config = getattr(transformers, f"{name}Config")(
                vision_config=inner, text_config=transformers.LlamaConfig(**LLM)
            )
            return getattr(transformers, f"{name}ForConditionalGeneration")(config)

        return build

    def gemma(name: str, text: str) -> Build:
        def build() -> nn.Module:
            more = {"mm_tokens_per_image": 4} if name == "Gemma3" else {}
            config = getattr(transformers, f"{name}Config")(
                vision_config=transformers.SiglipVisionConfig(**HF, **IMAGES),
                text_config=getattr(transformers, text)(**LLM, head_dim=16),
                **more,
            )
            return getattr(transformers, f"{name}ForConditionalGeneration")(config)

        return build

    def qwen(name: str, **vision: Any) -> Build:
        text = LLM | {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
        seen = {"depth": 6, "num_heads": 4, "image_size": SIDE, **vision}
        config = getattr(transformers, f"{name}Config")
        model = getattr(transformers, f"{name}ForConditionalGeneration")
        return lambda: model(config(vision_config=seen, text_config=text))

    def sam() -> nn.Module:
        vision = {**HF, "image_size": 128, "patch_size": 16, "window_size": 4, "mlp_dim": 192}
        return transformers.SamModel(
            transformers.SamConfig(vision_config=vision | {"global_attn_indexes": [2, 5]})
        )

    def mllama() -> nn.Module:
        vision = {
            "hidden_size": WIDTH, "intermediate_size": 192, "num_hidden_layers": 6, **IMAGES,
            "attention_heads": 4, "num_global_layers": 4, "max_num_tiles": 4, "vision_output_dim": 192,
            "intermediate_layers_indices": [2],
        }  # fmt: skip
        text = LLM | {"cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}}
        config = transformers.MllamaConfig(vision_config=vision, text_config=text)
        return transformers.MllamaForConditionalGeneration(config)

    def two_towers(name: str, head: str, **more: Any) -> Build:
        return lambda: getattr(transformers, head)(
            getattr(transformers, f"{name}Config")(
                text_config=TEXT, vision_config={**HF, **IMAGES}, projection_dim=32, **more
            )
        )

    def encoder_decoder() -> nn.Module:
        return transformers.VisionEncoderDecoderModel(
            encoder=transformers.ViTModel(transformers.ViTConfig(**HF, **IMAGES)),
            decoder=transformers.BertLMHeadModel(
                transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
            ),
        )

    def on_backbone(head: str, config: str, **more: Any) -> Build:
        def build() -> nn.Module:
            inner = transformers.Dinov2Config(
                hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=4, mlp_ratio=2, image_size=56,
                out_indices=[2, 3, 4, 6], reshape_hidden_states=False, apply_layernorm=True,
            )  # fmt: skip
            return getattr(transformers, head)(getattr(transformers, config)(backbone_config=inner, **more))

        return build

    return {
        "Llava": around("Llava", "CLIPVision"),
        "LlavaNext": around("LlavaNext", "CLIPVision"),
        "LlavaOnevision": around("LlavaOnevision", "SiglipVision"),
        "VipLlava": around("VipLlava", "CLIPVision"),
        "VideoLlava": around("VideoLlava", "CLIPVision"),
        "Idefics2": around("Idefics2", "Idefics2Vision"),
        "Idefics3": around("Idefics3", "Idefics3Vision"),
        "SmolVLM": around("SmolVLM", "SmolVLMVision"),
        "AyaVision": around("AyaVision", "SiglipVision"),
        "InternVL": around("InternVL", "InternVLVision", image_size=(SIDE, SIDE), patch_size=(16, 16)),
        "Mistral3 (Pixtral)": around("Mistral3", "PixtralVision"),
        "PaliGemma": gemma("PaliGemma", "GemmaConfig"),
        "Gemma3": gemma("Gemma3", "Gemma3TextConfig"),
        "Qwen2-VL": qwen("Qwen2VL", embed_dim=WIDTH, hidden_size=32, mlp_ratio=2),
        "Qwen2.5-VL": qwen(
            "Qwen2_5_VL", hidden_size=WIDTH, intermediate_size=192, out_hidden_size=32,
            fullatt_block_indexes=[2, 5],
        ),
        "Qwen3-VL": qwen(
            "Qwen3VL", hidden_size=WIDTH, intermediate_size=192, out_hidden_size=32,
            deepstack_visual_indexes=[2, 4], num_position_embeddings=16,
        ),
        "Mllama": mllama,
        "Sam": sam,
        "CLIP": two_towers("CLIP", "CLIPModel"),
        "Siglip": two_towers("Siglip", "SiglipModel"),
        "ChineseCLIP": two_towers("ChineseCLIP", "ChineseCLIPModel"),
        "OwlViT": two_towers("OwlViT", "OwlViTForObjectDetection"),
        "CLIPSeg": two_towers(
            "CLIPSeg", "CLIPSegForImageSegmentation", extract_layers=[1, 2, 3], reduce_dim=32,
            decoder_num_attention_heads=2,
        ),
        "VisionEncoderDecoder": encoder_decoder,
        "DepthAnything": on_backbone(
            "DepthAnythingForDepthEstimation", "DepthAnythingConfig", reassemble_hidden_size=WIDTH,
            neck_hidden_sizes=[24, 24, 24, 24], fusion_hidden_size=24,
        ),
        "VitPose": lambda: transformers.VitPoseForPoseEstimation(
            transformers.VitPoseConfig(
                backbone_config=transformers.VitPoseBackboneConfig(
                    **HF, image_size=[SIDE, 48], patch_size=[16, 16]
                )
            )
        ),
    }  # fmt: skip


def of_open_clip() -> dict[str, Build]:
    """Families of open_clip; the towers of its timm models are timm's."""
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=2)

    def clip(**vision: Any) -> Build:
        sizes: Settings = {
            "layers": 6,
            "width": WIDTH,
            "head_width": 24,
            "patch_size": 16,
            "image_size": SIDE,
        }
        return lambda: CLIP(embed_dim=32, vision_cfg=CLIPVisionCfg(**(sizes | vision)), text_cfg=text)

    def timm_tower(name: str, **more: Any) -> Build:
        return clip(timm_model_name=name, timm_pool="avg", timm_proj="linear", **more)

    def coca() -> nn.Module:
        return open_clip.CoCa(
            embed_dim=32,
            multimodal_cfg=open_clip.coca_model.MultimodalCfg(
                context_length=8, vocab_size=64, width=32, heads=2, layers=2
            ),
            text_cfg=text,
            vision_cfg=CLIPVisionCfg(
                layers=6, width=WIDTH, head_width=24, patch_size=16, image_size=SIDE, output_tokens=True
            ),
        )

    return {
        "open_clip ViT": clip(),
        "open_clip ViT, CLIPA": clip(no_ln_pre=True, pool_type="avg", pos_embed_type="sin_cos_2d"),
        "open_clip ViT, layer scale": clip(ls_init_value=0.5),
        "open_clip ViT, attentional pooling": clip(attentional_pool=True, attn_pooler_heads=4),
        "open_clip CoCa": coca,
        "open_clip ModifiedResNet": clip(layers=(1, 1, 3, 1), width=24),
        "open_clip test_vit of timm": timm_tower("test_vit"),
        "open_clip test_convnext of timm": timm_tower("test_convnext"),
    }


def of_torchvision() -> dict[str, Build]:
    """Families of torchvision."""
    models = torchvision.models

    def swin(block: Any, merging: Any) -> Build:
        return lambda: models.SwinTransformer(
            [4, 4], 24, list(STAGES), list(HEADS), [4, 4], num_classes=4, block=block,
            downsample_layer=merging,
        )  # fmt: skip

    def convnext() -> nn.Module:
        block = models.convnext.CNBlockConfig
        widths = [*WIDTHS, None]
        return models.ConvNeXt([block(widths[i], widths[i + 1], STAGES[i]) for i in range(4)], num_classes=4)

    inner = models.swin_transformer
    return {
        "torchvision VisionTransformer": lambda: models.VisionTransformer(
            SIDE, 16, 6, 4, WIDTH, 192, num_classes=4
        ),
        "torchvision SwinTransformer": swin(inner.SwinTransformerBlock, inner.PatchMerging),
        "torchvision SwinTransformer V2": swin(inner.SwinTransformerBlockV2, inner.PatchMergingV2),
        "torchvision ConvNeXt": convnext,
        "torchvision MaxVit": lambda: models.MaxVit(
            (224, 224), 16, 7, [24, 48, WIDTH], [1, 1, 4], 24, 0.1, num_classes=4
        ),
        "torchvision resnet50": lambda: models.resnet50(num_classes=4),
        "torchvision efficientnet_b0": lambda: models.efficientnet_b0(num_classes=4),
        "torchvision regnet_y_400mf": lambda: models.regnet_y_400mf(num_classes=4),
        "torchvision mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=4),
        "torchvision shufflenet_v2_x0_5": lambda: models.shufflenet_v2_x0_5(num_classes=4),
    }


FAMILIES = of_transformers() | of_timm() | of_open_clip() | of_torchvision()
BACKBONES = {
    "ViT": "timm vit_tiny_patch16_224",
    "DINOv2": "transformers Dinov2",
    "DINOv3": "transformers DINOv3ViT",
    "CLIP": "transformers CLIP",
    "SigLIP": "transformers Siglip",
    "ConvNeXt": "timm convnext_tiny",
    "Swin": "timm swin_tiny_patch4_window7_224",
    "BEiT": "timm beit_base_patch16_224",
    "MAE": "transformers ViTMAE",
    "EVA-02": "timm eva02_tiny_patch14_224",
}
"""The ten most used vision backbones, by the family that shows each."""
VLM_TOWERS = {
    "LLaVA (CLIP)": "transformers Llava",
    "PaliGemma (SigLIP)": "transformers PaliGemma",
    "Gemma 3 (SigLIP)": "transformers Gemma3",
    "Qwen2.5-VL": "transformers Qwen2.5-VL",
    "Qwen3-VL": "transformers Qwen3-VL",
    "InternVL": "transformers InternVL",
    "Pixtral (Mistral 3)": "transformers Mistral3 (Pixtral)",
    "Phi-4 multimodal": "transformers Phi4MultimodalVision",
    "Llama 3.2 Vision": "transformers Mllama",
    "MiniCPM-V": "transformers MiniCPMV4_7Vision",
}
"""The ten most used towers of vision-language models, likewise."""
