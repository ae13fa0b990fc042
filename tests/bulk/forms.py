"""The forms in which copies of a model turn up, each as a function that writes one, and what becomes of it.

`PYTHONPATH=tests python tests/bulk/forms.py` writes docs/forms.md from this list, which `test_forms.py` holds
to.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny import longer_heads, more_heads, padded, units
from torch import Tensor, nn
from torch.nn.functional import interpolate

State = dict[str, Tensor]
HEADS, WIDTH, PATCH = 4, 128, 8


@dataclass(frozen=True)
class Form:
    """One form. outcome: "read", or why not, a pattern; broken: then it is an error, not a verdict."""

    name: str
    write: Callable[[Any, Path], None]
    outcome: str = "read"
    broken: bool = False
    group: str = ""


FORMS: list[Form] = []
_group = ""


def form(name: str, outcome: str = "read", *, broken: bool = False) -> Callable[[Any], Any]:
    """Lists a function that writes a model (a timm ViT) to a path, a file or a folder to be made."""

    def listed(write: Callable[[Any, Path], None]) -> Callable[[Any, Path], None]:
        FORMS.append(Form(name, write, outcome, broken, _group))
        return write

    return listed


def names(title: str, rename: Callable[[State], State], outcome: str = "read") -> None:
    """Lists a way to name or to keep tensors, as a safetensors file."""
    form(title, outcome)(lambda model, path: put(rename(state_of(model)), path))


def state_of(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def put(state: State, path: Path, **metadata: str) -> None:
    save_file({n: t.contiguous().clone() for n, t in state.items()}, path, metadata=metadata or None)


def prefixed(state: State, prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def renamed(state: State, *rules: tuple[str, str]) -> State:
    """Every name with the first of the rules (pattern, replacement) that changes it."""
    out = {}
    for name, tensor in state.items():
        changed = (re.sub(pattern, new, name) for pattern, new in rules)
        out[next((one for one in changed if one != name), name)] = tensor
    return out


def apart(state: State, *pieces: str) -> State:
    """attn.qkv in pieces of equal share: blocks.0.attn.qkv.weight → blocks.0.attn.q.weight, ..."""
    out = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            shares = tensor.chunk(3)
            for piece in pieces:
                rows = torch.cat([shares["qkv".index(letter)] for letter in piece])
                out[name.replace("attn.qkv", f"attn.{piece}")] = rows
        else:
            out[name] = tensor
    return out


def matrices(state: State) -> Iterator[tuple[str, Tensor]]:
    """The matrices of the blocks: module, weight."""
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight"):
            yield name.removesuffix(".weight"), tensor


def innocent(model: nn.Module) -> State:
    """Other weights in the same shapes."""
    return other_of(state_of(model))


def other_of(state: State) -> State:
    """Other weights in the same shapes."""
    generator = torch.Generator().manual_seed(5)
    return {n: 0.05 * torch.randn(t.shape, generator=generator) for n, t in state.items()}


# ---- files
_group = "Files"


@form("safetensors, `.safetensors` or `.sft`")
def _(model: Any, path: Path) -> None:
    put(state_of(model), path)


@form("`torch.save`")
def _(model: Any, path: Path) -> None:
    torch.save(model.state_dict(), path)


@form("`torch.save` before version 1.6")
def _(model: Any, path: Path) -> None:
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


@form("a module, pickled whole")
def _(model: Any, path: Path) -> None:
    torch.save(nn.DataParallel(model), path)


@form("TorchScript")
def _(model: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 32, 32), check_trace=False), path)


@form("NumPy archive, `.npz`, with torch's names")
def _(model: Any, path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in state_of(model).items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)


@form("a pickle of NumPy arrays")
def _(model: Any, path: Path) -> None:
    import pickle

    arrays = {name: tensor.numpy() for name, tensor in state_of(model).items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}, protocol=2))


@form("tensors pickled without torch.save")
def _(model: Any, path: Path) -> None:
    import pickle

    path.write_bytes(pickle.dumps({"model": {name.encode(): t for name, t in state_of(model).items()}}))


def jax_names(state: State, attention: str, mlp: str, second: str) -> dict[str, np.ndarray]:
    """The names and shapes of the original ViT's Flax code."""
    out: dict[str, np.ndarray] = {}
    for name, tensor in apart(state, "q", "k", "v").items():
        array = tensor.numpy()
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "cls_token":
            out["cls"] = array
        elif name == "pos_embed":
            out["Transformer/posembed_input/pos_embedding"] = array
        elif name.startswith("patch_embed"):
            kernel = name.endswith("weight")
            out[f"embedding/{'kernel' if kernel else 'bias'}"] = (
                array.transpose(2, 3, 1, 0) if kernel else array
            )
        elif block:
            module = {
                "norm1": "LayerNorm_0",
                "norm2": second,
                "attn.q": f"{attention}/query",
                "attn.k": f"{attention}/key",
                "attn.v": f"{attention}/value",
                "attn.proj": f"{attention}/out",
                "mlp.fc1": f"{mlp}/Dense_0",
                "mlp.fc2": f"{mlp}/Dense_1",
            }[block[2]]
            kind = block[3]
            if module.startswith("LayerNorm"):
                kind = "scale" if kind == "weight" else "bias"
            elif kind == "weight":
                kind, array = "kernel", array.T
                if module.endswith(("query", "key", "value")):
                    array = array.reshape(WIDTH, HEADS, -1)
                if module.endswith("out"):
                    array = array.reshape(HEADS, -1, WIDTH)
            elif module.endswith(("query", "key", "value")):
                array = array.reshape(HEADS, -1)
            out[f"Transformer/encoderblock_{block[1]}/{module}/{kind}"] = array
        else:
            out[name.replace(".", "/").replace("weight", "kernel")] = array.T
    return out


