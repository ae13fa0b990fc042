"""Which model families can be marked: docs/models.md.

Builds each family from its library at small settings, with random weights of the size that trained ones
have; marks it, verifies it, reads the mark once more after noise on all matrices of its blocks, and reads an
innocent of the same family. What cannot be marked must say why in one sentence.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/families.py --out docs/models.md
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from models import made_by
from torch import nn

from activemark_fast import Key, embed, verify
from activemark_fast.attacks.noise import noise
from activemark_fast.backbone import Backbone

KEY = Key(b"benchmarks/families.py: a key of no worth")
BITS, FIDELITY, NOISE = 24, 0.97, 0.02
WIDTH = 96
VIT: dict[str, Any] = {"embed_dim": WIDTH, "depth": 6, "num_heads": 4}
HF: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
IMAGES: dict[str, Any] = {"image_size": 64, "patch_size": 16}
TEXT: dict[str, Any] = {
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

Build = Callable[[], nn.Module]


def of_timm() -> dict[str, Build]:
    """Families of timm, small."""

    def plain(side: int, *names: str, **more: Any) -> dict[str, dict[str, Any]]:
        return {name: {**VIT, "img_size": side, **more} for name in names}

    settings: dict[str, dict[str, Any]] = {
        **plain(
            64,
            "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
            "deit3_small_patch16_224", "beit_base_patch16_224", "beitv2_base_patch16_224",
            "vit_base_patch16_siglip_224", "vit_base_patch16_clip_224", "vit_small_patch16_dinov3",
            "vit_relpos_small_patch16_224", "vit_pe_core_tiny_patch16_384", "vit_base_patch16_rope_224",
            "cait_xxs24_224", "xcit_nano_12_p16_224", "flexivit_small",
        ),
        **plain(
            56,
            "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224",
            "aimv2_large_patch14_224",
        ),
        "samvit_base_patch16": {**VIT, "img_size": 128, "window_size": 4, "global_attn_indexes": (2, 5)},
        "swin_tiny_patch4_window7_224": {
            "embed_dim": 24, "depths": STAGES, "num_heads": HEADS, "img_size": 64, "window_size": 4,
        },
        "swinv2_tiny_window8_256": {
            "embed_dim": 24, "depths": STAGES, "num_heads": HEADS, "img_size": 64, "window_size": 4,
        },
        "hiera_tiny_224": {"embed_dim": 24, "num_heads": 1, "stages": STAGES},
        "convnext_tiny": {"depths": STAGES, "dims": WIDTHS},
        "convnextv2_tiny": {"depths": STAGES, "dims": WIDTHS},
        "pvt_v2_b2": {"depths": STAGES, "embed_dims": WIDTHS, "num_heads": HEADS},
        "mobilevitv2_050": {},
        "edgenext_xx_small": {},
        "gcvit_xxtiny": {},
        "resnet50": {},
        "vgg11": {},
        "densenet121": {},
        "regnety_002": {},
    }  # fmt: skip
    return {
        f"timm {name}": lambda name=name, more=more: timm.create_model(name, num_classes=4, **more)
        for name, more in settings.items()
    }


def of_transformers() -> dict[str, Build]:
    """Families of transformers, small; those of language models around a tower too."""

    def one(name: str, **more: Any) -> Build:
        return lambda: getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**more))

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

    def qwen() -> nn.Module:
        vision = {"depth": 6, "hidden_size": WIDTH, "intermediate_size": 192, "out_hidden_size": 32}
        text = LLM | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        return transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(
                vision_config=vision | {"num_heads": 4, "fullatt_block_indexes": [2, 5]}, text_config=text
            )
        )

    def sam() -> nn.Module:
        vision = {**HF, "image_size": 128, "patch_size": 16, "window_size": 4, "mlp_dim": 192}
        return transformers.SamModel(
            transformers.SamConfig(vision_config=vision | {"global_attn_indexes": [2, 5]})
        )

    def two_towers(name: str, head: str, **more: Any) -> Build:
        return lambda: getattr(transformers, head)(
            getattr(transformers, f"{name}Config")(
                text_config=TEXT, vision_config={**HF, **IMAGES}, projection_dim=32, **more
            )
        )

    plain = (
        "ViT", "DeiT", "ViTMSN", "IJepa", "SiglipVision", "CLIPVision", "Data2VecVision", "Beit", "ViTMAE",
        "DINOv3ViT", "VitDet", "Aimv2Vision", "MLCDVision", "BlipVision", "Blip2Vision",
        "InstructBlipVision", "ChineseCLIPVision", "AltCLIPVision", "CLIPSegVision", "OwlViTVision",
        "Owlv2Vision", "FlavaImage", "GitVision", "JanusVision", "Phi4MultimodalVision", "PixtralVision",
        "InternVLVision", "SegGpt", "MllamaVision", "XCLIPVision",
    )  # fmt: skip
    built: dict[str, Build] = {name: one(name, **HF, **IMAGES) for name in plain}
    dino = {key: value for key, value in HF.items() if key != "intermediate_size"}
    swin = {"embed_dim": 24, "depths": STAGES, "num_heads": HEADS, "window_size": 4, "image_size": 128}
    sizes = {"depths": list(STAGES), "hidden_sizes": list(WIDTHS)}
    built |= {
        "Dinov2": one("Dinov2", **dino, **IMAGES, mlp_ratio=2),
        "Dinov2WithRegisters": one("Dinov2WithRegisters", **dino, **IMAGES, mlp_ratio=2),
        "Siglip2Vision": one("Siglip2Vision", **HF, patch_size=32, num_patches=49),
        "VideoMAE": one("VideoMAE", **HF, **IMAGES, num_frames=4),
        "Timesformer": one("Timesformer", **HF, **IMAGES, num_frames=4),
        "Vivit": one("Vivit", **HF, image_size=64, num_frames=4),
        "Swin": one("Swin", **swin),
        "Swinv2": one("Swinv2", **swin),
        "DonutSwin": one("DonutSwin", **swin),
        "FocalNet": one("FocalNet", image_size=64, embed_dim=24, depths=STAGES),
        "ConvNext": one("ConvNext", **sizes),
        "ConvNextV2": one("ConvNextV2", **sizes),
        "DINOv3ConvNext": one("DINOv3ConvNext", **sizes),
        "Segformer": one("Segformer", **sizes, num_attention_heads=list(HEADS)),
        "PvtV2": one("PvtV2", **sizes, num_attention_heads=list(HEADS)),
        "Llava": around("Llava", "CLIPVision"),
        "LlavaNext": around("LlavaNext", "CLIPVision"),
        "LlavaOnevision": around("LlavaOnevision", "SiglipVision"),
        "VipLlava": around("VipLlava", "CLIPVision"),
        "Idefics2": around("Idefics2", "Idefics2Vision"),
        "Idefics3": around("Idefics3", "Idefics3Vision"),
        "SmolVLM": around("SmolVLM", "SmolVLMVision"),
        "InternVL": around("InternVL", "InternVLVision", image_size=(64, 64), patch_size=(16, 16)),
        "Mistral3 (Pixtral)": around("Mistral3", "PixtralVision"),
        "PaliGemma": gemma("PaliGemma", "GemmaConfig"),
        "Gemma3": gemma("Gemma3", "Gemma3TextConfig"),
        "Qwen2.5-VL": qwen,
        "Sam": sam,
        "CLIP": two_towers("CLIP", "CLIPModel"),
        "OwlViT": two_towers("OwlViT", "OwlViTForObjectDetection"),
        "CLIPSeg": two_towers(
            "CLIPSeg", "CLIPSegForImageSegmentation", extract_layers=[1, 2, 3], reduce_dim=32,
            decoder_num_attention_heads=2,
        ),
    }  # fmt: skip
    return {f"transformers {name}": build for name, build in built.items()}


FAMILIES = of_transformers() | of_timm()


@dataclass(frozen=True)
class Row:
    """What came of one family; where it was refused, `refused` says why and nothing else is set."""

    family: str
    refused: str = ""
    tower: str = ""
    blocks: str = ""
    fidelity: float = 0.0
    p_value: float = 1.0
    rate: float = 0.0
    after_noise: str = ""
    innocent: str = ""
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """A line of the table."""
        if self.refused:
            return f"| {self.family} | refused: {self.refused} | | | | | | |"
        return (
            f"| {self.family} | {f'`{self.tower}`' if self.tower else 'the model'} | {self.blocks} | "
            f"{self.fidelity:.4f} | {self.p_value:.1e}, {self.rate:.2f} | {self.after_noise} | "
            f"{self.innocent} | {self.seconds:.0f} |"
        )


@torch.no_grad()
def trained(model: nn.Module, seed: int) -> nn.Module:
    """The model with random weights of about the size that trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(values * max(1, parameter[0].numel()) ** -0.5)
        else:
            parameter.copy_(0.02 * values if name.endswith("bias") else 1 + 0.1 * values)
    return model.eval()


