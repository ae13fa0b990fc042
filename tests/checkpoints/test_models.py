from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints import (
    CheckpointError,
    architecture_of,
    build_model,
    load_model,
    load_weights,
    save_model,
)
from activemark_fast.checkpoints.files import Checkpoint

KWARGS: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TINY = f"timm:VisionTransformer?{json.dumps({**KWARGS, 'num_classes': 4})}"
SHARED = Path(__file__).parents[3] / "shared" / "vfm"


def read(path: Path) -> dict[str, Tensor]:
    with Checkpoint(path, 10**8) as checkpoint:
        return {name: t.clone() for name, t in checkpoint.read(checkpoint.entries).items()}


def tiny(**kwargs: Any) -> Any:
    torch.manual_seed(1)
    return VisionTransformer(**{**KWARGS, "num_classes": 4, **kwargs}).eval()


def same(left: nn.Module, right: nn.Module) -> bool:
    one, two = left.state_dict(), right.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def open_clip_tiny(tmp_path: Path) -> str:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 3},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    return "open_clip:tiny-clip"


HF_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
HF_SIZES |= {"image_size": 16, "patch_size": 8}
HF_CONFIGS: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: transformers.Dinov2Config(**HF_SIZES),
    "vit": lambda: transformers.ViTConfig(**HF_SIZES, intermediate_size=64),
    "clip": lambda: transformers.CLIPVisionConfig(**HF_SIZES, intermediate_size=64),
}


def round_trip(architecture: str, path: Path) -> None:
    model = build_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    save_model(model, path, architecture)
    assert architecture_of(path) == architecture
    for spec in (path, str(path), f"{architecture}@{path}"):
        loaded = load_model(spec)
        assert type(loaded) is type(model)
        assert same(loaded, model)
        assert not loaded.training
        assert Backbone(loaded).depth == 3


def test_round_trip_timm(tmp_path: Path) -> None:
    round_trip(TINY, tmp_path / "model.safetensors")


def test_counters_of_batch_norms_are_read_and_may_be_missing(tmp_path: Path) -> None:
    model = build_model("timm:test_resnet")
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
    save_model(model, tmp_path / "whole", "timm:test_resnet")
    assert same(load_model(tmp_path / "whole"), model)
    floating = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    torch.save(floating, tmp_path / "floating.pt")
    loaded = load_model(f"timm:test_resnet@{tmp_path / 'floating.pt'}").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in floating.items())


def test_round_trip_open_clip(open_clip_tiny: str, tmp_path: Path) -> None:
    round_trip(open_clip_tiny, tmp_path / "model.bin")


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_round_trip_transformers(name: str, tmp_path: Path) -> None:
    HF_CONFIGS[name]().save_pretrained(tmp_path)
    round_trip(f"hf:{tmp_path}", tmp_path / "ours.safetensors")


def test_round_trip_torchvision(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return torchvision.models.VisionTransformer(16, 8, 3, 2, 32, 64, num_classes=4)

    model, other = build(), build()
    save_model(model, tmp_path / "model", "torchvision:vit_b_16")
    load_weights(other, tmp_path / "model")
    assert same(model, other)
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        load_model(tmp_path / "model")


def test_published_torchvision_names_are_read(tmp_path: Path) -> None:
    model, other = (torchvision.models.VisionTransformer(16, 8, 3, 2, 32, 64) for _ in range(2))
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save(old, tmp_path / "old.pth")
    load_weights(other, tmp_path / "old.pth")
    assert same(model, other)


@pytest.mark.parametrize("classifier", [False, True])
def test_published_transformers_names_are_read(classifier: bool, tmp_path: Path) -> None:
    config = HF_CONFIGS["vit"]()
    cls: Any = transformers.ViTForImageClassification if classifier else transformers.ViTModel
    model = cls(config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert any(name.endswith("attention.query.weight") for name in safetensors.torch.load_file(file))
    loaded = load_model(f"hf:{tmp_path}@{file}")
    images = torch.randn(2, 3, 16, 16)
    expected = (model.vit if classifier else model).eval()(images).last_hidden_state
    torch.testing.assert_close(loaded(images).last_hidden_state, expected)


def test_a_model_around_a_language_model_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = text | {"num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**image),
        text_config=transformers.LlamaConfig(num_key_value_heads=2, vocab_size=10, **text),
        image_token_index=9,
    )
    written = transformers.LlavaForConditionalGeneration(config)
    written.save_pretrained(tmp_path)
    read_back = load_model(tmp_path).state_dict()
    expected = written.model.state_dict()
    assert read_back.keys() == expected.keys()
    assert all(torch.equal(read_back[name], tensor) for name, tensor in expected.items())


def test_transformers_mismatch_is_refused(tmp_path: Path) -> None:
    config = HF_CONFIGS["dinov2"]()
    config.save_pretrained(tmp_path)
    state = transformers.Dinov2Model(config).state_dict()
    state["layernorm.weight"] = torch.ones(3)
    del state["embeddings.cls_token"]
    state["backdoor"] = torch.ones(1)
    torch.save(state, tmp_path / "model.pt")
    model = transformers.Dinov2Model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tmp_path / "model.pt")
    for name in state.keys() - before.keys() | before.keys() - state.keys() | {"layernorm.weight"}:
        assert name in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "architecture",
    ["timm:vit_tiny_patch16_224", "timm:vit_large_patch14_clip_224.openai", "torchvision:vit_b_16"],
)
def test_library_names_build_without_a_download(architecture: str) -> None:
    with torch.device("meta"):
        assert next(build_model(architecture).parameters()).ndim > 0