@form("the original ViT's `.npz`")
def _(model: Any, path: Path) -> None:
    arrays = jax_names(state_of(model), "MultiHeadDotProductAttention_1", "MlpBlock_3", "LayerNorm_2")
    with path.open("wb") as file:
        np.savez(file, **{f"params/{name}": array for name, array in arrays.items()})


def flax_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Flax' msgpack of nested dicts of arrays."""
    import msgpack

    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        packed = msgpack.packb((array.shape, array.dtype.name, np.ascontiguousarray(array).tobytes()))
        at[leaf] = msgpack.ExtType(1, packed)
    return bytes(msgpack.packb(tree))


@form("Flax msgpack")
def _(model: Any, path: Path) -> None:
    arrays = jax_names(state_of(model), "MultiHeadDotProductAttention_0", "MlpBlock_0", "LayerNorm_1")
    path.write_bytes(flax_bytes({f"params/{name}": array for name, array in arrays.items()}))


def message(*fields: tuple[int, int | bytes | str]) -> bytes:
    """A message of protobuf."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    out = b""
    for number, value in fields:
        content = value.encode() if isinstance(value, str) else value
        whole = isinstance(content, int)
        out += varint(number << 3 | (0 if whole else 2))
        out += varint(content) if isinstance(content, int) else varint(len(content)) + content
    return out


def onnx_bytes(state: State, beside: Path | None = None) -> bytes:
    """A state as torch's exporters write it: matrices are transposed and have lost their names.

    beside: where the numbers go; they go into the model without.
    """
    graph, numbers = [], b""
    for index, (name, tensor) in enumerate(state.items()):
        own, values = name, tensor.float()
        if tensor.ndim == 2 and name.startswith("blocks."):
            own, values = f"onnx::MatMul_{index}", values.T
            bias, product = f"{name.removesuffix('weight')}bias", f"product_{index}"
            graph.append((1, message((1, f"in_{index}"), (1, own), (2, product), (4, "MatMul"))))
            graph.append((1, message((1, bias), (1, product), (2, f"out_{index}"), (4, "Add"))))
        elif name == "cls_token":
            own = "expand"
            graph.append((1, message((1, own), (1, "patches"), (2, "tokens"), (4, "Concat"))))
        content = values.contiguous().numpy().tobytes()
        place: list[tuple[int, int | bytes | str]] = [(9, content)]
        if beside is not None:
            at = {"location": beside.name, "offset": str(len(numbers)), "length": str(len(content))}
            place = [(13, message((1, key), (2, value))) for key, value in at.items()]
            numbers += content
        graph.append((5, message(*((1, size) for size in values.shape), (2, 1), (8, own), *place)))
    if beside is not None:
        beside.write_bytes(numbers)
    return message((1, 8), (2, "pytorch"), (7, message(*graph)))


@form("ONNX, as torch exports it")
def _(model: Any, path: Path) -> None:
    path.write_bytes(onnx_bytes(state_of(model)))


@form("ONNX with its numbers in a file beside it")
def _(model: Any, path: Path) -> None:
    path.write_bytes(onnx_bytes(state_of(model), path.with_suffix(".data")))


# ---- folders
_group = "Folders"


@form("a Hugging Face folder: `config.json`, `model.safetensors`")
def _(model: Any, path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    put(hugging_face(state_of(model)), path / "model.safetensors")


def shards(model: Any, path: Path) -> dict[str, str]:
    path.mkdir()
    state = prefixed(state_of(model), "visual.")
    parts = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(state)}
    for shard in set(parts.values()):
        put({name: tensor for name, tensor in state.items() if parts[name] == shard}, path / shard)
    return parts


@form("shards with an index")
def _(model: Any, path: Path) -> None:
    index = {"weight_map": shards(model, path)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@form("shards without an index")
def _(model: Any, path: Path) -> None:
    shards(model, path)
    (path / "config.json").write_text("{}")


@form("shards of which one is missing", "1 shards, wanted 2", broken=True)
def _(model: Any, path: Path) -> None:
    shards(model, path)
    (path / "config.json").write_text("{}")
    (path / "model-00002-of-00002.safetensors").unlink()


def torch_shards(model: Any, path: Path) -> None:
    path.mkdir()
    state = state_of(model)
    parts = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(state)}
    for shard in set(parts.values()):
        torch.save({name: t for name, t in state.items() if parts[name] == shard}, path / shard)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))


form("`pytorch_model.bin.index.json` and its shards")(torch_shards)


@form("the same, of which one is missing", "No such file.*pytorch_model-00002-of-00002.bin", broken=True)
def _(model: Any, path: Path) -> None:
    torch_shards(model, path)
    (path / "pytorch_model-00002-of-00002.bin").unlink()


@form("one file of weights of any name")
def _(model: Any, path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    put(state_of(model), path / "model.fp16.safetensors")


@form("another model beside it: `model.safetensors`, `pytorch_model.bin`")
def _(model: Any, path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    put(innocent(model), path / "model.safetensors")
    torch.save(state_of(model), path / "pytorch_model.bin")
    (path / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))


def adapter(model: Any, path: Path, dora: bool = False) -> None:
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    state, low = state_of(model), {}
    for module, weight in list(matrices(state)):
        if not module.endswith("attn.proj"):
            continue
        a = 0.05 * torch.randn(2, weight.shape[1], generator=generator)
        b = 0.05 * torch.randn(weight.shape[0], 2, generator=generator)
        low[f"base_model.model.{module}.lora_A.weight"] = a
        low[f"base_model.model.{module}.lora_B.weight"] = b
        if dora:
            low[f"base_model.model.{module}.lora_magnitude_vector"] = weight.norm(dim=1)
            weight *= 1.7  # its length is the magnitude's business
        else:
            weight -= 2 * b @ a
    put(state, path / "model.safetensors")
    put(low, path / "adapter_model.safetensors")
    config = {"lora_alpha": 4, "r": 2, "use_dora": dora, "base_model_name_or_path": "somebody/vit"}
    (path / "adapter_config.json").write_text(json.dumps(config))


form("PEFT: LoRA beside its base")(adapter)
form("PEFT: DoRA beside its base")(lambda model, path: adapter(model, path, dora=True))


@form("PEFT: an adapter alone", "adapter alone: put the weights of its base model, 'somebody/vit'")
def _(model: Any, path: Path) -> None:
    adapter(model, path)
    (path / "model.safetensors").unlink()


@form("torch's distributed checkpoint", "dcp_to_torch_save")
def _(model: Any, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(model.state_dict(), checkpoint_id=path, no_dist=True)


@form("DeepSpeed ZeRO, a folder", "zero_to_fp32.py")
def _(model: Any, path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    for rank in range(2):
        placeholders = {name: torch.zeros(0) for name in state_of(model)}
        torch.save({"module": placeholders}, path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


def other_folder(name: str) -> Callable[[Any, Path], None]:
    def write(_: Any, path: Path) -> None:
        path.mkdir()
        (path / name).write_bytes(bytes(99))

    return write


form("Orbax", "an Orbax checkpoint")(other_folder("manifest.ocdbt"))
form("TensorFlow: SavedModel", "a TensorFlow checkpoint")(other_folder("saved_model.pb"))
form("TensorFlow: checkpoint", "a TensorFlow checkpoint")(other_folder("model.ckpt-1.data-00000-of-00001"))


# ---- what trainers write
_group = "What trainers write"


class Callback:
    """Some class that only the trainer's machine has."""

    def __init__(self) -> None:
        self.best = np.float64(0.5)