def run(family: str) -> Row:
    """Marks a family, verifies, attacks once and reads an innocent."""
    torch.manual_seed(0)
    model = trained(FAMILIES[family](), 0)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of targets that were missed
            made = embed(model, KEY, bits=BITS, fidelity=FIDELITY)
    except (ValueError, RuntimeError) as error:
        return Row(family, refused=" ".join(str(error).split()).replace("|", "/"))
    seconds = time.perf_counter() - started
    verdict = verify(made.model, made.watermark, KEY)
    noisy = verify(noise(made.model, None, 0, NOISE), made.watermark, KEY)
    other = verify(trained(FAMILIES[family](), 1), made.watermark, KEY)
    if verdict.decision != "match" or other.decision == "match":
        raise RuntimeError(
            f"{family}: {verdict.decision} of the marked model, {other.decision} of an innocent"
        )
    view = Backbone(model)
    site = made.watermark.site
    return Row(
        family,
        tower=view.tower,
        blocks=f"{type(view.blocks[0]).__name__} x {site.depth}, {site.num_tokens} x {site.width}",
        fidelity=made.fidelity,
        p_value=verdict.paid_p_value or 1.0,
        rate=verdict.detection_rate,
        after_noise=noisy.decision,
        innocent=other.decision,
        seconds=seconds,
    )


def main() -> None:
    """Writes the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="families whose names hold one of these")
    arguments = parser.parse_args()
    chosen = [f for f in FAMILIES if not arguments.only or any(part in f for part in arguments.only)]
    rows = []
    for family in chosen:
        rows.append(run(family))
        print(rows[-1].text, file=sys.stderr, flush=True)
        arguments.out.write_text(page(rows), encoding="utf-8")


def page(rows: list[Row]) -> str:
    """The page of these rows."""
    marked = [row for row in rows if not row.refused]
    found = sum(row.after_noise == "match" for row in marked)
    lines = "\n".join(row.text for row in rows)
    return f"""# Which models can be marked

Made by

{made_by()}
Each family is built by its library at small settings, with random weights.
{len(marked)} of {len(rows)} were marked and verified, with {BITS} bits at a fidelity of {FIDELITY}.
{found} of them were also found after noise of {NOISE} on all matrices of their blocks.
No innocent of a family was accused. The others were refused, for the reason given.

| family | tower | blocks, tokens x width | fidelity | paid p, R | after noise | innocent | s |
|---|---|---|---|---|---|---|---|
{lines}
"""


if __name__ == "__main__":
    main()
