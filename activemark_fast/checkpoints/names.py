"""One vocabulary for the tensors of image towers, timm's roughly, whatever library or wrapper wrote them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

PATCH = "patch.weight"
# Common name → what libraries call it, parted by spaces: modules and tensors before the blocks, modules and
# tensors within a block.
_STEM = {
    "patch": (
        "patch_embed.proj patch_embed.projection conv1 conv_proj embeddings.patch_embedding "
        "embeddings.patch_embeddings embeddings.patch_embeddings.projection embedding"
    ),
    "norm_pre": "norm_pre ln_pre pre_layrnorm pre_layernorm pre_norm",
}
_STEM_TENSORS = {
    "cls": "cls cls_token class_token class_embedding embeddings.class_embedding embeddings.cls_token",
    "pos": (
        "pos_embed positional_embedding encoder.pos_embedding embeddings.position_embedding.weight "
        "position_embeddings.weight embeddings.position_embeddings "
        "Transformer.posembed_input.pos_embedding"
    ),
    "reg": "reg_token register_tokens embeddings.register_tokens",
}
_BLOCK = {
    "norm1": "norm1 ln_1 ln1 layer_norm1 layernorm_before input_layernorm attention_norm LayerNorm_0",
    "norm2": (
        "norm2 ln_2 ln2 layer_norm2 layernorm_after pre_mlp_layernorm post_attention_layernorm "
        "ffn_norm LayerNorm_1 LayerNorm_2"
    ),
    "attn.qkv": "attn.qkv attn.to_qkv attn.Wqkv attention.qkv self_attn.qkv self_attn.qkv_proj",
    "attn.q": (
        "attn.q attn.q_proj self_attn.q_proj attention.q_proj attention.attention.query "
        "attention.query attn.to_q attn.wq attention.wq MultiHeadDotProductAttention_0.query "
        "MultiHeadDotProductAttention_1.query"
    ),
    "attn.proj": (
        "attn.proj attn.out_proj self_attn.out_proj self_attn.projection_layer "
        "self_attention.out_proj attention.o_proj attention.output.dense attention.projection_layer "
        "attn.to_out attn.to_out.0 attn.wo attention.wo self_attention.linear_proj "
        "MultiHeadDotProductAttention_0.out MultiHeadDotProductAttention_1.out"
    ),
    "attn.qkv_by_head": (
        "self_attention.linear_qkv self_attention.query_key_value attention.query_key_value "
        "attn.query_key_value"
    ),
    "attn.kv": "attn.kv attn.to_kv attn.kv_proj",
    "attn.qk": "attn.qk",
    "attn.q_norm": "attn.q_norm",
    "attn.k_norm": "attn.k_norm",
    "mlp.fc1": (
        "mlp.fc1 mlp.c_fc mlp.0 mlp.linear_1 mlp.linear_fc1 intermediate.dense mlp.w12 mlp.weights_in "
        "ffn.layers.0.0 MlpBlock_0.Dense_0 MlpBlock_3.Dense_0"
    ),
    "mlp.gate": "mlp.fc1_g mlp.gate_proj",
    "mlp.up": "mlp.fc1_x mlp.up_proj",
    "mlp.fc2": (
        "mlp.fc2 mlp.c_proj mlp.3 mlp.linear_2 mlp.linear_fc2 output.dense mlp.weights_out "
        "mlp.down_proj ffn.layers.1 MlpBlock_0.Dense_1 MlpBlock_3.Dense_1"
    ),
}
for _part, _spelled in (("k", "key"), ("v", "value")):
    _aliases = re.sub(r"query(?= |$)", _spelled, _BLOCK["attn.q"])
    _BLOCK[f"attn.{_part}"] = re.sub(r"q(?=_proj|\s|$)", _part, _aliases)
_BLOCK_TENSORS = {
    "norm1.weight": "self_attention.linear_qkv.layer_norm_weight",
    "norm1.bias": "self_attention.linear_qkv.layer_norm_bias",
    "norm2.weight": "mlp.linear_fc1.layer_norm_weight",
    "norm2.bias": "mlp.linear_fc1.layer_norm_bias",
    "attn.qkv.weight": "attn.in_proj_weight self_attention.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias self_attention.in_proj_bias",
    "attn.q.bias": "attn.q_bias",
    "attn.k.bias": "attn.k_bias",
    "attn.v.bias": "attn.v_bias",
    "ls1": "ls1.gamma ls_1.gamma layer_scale1.lambda1 gamma_1 lambda_1 ls1.weight",
    "ls2": "ls2.gamma ls_2.gamma layer_scale2.lambda1 gamma_2 lambda_2 ls2.weight",
}
FUSED = {
    "attn.qkv": (("attn.q", "attn.k", "attn.v"), ("attn.q", "attn.kv"), ("attn.qk", "attn.v")),
    "mlp.fc1": (("mlp.gate", "mlp.up"),),
}
"""Matrices that some libraries keep as one, stacked in this order, and others apart."""
_BLOCK_NAME = re.compile(
    # DINOv2 may keep its blocks in chunks, blocks.CHUNK.INDEX.
    r"(?:blocks(?:\.\d{1,4}(?=\.\d))?\.|transformer\.resblocks\.|"
    r"(?:encoder\.|decoder\.|transformer\.)?layers?\.|"
    r"encoder\.layers\.encoder_layer_|Transformer\.encoderblock_)(\d{1,4})\.(.+)"
)
_MAX_NAME = 500
_TOKENS = re.compile(r"token_embedding|embed_tokens|word_embeddings|\bwte\b")
"""What only a model of text has."""
_LORA = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.(?!weight)([^.]+))?(?:\.weight)?")
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module|_orig_mod|module|base_layer|"
    r"modules_to_save\.[^.]+|(?<=language_model\.)model)\."  # transformers writes it of a model around an LLM
)
_ROLES = tuple(
    (re.compile(pattern), whole, role)
    for pattern, whole, role in (
        (r"(.+)\._packed_params\._packed_params\.0(?:\.(q_\w+))?", r"\1.weight", r"\2"),
        (r"(.+)\._packed_params\._packed_params\.1", r"\1.bias", ""),
        (r"(.+)\.parametrizations\.(\w+)\.original([01]?)", r"\1.\2", r"original\3"),
        (r"(.*(?:weight|bias))_(orig|mask|g|v|u)", r"\1", r"\2"),
        (r"(.+)\.(q_scale|q_zero_point)", r"\1", r"\2"),
        (r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state)\b.*", r"\1", r"\2"),
        (
            r"(.+)\.(SCB|weight_scale|weight_scale_inv|scale_weight|scale|weight_zero_point|zero_point)",
            r"\1.weight",
            r"\2",
        ),
        (r"(.+\.weight)\._data", r"\1", ""),
        (r"(.+\.weight)\._scale", r"\1", "weight_scale"),
        (r"(.+)\.(qweight|qzeros|scales|biases|g_idx|weight_packed)", r"\1.weight", r"\2"),
        (r"(.+)\.(kernel)", r"\1.weight", r"\2"),
        (r"(.+)\.embedding", r"\1.weight", ""),
    )
)


def _table(modules: Mapping[str, str], tensors: Mapping[str, str]) -> dict[str, str]:
    table = {
        f"{alias}.{kind}": f"{name}.{kind}"
        for name, aliases in modules.items()
        for alias in aliases.split()
        for kind in ("weight", "bias")
    }
    return table | {alias: name for name, aliases in tensors.items() for alias in aliases.split()}


_STEM_NAMES, _BLOCK_NAMES = _table(_STEM, _STEM_TENSORS), _table(_BLOCK, _BLOCK_TENSORS)
STEM = frozenset(_STEM_NAMES.values())
"""The common names of what comes before the blocks."""
_PATCHES = [name for name, common in _STEM_NAMES.items() if common == PATCH and name != "embedding.weight"]
_JAX_BLOCK = "Transformer.encoderblock_0.LayerNorm_0.weight"
"""Tells a tower of the original ViT, whose patch embedding has a name, "embedding", that much else has."""


def common_name(name: str) -> str:
    """The name of a tensor of an image tower in the one vocabulary; unchanged where it is not known."""
    block = _BLOCK_NAME.fullmatch(name)
    return block_name(int(block[1]), block[2]) if block else _STEM_NAMES.get(name, name)


def block_name(index: int, name: str) -> str:
    """The common name of the tensor that block `index` calls `name`."""
    return f"blocks.{index}.{_BLOCK_NAMES.get(name, name)}"


def block_of(common: str) -> int | None:
    """The index of the block that a tensor of this common name is in."""
    found = re.match(r"blocks\.(\d+)\.", common)
    return int(found[1]) if found else None


def within(common: str) -> str:
    """A tensor's common name in its block; that of one in the stem."""
    return common.split(".", 2)[2] if common.startswith("blocks.") else common