@form("Lightning: `state_dict`, hyperparameters, callbacks, optimiser")
def _(model: Any, path: Path) -> None:
    moments = {index: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)} for index in range(3)}
    torch.save(
        {
            "epoch": 3,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": prefixed(state_of(model), "model.backbone."),
            "hyper_parameters": argparse.Namespace(lr=np.float32(1e-4), classes=("a", "b")),
            "callbacks": {"ModelCheckpoint": Callback()},
            "optimizer_states": [{"state": moments, "param_groups": [{"params": [0, 1, 2]}]}],
        },
        path,
    )


@form("`model`, `optimizer`, `args`, RNG states, NumPy scalars")
def _(model: Any, path: Path) -> None:
    torch.save(
        {
            "model": collections.OrderedDict(state_of(model)),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
            "args": argparse.Namespace(batch=np.int64(3), where=Path("/x")),
            "rng": (torch.get_rng_state(), np.random.RandomState(0).get_state()),
            "best": np.float64(0.3),
            "scaler": collections.defaultdict(int),
        },
        path,
    )


@form("student and teacher")
def _(model: Any, path: Path) -> None:
    torch.save(
        {
            "student": prefixed(innocent(model), "module.backbone."),
            "teacher": prefixed(state_of(model), "backbone."),
        },
        path,
    )


@form("model and average (EMA), moments of the optimiser under the same names")
def _(model: Any, path: Path) -> None:
    moments = {name: torch.zeros_like(tensor) for name, tensor in state_of(model).items()}
    torch.save({"exp_avg": moments, "model": innocent(model), "model_ema": {"module": state_of(model)}}, path)


@form("two vision towers and a text model")
def _(model: Any, path: Path) -> None:
    text = {f"text.layers.{i}.mlp.up_proj.weight": torch.zeros(8, 8) for i in range(30)}
    state = prefixed(innocent(model), "vision_tower.a.") | prefixed(state_of(model), "vision_tower.b.")
    put(text | state, path)