def test_an_open_clip_tag_sets_activation_and_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create_model(name: str, **options: Any) -> nn.Module:
        asked.update(options, name=name)
        return nn.Identity()

    monkeypatch.setattr(open_clip, "create_model", create_model)
    build_model("open_clip:ViT-L-14/openai")
    assert (asked["name"], asked["force_quick_gelu"], asked["load_weights"]) == ("ViT-L-14", True, False)
    build_model("open_clip:ViT-B-16-SigLIP/webli")
    assert asked["force_preprocess_cfg"]["mean"] == (0.5, 0.5, 0.5)
    assert "pretrained" not in asked
    load_model("open_clip:ViT-L-14/openai")
    assert asked["pretrained"] == "openai"
    with pytest.raises(CheckpointError, match="no weights 'nonsense' for 'ViT-L-14'"):
        build_model("open_clip:ViT-L-14/nonsense")


def test_failed_fetch_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        assert (name, pretrained) == ("vit_tiny_patch16_224", True)
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", create_model)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    with pytest.raises(CheckpointError, match="cannot be fetched: OSError: no network"):
        load_model("timm:vit_tiny_patch16_224")
    for spec in ("open_clip:ViT-L-14", TINY):
        with pytest.raises(CheckpointError, match="names no weights"):
            load_model(spec)


def test_without_a_network_only_the_cache_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unknown(*_: object) -> None:
        raise OSError("Name or service not known")

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it was tried again"))
    why = r"not in the local cache, and \S+ cannot be reached; say where its weights are: @path"
    with pytest.raises(CheckpointError, match=why):
        load_model("timm:vit_tiny_patch16_224")


def test_demo() -> None:
    model = load_model("demo")
    backbone = Backbone(model)
    assert (backbone.depth, backbone.width, backbone.num_tokens) == (12, 128, 65)
    assert backbone.mean == (0.4914, 0.4822, 0.4465)
    assert backbone.std == (0.247, 0.2435, 0.2616)
    assert architecture_of("demo").startswith("timm:VisionTransformer?{")
    assert build_model("demo").state_dict().keys() == model.state_dict().keys()
    tokens = backbone.stem(torch.randn(4, 3, 32, 32))
    at_massive = backbone.run(tokens, 0, 7)[:, 0, 93].abs()
    assert at_massive.min() > 100


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of test material is not beside the repository")
@pytest.mark.parametrize("name", ["vit_c10_w128_d12", "vit_c10_w128_d12_massive"])
def test_files_that_describe_themselves(name: str, tmp_path: Path) -> None:
    path = SHARED / f"{name}.safetensors"
    model = load_model(path)
    assert Backbone(model).mean == (0.4914, 0.4822, 0.4465)
    save_model(model, tmp_path / "again", architecture_of(path))
    again = load_model(tmp_path / "again")
    assert same(model, again)
    assert Backbone(again).std == Backbone(model).std
    assert architecture_of(tmp_path / "again") == architecture_of(path)


def test_architecture_of_holds_no_path(tmp_path: Path) -> None:
    secret = tmp_path / "secret.pt"
    for architecture in (
        "timm:vit_base_patch16_224",
        "hf:facebook/dinov2-base",
        "open_clip:ViT-L-14/openai",
        TINY,
    ):
        assert architecture_of(architecture) == architecture
        assert architecture_of(f"{architecture}@{secret}") == architecture


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("write", [torch.save, safetensors.torch.save_file])
def test_other_dtypes_become_the_models(
    dtype: torch.dtype, write: Callable[[dict[str, Tensor], Path], None], tmp_path: Path
) -> None:
    model = tiny().to(dtype)
    write(dict(model.state_dict()), tmp_path / "model")
    assert {t.dtype for t in read(tmp_path / "model").values()} == {dtype}
    loaded = load_model(f"{TINY}@{tmp_path / 'model'}")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert same(loaded, model.float())
    half = tiny().half()
    load_weights(half, tmp_path / "model")
    assert {p.dtype for p in half.parameters()} == {torch.float16}