def clean_name(name: str) -> tuple[str, str]:
    """A stored name without wrappers, and the part that its tensor plays in what it stands for.

    What is stored in several tensors has one clean name: "fc1.weight_orig" and "fc1.weight_mask" are both
    "fc1.weight", as "orig" and "mask". A plain tensor plays the part "".
    """
    name = name.replace("/", ".")
    while name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    return _part_of(_WRAPPERS.sub("", name))


def without_wrappers(clean: str) -> str:
    """What a name of `sorted_out` would be, had no other tensor that name."""
    return _WRAPPERS.sub("", clean.partition(" ")[0])


def _part_of(name: str) -> tuple[str, str]:
    """See `clean_name`; without wrappers."""
    for pattern, whole, role in _ROLES:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(whole), match.expand(role)
    return name, ""


Adapters = dict[str, dict[str, dict[str, str]]]
"""Module → adapter → "lora_A", "lora_B", "lora_magnitude_vector" → stored name."""


def sorted_out(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], Adapters]:
    """Clean name → part → stored name; and the adapters, apart.

    Of tensors which only their wrappers tell apart, one has the clean name and the others keep theirs; what
    has the name of another even so gets its own behind it, after a space (`without_wrappers` takes it off).
    """
    base: dict[str, dict[str, str]] = {}
    adapters: Adapters = {}
    for name in sorted(names, key=lambda name: (len(name), "/" in name)):
        if ".original_module." in name:
            continue
        clean, role = clean_name(name)
        if role in base.get(clean, {}):
            clean, role = _part_of(name.replace("/", "."))
        if role in base.get(clean, {}):
            clean = f"{clean} {name}"
        lora = _LORA.fullmatch(clean)
        if lora:
            adapters.setdefault(lora[1], {}).setdefault(lora[3] or "default", {})[lora[2]] = name
        else:
            base.setdefault(clean, {})[role] = name
    return base, adapters