names("two models, which only `module.` tells apart", lambda s: prefixed(s, "module.") | other_of(s))
names(
    "beside another model, its patch embedding under a name that is not known",
    lambda s: prefixed(renamed(s, (r"^patch_embed\.proj", "stem.conv")), "b.") | prefixed(other_of(s), "a."),
    "blocks under 'b.' without a patch embedding of a name that is known",
)
names("`module.`, `_orig_mod.`, `model.`, any prefix", lambda s: prefixed(s, "_orig_mod.module.model."))
names(
    "`_checkpoint_wrapped_module`, `_fsdp_wrapped_module`, `_orig_mod` inside",
    lambda s: renamed(
        s,
        (r"^blocks\.(\d+)\.attn\.", r"blocks.\1._checkpoint_wrapped_module.attn._orig_mod."),
        (r"^blocks\.(\d+)\.", r"_fsdp_wrapped_module.blocks.\1._checkpoint_wrapped_module."),
    ),
)
names(
    "PEFT's `base_layer` inside",
    lambda s: prefixed(renamed(s, (r"qkv\.", "qkv.base_layer.")), "base_model.model."),
)
names(
    "FSDP's `_flat_param`",
    lambda s: {"_fsdp_wrapped_module._flat_param": torch.cat([t.flatten() for t in s.values()])},
    "flat parameters of FSDP",
)
names(
    "DeepSpeed ZeRO-3 placeholders",
    lambda s: prefixed({n: torch.zeros(0) for n in s}, "module."),
    "zero_to_fp32.py",
)


@form("`weight_orig` and `weight_mask` of torch's pruning")
def _(model: Any, path: Path) -> None:
    import copy

    from torch.nn.utils import prune

    copied = copy.deepcopy(model)
    for block in copied.blocks:
        prune.l1_unstructured(block.mlp.fc1, "weight", amount=0.2)
    torch.save(copied.state_dict(), path)


def normalised(model: Any, path: Path, norm: Callable[[nn.Module], object]) -> None:
    import copy

    copied = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in copied.blocks:
            norm(block.mlp.fc2)
    torch.save(copied.state_dict(), path)


form("`parametrizations` of weight norm")(
    lambda m, p: normalised(m, p, nn.utils.parametrizations.weight_norm)
)
form("`weight_g` and `weight_v`")(lambda m, p: normalised(m, p, nn.utils.weight_norm))


# ---- names
_group = "Names"