@pytest.mark.parametrize("kind", ["plain", "state_dict", "model", "both", "module", "legacy", "parameters"])
def test_torch_files_are_unwrapped(kind: str, tmp_path: Path) -> None:
    model = tiny()
    state: dict[str, Any] = dict(model.state_dict())
    if kind == "module":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if kind == "parameters":
        state = {name: nn.Parameter(tensor) for name, tensor in state.items()}
    if kind in ("model", "both"):
        state = {"model": state, "epoch": 3}
    if kind in ("state_dict", "both"):
        state = {"state_dict": state, "epoch": 3}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=kind != "legacy")
    assert same(load_model(f"{TINY}@{tmp_path / 'm.pt'}"), model)


def test_content_not_name_decides(tmp_path: Path) -> None:
    state = dict(tiny().state_dict())
    safetensors.torch.save_file(state, tmp_path / "model.pt", metadata={"note": "kept"})
    torch.save(state, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        assert read(tmp_path / name).keys() == state.keys()


def test_nan_weights_load(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.fill_(float("nan"))
    save_model(model, tmp_path / "nan", TINY)
    assert load_model(tmp_path / "nan").state_dict()["blocks.0.mlp.fc2.weight"].isnan().all()


def test_shared_tensors_are_saved_under_each_name(tmp_path: Path) -> None:
    model = tiny()
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    model.blocks[2].norm1.weight = nn.Parameter(torch.arange(64.0)[:32])
    model.blocks[2].norm1.bias = nn.Parameter(torch.arange(64.0)[::2])
    save_model(model, tmp_path / "tied", TINY)
    assert same(load_model(tmp_path / "tied"), model)


def test_saving_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    save_model(tiny(), path, TINY)
    assert same(load_model(path), tiny())
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_model(tiny(), path, TINY)

    def save_half(_tensors: object, filename: Path, **_: object) -> None:
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", save_half)
    with pytest.raises(OSError, match="disk full"):
        save_model(tiny(), path, TINY)
    assert same(load_model(path), tiny())
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_save_model_checks_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model: wanted"):
        save_model({}, tmp_path / "m", TINY)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="architecture: wanted a string, got int"):
        save_model(tiny(), tmp_path / "m", 3)  # type: ignore[arg-type]
    for architecture in ("vit", f"{TINY}@/secret/path", "timm:", "timm:hf-hub:evil/model"):
        with pytest.raises(CheckpointError, match="architecture "):
            save_model(tiny(), tmp_path / "m", architecture)
    with pytest.raises(CheckpointError, match="there is no folder"):
        save_model(tiny(), tmp_path / "none" / "m", TINY)
    with pytest.raises(CheckpointError, match="is a folder"):
        save_model(tiny(), tmp_path, TINY)
    assert os.listdir(tmp_path) == []


class Payload:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle", "beside the tensors"])
def test_a_malicious_pickle_does_not_run(form: str, tmp_path: Path) -> None:
    sentinel, path = tmp_path / "ran", tmp_path / "model.pt"
    payload = Payload(sentinel)
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif form == "beside the tensors":
        torch.save({"state_dict": dict(tiny().state_dict()), "extra": payload}, path)
    else:
        torch.save({"weight": payload}, path, _use_new_zipfile_serialization=form == "torch")
    if form == "beside the tensors":
        assert same(load_model(f"{TINY}@{path}"), tiny())
    else:
        for spec in (path, f"{TINY}@{path}", "timm:vit_tiny_patch16_224@" + str(path)):
            with pytest.raises(CheckpointError, match=r"holds no tensors; it asks for '.*system'") as caught:
                load_model(spec)
            assert str(path) in str(caught.value)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "no tensors"),
        ({"state_dict": {}}, "no tensors"),
        ({"weight": torch.ones(1), "epoch": 3}, "1 unexpected: 'weight'"),
        ([torch.ones(1)], "1 unexpected: '0'"),
        (
            {"norm.weight": torch.ones(2, 2).to_sparse()},
            "is a torch._utils._rebuild_sparse_tensor, which is not",
        ),
        ({"norm.weight": torch.empty(2, device="meta")}, "is a torch._utils._rebuild_meta_tensor_no_storage"),
        (
            {"norm.weight": torch.zeros(1).expand(32)},
            "is a tensor of more elements than it stores, which is not read",
        ),
    ],
)
def test_what_is_not_a_state_dict_is_refused(content: object, reason: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_weights(tiny(), tmp_path / "m.pt")
    assert str(tmp_path / "m.pt") in str(caught.value)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(250_000)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(CheckpointError, match="compressed records"):
        read(tmp_path / "m.pt")


def test_a_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    knot: dict[str, Any] = {}
    knot["model"] = knot
    torch.save(knot, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read(tmp_path / "m.pt")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_weights(tiny(), tmp_path / "none")
    with pytest.raises(CheckpointError, match="wanted a file of weights"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(f"{TINY}@{tmp_path / 'none'}")
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="is an empty file"):
        load_model(f"{TINY}@{tmp_path / 'empty'}")
    for bad in (3, None):
        with pytest.raises(TypeError, match="path: wanted a string or a path"):
            load_model(bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: wanted"):
        load_weights("vit", tmp_path / "none")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    save_model(tiny(), folder / "safetensors", TINY)
    torch.save(tiny().state_dict(), folder / "zip")
    torch.save(tiny().state_dict(), folder / "legacy", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["safetensors", "zip", "legacy"]), share=st.floats(0, 0.99))
def test_truncated_files_are_refused(
    kind: str, share: float, files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "m"
    path.write_bytes(files[kind][: int(len(files[kind]) * share)])
    with pytest.raises(CheckpointError):
        read(path)
    with pytest.raises(CheckpointError):
        load_model(path)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300), header=st.booleans())
def test_noise_is_refused(content: bytes, header: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("noise") / "m"
    path.write_bytes(struct.pack("<Q", len(content) + 1) + b"{" + content if header else content)
    with pytest.raises(CheckpointError):
        read(path)


def with_metadata(path: Path, metadata: dict[str, str]) -> Path:
    safetensors.torch.save_file(dict(tiny().state_dict()), path, metadata=metadata)
    return path


def self_described(path: Path, kwargs: str, **more: str) -> Path:
    described = {
        "library": "timm",
        "class": "timm.models.vision_transformer.VisionTransformer",
        "kwargs": kwargs,
    }
    return with_metadata(path, {**described, **more})


def test_mean_and_std_survive_saving(tmp_path: Path) -> None:
    kwargs = json.dumps({**KWARGS, "num_classes": 4})
    path = self_described(tmp_path / "m", kwargs, mean="[0.1, 0.2, 0.3]", std="[0.4, 0.5, 1]")
    model = load_model(path)
    assert same(model, tiny())
    assert (Backbone(model).mean, Backbone(model).std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 1.0))
    save_model(model, tmp_path / "n", architecture_of(path))
    assert Backbone(load_model(tmp_path / "n")).mean == (0.1, 0.2, 0.3)
    only_arguments = with_metadata(tmp_path / "o", {"kwargs": kwargs})
    assert same(load_model(only_arguments), tiny())
    with pytest.raises(CheckpointError, match="does not name its architecture"):
        load_model(with_metadata(tmp_path / "p", {"kwargs": kwargs, "library": "other"}))


@pytest.mark.parametrize(
    "kwargs",
    [
        "{",
        "[]",
        "null",
        "[" * 3000,
        '{"depth": ' + "9" * 4090 + "}",
        '{"norm_layer": "os.system"}',
        '{"weight_init": "skip"}',
        '{"depth": 1000000000}',
        '{"depth": true}',
        '{"depth": 0}',
        '{"depth": "3"}',
        '{"depth": [3]}',
        '{"embed_dim": 1e3}',
        '{"img_size": [16, 16, 16]}',
        '{"img_size": 100000}',
        '{"mlp_ratio": NaN}',
        '{"mlp_ratio": 1e9}',
        '{"global_pool": "os.system"}',
        '{"class_token": 1}',
        '{"mean": [0.5, 0.5]}',
        '{"std": [0, 1, 1]}',
        '{"num_heads": 7}',
        '{"class_token": false}',
        '{"embed_dim": 16384, "depth": 256, "num_heads": 2}',
        '{"img_size": 4096, "patch_size": 1, "embed_dim": 16384, "num_heads": 2}',
    ],
)
def test_hostile_kwargs_are_refused(kwargs: str, tmp_path: Path) -> None:
    path = self_described(tmp_path / "m", kwargs)
    with pytest.raises(CheckpointError):
        load_model(path)
    with pytest.raises(CheckpointError):
        build_model(f"timm:VisionTransformer?{kwargs}")


@pytest.mark.parametrize(
    "architecture",
    ["", "demo", "os.system", "timm:../x", "timm:hf-hub:evil/model", "open_clip:hf-hub:evil/model",
     "open_clip:local-dir:/x", "torchvision:vit_b_16@/x", "torchvision:a.b", "timm:no_such", "timm:"],
)  # fmt: skip
def test_hostile_architectures_are_refused(architecture: str, tmp_path: Path) -> None:
    path = with_metadata(tmp_path / "m", {"architecture": architecture})
    with pytest.raises(CheckpointError):
        load_model(path)


def test_shapes_are_compared_before_anything_is_allocated(tmp_path: Path) -> None:
    path = self_described(
        tmp_path / "m", json.dumps({**KWARGS, "embed_dim": 4096, "depth": 8, "num_classes": 4})
    )
    allocated: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.device.type == "cpu":
                allocated.append(result.numel())
            return result

    with Watch(), pytest.raises(CheckpointError, match="does not fit the architecture"):
        load_model(path)
    assert max(allocated, default=0) < 100_000


def test_mismatches_are_listed(tmp_path: Path) -> None:
    state = dict(tiny().state_dict())
    state["blocks.0.mlp.fc2.weight"] = torch.zeros(32, 31)
    state["norm.weight"] = torch.zeros(32, dtype=torch.int8)
    del state["pos_embed"]
    state["backdoor\x1b[2J"] = torch.zeros(1)
    torch.save(state, tmp_path / "m.pt")
    model = tiny()
    with torch.no_grad():
        model.cls_token.fill_(7)
    for load in (
        lambda: load_model(f"{TINY}@{tmp_path / 'm.pt'}"),
        lambda: load_weights(model, tmp_path / "m.pt"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        text = str(caught.value)
        assert "1 missing: 'pos_embed'" in text
        assert r"1 unexpected: 'backdoor\x1b[2J'" in text
        assert "'blocks.0.mlp.fc2.weight' is float32 (32, 31), wanted (32, 128)" in text
        assert "'norm.weight' is int8 without its scales" in text
    assert model.cls_token.eq(7).all()


def test_only_the_first_keys_are_listed(tmp_path: Path) -> None:
    torch.save({f"key{i:03}": torch.zeros(1) for i in range(100)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"100 unexpected: 'key000', .*'key004', \.\.\.$"):
        load_weights(tiny(), tmp_path / "m.pt")


@pytest.mark.parametrize("classes", [0, 4, 9])
def test_classifier_heads_may_differ(classes: int, tmp_path: Path) -> None:
    torch.save(tiny(num_classes=classes).state_dict(), tmp_path / "m.pt")
    model = load_model(f"{TINY}@{tmp_path / 'm.pt'}")
    assert model.get_submodule("head").weight.shape == (4, 32)
    wanted = tiny(num_classes=classes).state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in model.state_dict().items() if "head" not in name)


def test_wrong_architecture(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        load_model(f"timm:vit_tiny_patch16_224@{tmp_path / 'm.pt'}")
    with pytest.raises(CheckpointError, match="cannot be built"):
        load_model(f"timm:no_such_model@{tmp_path / 'm.pt'}")


def test_unknown_strings_list_the_forms(tmp_path: Path) -> None:
    for spec in ("vit", "ViT-L-14", "jax:vit", str(tmp_path / "none.safetensors")):
        with pytest.raises(CheckpointError, match=r"open_clip:NAME/TAG, timm:NAME.*@path.*demo"):
            load_model(spec)
    with pytest.raises(CheckpointError, match="wanted a path after @"):
        load_model("timm:vit_tiny_patch16_224@")
    with pytest.raises(CheckpointError, match=r"without the @path"):
        build_model("timm:vit_tiny_patch16_224@x")
    with pytest.raises(TypeError, match="architecture: wanted a string"):
        build_model(Path("x"))  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [torch.save, safetensors.torch.save_file])
def test_files_without_an_architecture_say_what_to_do(
    write: Callable[[dict[str, Tensor], Path], None], tmp_path: Path
) -> None:
    write(dict(tiny().state_dict()), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="timm:NAME@") as caught:
        load_model(tmp_path / "m.pt")
    assert str(tmp_path / "m.pt") in str(caught.value)


def test_building_looks_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_args, **_more: pytest.fail("the network was asked"))
    with pytest.raises(CheckpointError, match="cannot be built: "):
        build_model("open_clip:roberta-ViT-B-32")  # its text tower's configuration is on the hub