def stray_stacks(placed: Iterable[str], names: Iterable[str]) -> dict[str, dict[int, list[tuple[str, str]]]]:
    """Stacks of blocks that are in no image tower, and do not belong to a model of text.

    Args:
        placed: the clean names of what is in blocks of image towers.
        names: all clean names.

    Returns:
        What stands before the names of each → block → (common name within it, clean name) of its tensors.
    """
    placed, names = frozenset(placed), [name for name in names if len(name) <= _MAX_NAME]
    found: dict[str, dict[int, list[tuple[str, str]]]] = {}
    for name in names:
        for start in [] if name in placed else [0, *(match.end() for match in re.finditer(r"\.", name))]:
            block = _BLOCK_NAME.fullmatch(name, start)
            if block and block[2] in _BLOCK_NAMES:
                stack = found.setdefault(name[:start], {})
                stack.setdefault(int(block[1]), []).append((_BLOCK_NAMES[block[2]], name))
                break
    for token in filter(None, map(_TOKENS.search, names)):
        found.pop(token.string[: token.start()].removesuffix("embeddings."), None)
    return found


def towers(names: Iterable[str], anchors: Iterable[str]) -> list[str]:
    """What stands before the names of image towers: whatever stands before a patch embedding.

    Args:
        names: clean names.
        anchors: how the marked model calls its patch embedding, besides the usual names.
    """
    known = [*anchors, *_PATCHES, _JAX_BLOCK]
    found = {
        name.removesuffix(anchor)
        for name in names
        for anchor in known
        if name == anchor or name.endswith(f".{anchor}")
    }
    return sorted(found, key=lambda tower: (len(tower), tower))