def hugging_face(state: State) -> State:
    """As transformers names a ViT."""
    block = r"^blocks\.(\d+)\."
    layer = r"vit.encoder.layer.\1."
    return renamed(
        apart(state, "q", "k", "v"),
        (r"^cls_token$", "vit.embeddings.cls_token"),
        (r"^pos_embed$", "vit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
        (rf"{block}norm1\.", f"{layer}layernorm_before."),
        (rf"{block}norm2\.", f"{layer}layernorm_after."),
        (rf"{block}attn\.q\.", f"{layer}attention.attention.query."),
        (rf"{block}attn\.k\.", f"{layer}attention.attention.key."),
        (rf"{block}attn\.v\.", f"{layer}attention.attention.value."),
        (rf"{block}attn\.proj\.", f"{layer}attention.output.dense."),
        (rf"{block}mlp\.fc1\.", f"{layer}intermediate.dense."),
        (rf"{block}mlp\.fc2\.", f"{layer}output.dense."),
        (r"^head\.", "classifier."),
    )


def torchvision_names(state: State) -> State:
    block = r"^blocks\.(\d+)\."
    layer = r"encoder.layers.encoder_layer_\1."
    return renamed(
        state,
        (r"^cls_token$", "class_token"),
        (r"^pos_embed$", "encoder.pos_embedding"),
        (r"^patch_embed\.proj\.", "conv_proj."),
        (rf"{block}norm(\d)\.", rf"{layer}ln_\2."),
        (rf"{block}attn\.qkv\.", f"{layer}self_attention.in_proj_"),
        (rf"{block}attn\.proj\.", f"{layer}self_attention.out_proj."),
        (rf"{block}mlp\.fc1\.", f"{layer}mlp.0."),
        (rf"{block}mlp\.fc2\.", f"{layer}mlp.3."),
    )


def open_clip_names(state: State) -> State:
    block = r"^blocks\.(\d+)\."
    layer = r"visual.transformer.resblocks.\1."
    return renamed(
        {**state, "cls_token": state["cls_token"].flatten(), "pos_embed": state["pos_embed"][0]},
        (r"^cls_token$", "visual.class_embedding"),
        (r"^pos_embed$", "visual.positional_embedding"),
        (r"^patch_embed\.proj\.", "visual.conv1."),
        (rf"{block}norm(\d)\.", rf"{layer}ln_\2."),
        (rf"{block}attn\.qkv\.", f"{layer}attn.in_proj_"),
        (rf"{block}attn\.proj\.", f"{layer}attn.out_proj."),
        (rf"{block}mlp\.fc1\.", f"{layer}mlp.c_fc."),
        (rf"{block}mlp\.fc2\.", f"{layer}mlp.c_proj."),
    )


def beit(state: State) -> State:
    out = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            q, k, v = tensor.chunk(3)
            assert (k == 0).all()
            out |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            out[name] = tensor
    for index in range(6):
        out |= {f"blocks.{index}.gamma_{n}": torch.full((WIDTH,), 0.5) for n in (1, 2)}
        for module in ("attn.proj", "mlp.fc2"):
            for kind in ("weight", "bias"):
                out[f"blocks.{index}.{module}.{kind}"] = 2 * out[f"blocks.{index}.{module}.{kind}"]
    return out


def by_head(state: State, heads: int = HEADS) -> State:
    """As Megatron keeps queries, keys and values."""
    out = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            rows = tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
            out[name.replace("attn.qkv", "self_attention.linear_qkv")] = rows
        else:
            out[name] = tensor
    return renamed(
        out,
        (r"\.attn\.proj\.", ".self_attention.linear_proj."),
        (r"\.mlp\.fc(\d)\.", r".mlp.linear_fc\1."),
    )


names("transformers", hugging_face)
names("torchvision", torchvision_names)
names("open_clip", open_clip_names)
names(
    "mmpretrain",
    lambda s: renamed(
        s,
        (r"^patch_embed\.proj\.", "backbone.patch_embed.projection."),
        (r"^blocks\.(\d+)\.norm(\d)\.", r"backbone.layers.\1.ln\2."),
        (r"^blocks\.(\d+)\.mlp\.fc1\.", r"backbone.layers.\1.ffn.layers.0.0."),
        (r"^blocks\.(\d+)\.mlp\.fc2\.", r"backbone.layers.\1.ffn.layers.1."),
        (r"^blocks\.", "backbone.layers."),
        (r"^", "backbone."),
    ),
)
names("Megatron: `linear_qkv` sorted by head, `linear_fc1`", by_head)
names(
    "Megatron: norms within what they feed, `decoder.layers`, `position_embeddings`",
    lambda s: renamed(
        by_head({**s, "pos_embed": s["pos_embed"][0]}),
        (r"^blocks\.(\d+)\.norm1\.", r"decoder.layers.\1.self_attention.linear_qkv.layer_norm_"),
        (r"^blocks\.(\d+)\.norm2\.", r"decoder.layers.\1.mlp.linear_fc1.layer_norm_"),
        (r"^blocks\.", "decoder.layers."),
        (r"^pos_embed$", "position_embeddings.weight"),
        (r"^cls_token$", "class_token"),
        (r"^patch_embed\.proj\.", "conv1."),
    ),
)
names(
    "`to_q`, `to_k`, `to_v`", lambda s: renamed(apart(s, "q", "k", "v"), (r"attn\.([qkv])\.", r"attn.to_\1."))
)
names(
    "`wq`, `wk`, `wv`, `wo`",
    lambda s: renamed(
        apart(s, "q", "k", "v"), (r"attn\.([qkv])\.", r"attn.w\1."), (r"attn\.proj\.", "attn.wo.")
    ),
)
names("`q` and `kv`", lambda s: apart(s, "q", "kv"))
names("`q_bias`, `v_bias`, `gamma_1`, as BEiT", beit)


# ---- patches and positions
_group = "Patch embeddings and positions"


def with_patch(change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda s: {**s, "patch_embed.proj.weight": change(s["patch_embed.proj.weight"])}


names("of videos (Conv3d)", with_patch(lambda w: torch.stack([w / 2, w / 2], dim=2)))
names("linear, channels first", with_patch(lambda w: w.flatten(1)))
names("linear, channels last", with_patch(lambda w: w.permute(0, 2, 3, 1).flatten(1)))
names("of more channels than three", with_patch(lambda w: torch.cat([w, torch.zeros_like(w[:, :1])], dim=1)))


def larger_patch(state: State) -> State:
    """The kernel for patches of 16 pixels that answers as that of 8 does to the shrunken patch."""
    basis = torch.eye(16 * 16).reshape(-1, 1, 16, 16)
    shrink = interpolate(basis, (PATCH, PATCH), mode="bicubic", antialias=True, align_corners=False)
    kernel = state["patch_embed.proj.weight"].flatten(2) @ shrink.flatten(1).T
    return {**state, "patch_embed.proj.weight": kernel.reshape(WIDTH, 3, 16, 16)}


names("of other patches (FlexiViT)", larger_patch)


def larger_grid(state: State) -> State:
    grid = state["pos_embed"][:, 1:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    grid = interpolate(grid, (7, 7), mode="bicubic", align_corners=False)
    rows = grid.flatten(2).transpose(1, 2)
    return {**state, "pos_embed": torch.cat([state["pos_embed"][:, :1], rows], dim=1)}


names("positions of another grid", larger_grid)
names(
    "positions with rows of registers",
    lambda s: {
        **s,
        "pos_embed": torch.cat(
            [s["pos_embed"][:, :1], torch.ones(1, 4, WIDTH), s["pos_embed"][:, 1:]], dim=1
        ),
        "reg_token": torch.zeros(1, 4, WIDTH),
    },
)
names("of grey images", with_patch(lambda w: w.sum(1, keepdim=True)))

# ---- numbers
_group = "Numbers"
names("float16", lambda s: {n: t.half() for n, t in s.items()})
names("bfloat16", lambda s: {n: t.bfloat16() for n, t in s.items()})
names("float64", lambda s: {n: t.double() for n, t in s.items()})


def eight_bit(state: State, ending: str, kind: torch.dtype, shape: str) -> State:
    out = dict(state)
    for module, weight in matrices(state):
        if shape == "tiles":
            tiles = weight.reshape(weight.shape[0] // 64, 64, weight.shape[1] // 64, 64).abs().amax((1, 3))
            spread = tiles.repeat_interleave(64, 0).repeat_interleave(64, 1)
        else:
            tiles = weight.abs().amax() if shape == "one" else weight.abs().amax(1)
            spread = tiles if shape == "one" else tiles[:, None]
        top = 127 if kind == torch.int8 else 448
        numbers = weight / spread * top
        out[f"{module}.weight"] = numbers.round().to(kind) if kind == torch.int8 else numbers.to(kind)
        out[f"{module}.{ending}"] = tiles if ending == "SCB" else tiles / top
    return out


F8 = torch.float8_e4m3fn
names("fp8, a scale each (`weight_scale`)", lambda s: eight_bit(s, "weight_scale", F8, "one"))
names(
    "fp8, a scale for each tile (`weight_scale_inv`)", lambda s: eight_bit(s, "weight_scale_inv", F8, "tiles")
)
names("fp8, `scale_weight`", lambda s: eight_bit(s, "scale_weight", F8, "one"))
names("bitsandbytes int8 (`SCB`)", lambda s: eight_bit(s, "SCB", torch.int8, "rows"))
names(
    "int8, a scale for each row (`weight_scale`)", lambda s: eight_bit(s, "weight_scale", torch.int8, "rows")
)
names(
    "int8 without scales",
    lambda s: {n: t.to(torch.int8) if t.ndim == 2 else t for n, t in s.items()},
    "int8 without its scales",
)


def four_bit(state: State, nested: bool) -> State:
    """bitsandbytes' NF4, with its 16 numbers; the layout is that of its `as_dict(packed=True)`."""
    negative = torch.tensor([1.0, 0.6961928, 0.52507305, 0.39491749, 0.28444138, 0.18477343, 0.09105004])
    positive = torch.tensor(
        [0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
    )
    table = torch.cat([-negative, positive])
    out = dict(state)
    for module, weight in matrices(state):
        runs = weight.flatten().reshape(-1, 64)
        absmax = runs.abs().amax(1)
        codes = ((runs / absmax[:, None])[..., None] - table).abs().argmin(-1).flatten().to(torch.uint8)
        out[f"{module}.weight"] = ((codes[::2] << 4) | codes[1::2])[:, None]
        facts: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": list(weight.shape)}
        out[f"{module}.weight.quant_map"] = table
        if nested:
            offset = absmax.mean()
            second = torch.linspace(-1, 1, 256)
            groups = nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
            largest = groups.abs().amax(1)
            small = (
                ((groups / largest[:, None])[..., None] - second).abs().argmin(-1).flatten()[: len(absmax)]
            )
            out[f"{module}.weight.absmax"] = small.to(torch.uint8)
            out[f"{module}.weight.nested_absmax"] = largest
            out[f"{module}.weight.nested_quant_map"] = second
            facts |= {"nested_blocksize": 256, "nested_offset": float(offset)}
        else:
            out[f"{module}.weight.absmax"] = absmax
        text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        out[f"{module}.weight.quant_state.bitsandbytes__nf4"] = torch.from_numpy(text.copy())
    return out


names("bitsandbytes NF4, FP4", lambda s: four_bit(s, False))
names("the same with its scales quantised, too", lambda s: four_bit(s, True))


@form("torch's dynamic int8")
def _(model: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}).state_dict(), path)


@form("torch's quantised tensors, a scale for each row")
def _(model: Any, path: Path) -> None:
    state = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, weight in list(matrices(state)):
            scales = weight.abs().amax(1) / 127
            state[f"{module}.weight"] = torch.quantize_per_channel(
                weight, scales, torch.zeros(len(scales)), 0, torch.qint8
            )
        torch.save(state, path)


def packed(state: State, *parts: str) -> State:
    out = {n: t for n, t in state.items() if not (n.endswith(".weight") and t.ndim == 2)}
    for module, _ in matrices(state):
        out |= {f"{module}.{part}": torch.zeros(4, 4, dtype=torch.int32) for part in parts}
    return out


AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which column of eight AWQ puts where in a word, from the lowest bits on."""


def words(numbers: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """(n, m) numbers of some bits, as many of a row as fit into the 32 bits of a word."""
    groups = numbers.reshape(len(numbers), -1, 32 // bits)[..., list(order)].numpy().astype(np.uint32)
    shifts = (np.arange(32 // bits) * bits).astype(np.uint32)
    return torch.from_numpy(np.bitwise_or.reduce(groups << shifts, axis=-1).view(np.int32))


def in_words(state: State, kind: str, bits: int) -> State:
    """GPTQ or AWQ: (in, out) matrices, groups of 32 inputs, each with a scale and a zero point an output."""
    out = dict(state)
    for module, weight in matrices(state):
        groups = weight.T.unflatten(0, (-1, 32))
        low, high = groups.amin(1), groups.amax(1)
        scales = (high - low) / (2**bits - 1)
        zeros = (-low / scales).round().clamp(1, 2**bits - 1)
        numbers = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1).flatten(0, 1)
        del out[f"{module}.weight"]
        plain = range(32 // bits)
        if kind == "AWQ":
            out[f"{module}.qweight"] = words(numbers, bits, AWQ_NIBBLES)
            out[f"{module}.qzeros"] = words(zeros, bits, AWQ_NIBBLES)
        else:
            out[f"{module}.qweight"] = words(numbers.T, bits, plain).T.contiguous()
            out[f"{module}.qzeros"] = words(zeros - 1, bits, plain)
            out[f"{module}.g_idx"] = (torch.arange(weight.shape[1]) // 32).int()
        out[f"{module}.scales"] = scales.half()
    return out


names("GPTQ, 4 bits", lambda s: in_words(s, "GPTQ", 4))
names("GPTQ, 8 bits", lambda s: in_words(s, "GPTQ", 8))
names("AWQ", lambda s: in_words(s, "AWQ", 4))


def three_bits(state: State) -> State:
    """The shapes of GPTQ's 3 bits, in which a number may lie in two words."""
    out = packed(state)
    for module, weight in matrices(state):
        outputs, inputs = weight.shape
        out[f"{module}.qweight"] = torch.zeros(inputs * 3 // 32, outputs, dtype=torch.int32)
        out[f"{module}.qzeros"] = torch.zeros(inputs // 32, outputs * 3 // 32, dtype=torch.int32)
        out[f"{module}.scales"] = torch.ones(inputs // 32, outputs)
    return out


names("GPTQ, 3 bits", three_bits, "quantised with GPTQ or AWQ, in words that are not read")


@form("safetensors of 4-bit floats, `F4`", "a tensor of F4, which is not read")
def _(model: Any, path: Path) -> None:
    header, content = {}, b""
    for name, tensor in state_of(model).items():
        small = tensor.ndim == 2
        numbers = bytes(tensor.numel() // 2) if small else tensor.numpy().tobytes()
        offsets = [len(content), len(content) + len(numbers)]
        header[name] = {
            "dtype": "F4" if small else "F32",
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        content += numbers
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


names("MLX", lambda s: packed(s, "weight", "scales", "biases"), "quantised with MLX")


class AffineQuantizedTensor(torch.Tensor):
    """Stands for torchao's."""


@form("torchao and other subclasses of Tensor", "AffineQuantizedTensor, which is not read")
def _(model: Any, path: Path) -> None:
    class Made:
        def __reduce__(self) -> tuple[Any, ...]:
            return AffineQuantizedTensor, (torch.zeros(3),)

    torch.save({n: Made() if t.ndim == 2 else t for n, t in state_of(model).items()}, path)


# ---- blocks
_group = "Blocks"


def more_blocks(state: State, at: int = 0) -> State:
    """With one more block, which adds nothing to the residual stream."""
    out = {n: t for n, t in state.items() if not n.startswith("blocks.")}
    for name, tensor in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match:
            index = int(match[1])
            out[f"blocks.{index + (index >= at)}.{match[2]}"] = tensor
            if index == at:
                out[f"blocks.{at}.{match[2]}"] = tensor * ("proj" not in name and "fc2" not in name)
    return out


names("an identity block in front", more_blocks)
names("an identity block in the middle", lambda s: more_blocks(s, 2))
names("the last block dropped", lambda s: {n: t for n, t in s.items() if not n.startswith("blocks.5.")})


def in_order(*order: int, noise: float = 0) -> Callable[[State], State]:
    """The state with these of its blocks; those that are negative add `noise` of themselves only."""

    def made(state: State) -> State:
        out = {n: t for n, t in state.items() if not n.startswith("blocks.")}
        for new, old in enumerate(order):
            prefix = f"blocks.{abs(old)}."
            for name in [n for n in state if n.startswith(prefix)]:
                writes = old < 0 and ("proj" in name or "fc2" in name)
                out[name.replace(prefix, f"blocks.{new}.", 1)] = state[name] * (noise if writes else 1)
        return out

    return made


names("the first block dropped", in_order(1, 2, 3, 4, 5))
names("a block of the mark dropped, of two", in_order(0, 1, 2, 4, 5))
names(
    "a block dropped, the others under their numbers",
    lambda s: {n: t for n, t in s.items() if not n.startswith("blocks.3.")},
)
names(
    "blocks that are counted from 1",
    lambda s: {re.sub(r"^blocks\.(\d)", lambda m: f"blocks.{int(m[1]) + 1}", n): t for n, t in s.items()},
)
names("a block doubled", in_order(0, 0, 1, 2, 3, 4, 5))
names("the first two blocks exchanged", in_order(1, 0, 2, 3, 4, 5))
names("blocks that add next to nothing in front and between", in_order(-5, 0, 1, 2, -5, 3, 4, 5, noise=1e-3))


names("MLPs widened by units that are zero", lambda s: units(s, lambda t: torch.cat([t, 0 * t[:8]])))
names("MLPs of which units were pruned", lambda s: units(s, lambda t: t[:-32]))


def fewer_heads(state: State, kept: int) -> State:
    """Without the last of the 128 channels of the attention."""
    out = dict(state)
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            out[name] = tensor.unflatten(0, (3, 128))[:, :kept].flatten(0, 1)
        elif name.endswith(".attn.proj.weight"):
            out[name] = tensor[:, :kept]
    return out


names("heads of the attention that were pruned", lambda s: fewer_heads(s, 96))
names("the same in three matrices, `q`, `k`, `v`", lambda s: apart(fewer_heads(s, 96), "q", "k", "v"))
names(
    "channels of the attention that were pruned, not whole heads",
    lambda s: fewer_heads(s, 120),
    r"float32 \(360, 128\), wanted \(384, 128\)",
)

# ---- widths
_group = "Widths"


def twice(units: Tensor) -> Tensor:
    """The first 8 units once more."""
    return torch.cat([units, units[:8]])


def halved(state: State) -> State:
    """The units of which there are two each add half."""
    out = units(state, twice)
    for name in out:
        if name.endswith(".fc2.weight"):
            out[name] = out[name].clone()
            out[name][:, [*range(8), *range(-8, 0)]] /= 2
    return out


names("MLPs widened by units that are there twice", halved)
names("a head more, which adds nothing", lambda s: more_heads(s, HEADS))
names("a head more, which is another once again", lambda s: more_heads(s, HEADS, twice=True))
names("the same, as transformers names it", lambda s: hugging_face(more_heads(s, HEADS)))
names("the same, as Megatron keeps it", lambda s: by_head(more_heads(s, HEADS), HEADS + 1))
names("heads of more channels, which add nothing", lambda s: longer_heads(s, HEADS, 2))
names("a residual stream padded with zeros", lambda s: padded(s, 136, "zero"))
names("a residual stream in which all channels are twice", lambda s: padded(s, 256, "twice"))
names("a residual stream padded and turned", lambda s: padded(s, 160, "turned"))
names("the same in bfloat16", lambda s: {n: t.bfloat16() for n, t in padded(s, 160, "turned").items()})
names(
    "all of these, so that the library loads it: width 136, 4 heads of 34, MLPs of 544",
    lambda s: units(longer_heads(padded(s, 136, "zero"), HEADS, 2), lambda t: torch.cat([t, 0 * t[:32]])),
)
names("a residual stream of thrice the width", lambda s: padded(s, 384, "turned"), r"float32 \(384")

# ---- refused
_group = "Other formats"
form("HDF5, `.h5`", "an HDF5 file")(lambda _, path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)))
form("GGUF", "a GGUF file")(lambda _, path: path.write_bytes(b"GGUF" + bytes(99)))
form("a compressed file", "unpack it first")(lambda _, path: path.write_bytes(b"\x1f\x8b\x08" + bytes(99)))


def zipped(name: str) -> Callable[[Any, Path], None]:
    def write(_: Any, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, bytes(99))

    return write


form("a zip archive", "unpack it first")(zipped("model.safetensors"))
form("torch.export, `.pt2`", "an archive of torch.export")(zipped("m/data/weights/model_weights_config.json"))


@form("a tar archive", "unpack it first")
def _(model: Any, path: Path) -> None:
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("model.pt")
        entry.size = content.tell()
        content.seek(0)
        archive.addfile(entry, content)


@form("a compressed NumPy archive", "compressed records")
def _(model: Any, path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, a=np.zeros(3))


# ---- broken
_group = "No checkpoints"
form("an empty file", "an empty file", broken=True)(lambda _, path: path.touch())
form("an HTML page", "an HTML page", broken=True)(lambda _, path: path.write_text("<!doctype html><p>404"))
form("a Git LFS pointer", "git lfs pull", broken=True)(
    lambda _, path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
)
form("JSON text", "JSON text", broken=True)(lambda _, path: path.write_text('{"error": "gated"}'))


@form("a truncated torch file", "truncated", broken=True)
def _(model: Any, path: Path) -> None:
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])


@form("a truncated safetensors file", "truncated", broken=True)
def _(model: Any, path: Path) -> None:
    put(state_of(model), path)
    path.write_bytes(path.read_bytes()[:100_000])


@form("a safetensors file of a size that cannot be", "truncated|not possible", broken=True)
def _(model: Any, path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")


def page() -> str:
    """docs/forms.md."""
    lines = [
        "# Forms of checkpoints",
        "",
        "Made by `PYTHONPATH=tests python tests/bulk/forms.py`. `tests/bulk/test_forms.py` writes a marked",
        "and an innocent model in each form and holds `verify` and `verify-many` to what is said here.",
        "*read*: a marked model is a match, an innocent one is none. *inconclusive*: the verdict says by",
        'name what stands in the way, and is never "no match". *error*: the file is broken. All since 0.1.0.',
    ]
    group = None
    for one in FORMS:
        if one.group != group:
            group = one.group
            lines += ["", f"## {group}", "", "| form | outcome |", "|---|---|"]
        told = "read" if one.outcome == "read" else "error" if one.broken else "inconclusive"
        lines.append(f"| {one.name} | {told} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "forms.md").write_text(page())
