"""Modules in special dress: marked and verified, or refused in one sentence before any work."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from tiny import vit
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from activemark_fast import Key, embed, save_model, verify
from activemark_fast.embedding import Embedding, UnverifiedMarkError
from activemark_fast.watermark import fingerprint

KEY = Key(b"k" * 32)


def marked(model: nn.Module, **settings: Any) -> Embedding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return embed(model, KEY, **({"fidelity": 0.95} | settings))


def found(model: nn.Module, embedding: Embedding) -> bool:
    verdict = verify(model, embedding.watermark, KEY)
    return (verdict.decision, verdict.identical) == ("match", True)


@pytest.fixture(scope="module")
def plain() -> Embedding:
    return marked(vit())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "data parallel"])
def test_wrappers_are_looked_through(
    wrap: Callable[[nn.Module], Any], plain: Embedding, tmp_path: Path
) -> None:
    wrapped = wrap(vit())
    embedding = marked(wrapped)
    assert fingerprint(embedding.model) == fingerprint(plain.model)
    assert found(wrap(embedding.model), embedding)
    within = marked(wrapped, inplace=True)
    assert within.model is wrapped
    assert found(wrapped, within)
    save_model(wrapped, tmp_path / "m.safetensors", "timm:vit_tiny_patch16_224")
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert set(file.keys()) == set(vit().state_dict())


class LoRA(nn.Module):
    """As PEFT wraps a linear layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_an_adapter_on_an_mlp_is_left_alone() -> None:
    model = vit()
    for block in model.blocks:
        block.mlp.fc2 = LoRA(block.mlp.fc2)
    embedding = marked(model)
    assert found(embedding.model, embedding)
    for before, after in zip(model.blocks, embedding.model.blocks, strict=True):
        assert torch.equal(before.mlp.fc2.lora_B.weight, after.mlp.fc2.lora_B.weight)
    for block in embedding.model.blocks:  # merged, as it may be released
        lora = block.mlp.fc2
        with torch.no_grad():
            lora.base_layer.weight += lora.lora_B.weight @ lora.lora_A.weight
        block.mlp.fc2 = lora.base_layer
    assert verify(embedding.model, embedding.watermark, KEY).decision == "match"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype: torch.dtype, plain: Embedding) -> None:
    torch.set_default_dtype(dtype)
    try:
        embedding = marked(vit().float())
        assert found(embedding.model, embedding)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_inference_mode_changes_nothing(plain: Embedding) -> None:
    model = vit()
    with torch.inference_mode():
        embedding = marked(model)
        assert found(embedding.model, embedding)
    assert fingerprint(embedding.model) == fingerprint(plain.model)


@pytest.mark.parametrize(
    "context", [torch.autocast("cpu", torch.bfloat16), torch.device("meta")], ids=["autocast", "device"]
)
def test_autocast_and_another_default_device_change_nothing(context: Any, plain: Embedding) -> None:
    model = vit()
    with context:
        embedding = marked(model)
        assert found(embedding.model, embedding)
    assert fingerprint(embedding.model) == fingerprint(plain.model)


def test_hooks_run_and_stay() -> None:
    model = vit()
    calls: list[int] = []
    model.blocks[3].register_forward_hook(lambda _module, _args, output: calls.append(len(output)))
    embedding = marked(model)
    assert calls
    assert found(embedding.model, embedding)
    assert len(model.blocks[3]._forward_hooks) == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_pruned_weights_beside_the_carriers_are_copied(inplace: bool) -> None:
    model = vit()
    for block in model.blocks:
        prune.l1_unstructured(block.attn.qkv, "weight", 0.3)
    embedding = marked(model, inplace=inplace)
    assert found(embedding.model, embedding)
    for before, after in zip(model.blocks, embedding.model.blocks, strict=True):
        assert torch.equal(before.attn.qkv.weight_mask, after.attn.qkv.weight_mask)
        assert (before.attn.qkv.weight_orig is after.attn.qkv.weight_orig) == inplace


def test_marked_in_place_is_as_marked_in_a_copy(plain: Embedding) -> None:
    model = vit()
    assert fingerprint(marked(model, inplace=True).model) == fingerprint(plain.model) == fingerprint(model)


def every_fc2(change: Callable[[nn.Module], Any]) -> nn.Module:
    model = vit()
    for block in model.blocks:
        change(block.mlp.fc2)
    return model


def on_meta() -> nn.Module:
    model = vit()
    model.head.to("meta")
    return model


def partly_compiled() -> nn.Module:
    model = vit()
    model.blocks[2] = torch.compile(model.blocks[2])
    return model


def compiled_in_place() -> nn.Module:
    model = vit()
    model.compile()
    return model


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return vit()


def stored_as_uint8() -> nn.Module:
    model = vit()
    for block in model.blocks:
        fc2 = block.mlp.fc2
        fc2.weight = nn.Parameter(fc2.weight.to(torch.uint8), requires_grad=False)
        fc2.forward = lambda x, fc2=fc2: nn.functional.linear(x, fc2.weight.float())
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: every_fc2(parametrizations.weight_norm), "block 1 is computed from other tensors"),
        (lambda: every_fc2(nn.utils.weight_norm), "block 1 is computed from other tensors"),
        (lambda: every_fc2(lambda m: prune.l1_unstructured(m, "weight", 0.1)), "computed from other tensors"),
        (
            lambda: torch.ao.quantization.quantize_dynamic(vit(), {nn.Linear}, torch.qint8),
            r"block 1 called no torch\.nn\.Linear",
        ),
        (stored_as_uint8, r"block 1 is quantised or sharded \(uint8\)"),
        (made_in_inference_mode, "was made in inference mode"),
        (on_meta, "head.weight holds no values"),
        (partly_compiled, "'blocks.2' is compiled"),
        (lambda: torch.jit.trace(vit(), torch.zeros(1, 3, 32, 32)), "it is TorchScript"),
        (lambda: torch.fx.symbolic_trace(vit().eval()), "it is a traced graph"),
        (compiled_in_place, "it is compiled: mark the model first"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_cannot_be_marked_is_refused_in_one_sentence(
    build: Callable[[], nn.Module], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        importlib.import_module("activemark_fast.embedding"),
        "clean_images",
        lambda *_: pytest.fail("work had begun"),
    )
    with pytest.raises(ValueError, match=why) as caught:
        embed(build(), KEY)
    assert "\n" not in str(caught.value)


class Stubborn(nn.Linear):
    """Computes with the weight it was made with, whatever is written into it, as a packed copy would."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "packed"):
            self.packed = self.weight.detach().clone()
        return nn.functional.linear(x, self.packed, self.bias)


def test_a_mark_that_cannot_be_verified_is_an_error_and_the_model_stays() -> None:
    model = vit()
    for block in model.blocks:
        block.mlp.fc2.__class__ = block.attn.proj.__class__ = Stubborn
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnverifiedMarkError, match=r"not handed out, for verify says 'no match' of it"):
        marked(model, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
