from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from activemark_fast.backbone import Backbone
from activemark_fast.codec import CODECS, Codec
from activemark_fast.key import Key
from activemark_fast.marking.cosine import feature_cosine
from activemark_fast.marking.finetune import CHECK_EVERY, finetune
from activemark_fast.marking.suffix import final_features, read_mark, site_activations
from activemark_fast.ops.decode import Decoded
from activemark_fast.profiling import measure

KEY = Key(b"k" * 32)
DEPTH, BITS = 6, 8


def vit(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": DEPTH, "num_heads": 2}
    model = VisionTransformer(**sizes, num_classes=3).eval().to(dtype)
    model.get_parameter("cls_token").requires_grad_(False)
    model.get_parameter("blocks.3.attn.qkv.weight").requires_grad_(False)
    return model


class Run:
    """A tiny model marked by gradient steps."""

    def __init__(self, codec: str = "keyed", dtype: torch.dtype = torch.float32, seed: str = "a") -> None:
        self.model = vit(dtype)
        self.original_model = copy.deepcopy(self.model)
        self.backbone, self.original = Backbone(self.model), Backbone(self.original_model)
        pixels = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.site = measure(self.backbone, pixels[:4]).site().site
        self.activations = site_activations(self.backbone, pixels, self.site.block, nullcontext)
        self.codec: Codec = CODECS[codec].create(KEY, self.site, BITS, self.activations.output, "token")
        self.features = final_features(self.backbone, self.activations, self.site.block, nullcontext)
        self.seed = seed
        self.losses: list[float] = []
        self.asked: list[int] = []

    def train(
        self,
        steps: int,
        stop: Callable[[int], bool] = lambda _step: False,
        autocast: Any = nullcontext,
        compile: str = "eager",
    ) -> int:
        def reached(step: int, loss: float) -> bool:
            self.asked.append(step)
            self.losses.append(loss)
            return stop(step)

        taken, self.how = finetune(
            self.backbone,
            self.original,
            self.codec,
            self.site,
            self.activations,
            self.features,
            KEY.stream(self.seed),
            steps,
            autocast,
            compile,
            reached,
        )
        return taken

    def wrong(self) -> float:
        message = torch.from_numpy(KEY.stream("read").bits((24, BITS)))
        read = read_mark(self.backbone, self.codec, self.activations, message, self.site.block, nullcontext)
        return float(read[DEPTH - 2].errors.double().mean()) / BITS

    def fidelity(self) -> float:
        now = final_features(self.backbone, self.activations, self.site.block, nullcontext)
        return feature_cosine(now, self.features)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        ("keyed", torch.float32),
        ("keyed", torch.bfloat16),
        ("keyed", torch.float16),
        ("learned", torch.float32),
    ],
)
def test_only_the_suffix_is_trained_and_the_loss_falls(codec: str, dtype: torch.dtype) -> None:
    run = Run(codec, dtype)
    before, flags = state(run.model), {n: p.requires_grad for n, p in run.model.named_parameters()}
    coded = {name: tensor.clone() for name, tensor in run.codec.state().items()}
    assert 0.3 < run.wrong() < 0.7
    checks = 4 if dtype == torch.float32 else 2  # CPUs are slow in half precision
    assert run.train(checks * CHECK_EVERY) == checks * CHECK_EVERY
    assert run.asked == [i * CHECK_EVERY for i in range(1, checks + 1)]
    if codec == "keyed":  # the learned codec's loss gains a term while it learns
        assert run.losses[-1] < run.losses[0]
        assert run.wrong() < (0.1 if checks == 4 else 0.3)
    assert run.fidelity() > 0.85

    after = state(run.model)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    suffix = tuple(f"blocks.{block}." for block in range(run.site.block + 1, DEPTH - 1))
    for name, tensor in after.items():
        same = torch.equal(tensor, before[name])
        if not name.startswith(suffix):
            assert same, name
        elif name.endswith("weight") and dtype == torch.float32:
            assert not same, name
        assert tensor.dtype == dtype
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.original_model.state_dict().items())
    assert {n: p.requires_grad for n, p in run.model.named_parameters()} == flags
    for model in (run.model, run.original_model):
        assert all(p.grad is None for p in model.parameters())
    changed = [name for name, tensor in run.codec.state().items() if not torch.equal(tensor, coded[name])]
    weights = [name for name in coded if name != "original_rate"]  # which `embed` measures
    assert changed == (weights if codec == "learned" else [])


def test_it_stops_when_told_to() -> None:
    run = Run()
    assert run.train(500, lambda step: step >= 2 * CHECK_EVERY) == 2 * CHECK_EVERY
    assert run.asked == [CHECK_EVERY, 2 * CHECK_EVERY]


@pytest.mark.parametrize("steps", [0, 3, CHECK_EVERY + 1])
def test_the_last_step_is_always_looked_at(steps: int) -> None:
    run = Run()
    before = state(run.model)
    assert run.train(steps) == steps
    assert run.asked == {0: [], 3: [3], CHECK_EVERY + 1: [CHECK_EVERY, CHECK_EVERY + 1]}[steps]
    assert all(torch.equal(before[n], t) for n, t in run.model.state_dict().items()) == (steps == 0)


def test_the_same_stream_gives_the_same_weights() -> None:
    first, second, third = Run("learned"), Run("learned"), Run("learned", seed="b")
    for run in (first, second, third):
        torch.manual_seed(id(run) % 1000)
        run.train(5)
    ours, again, other = (state(run.model) for run in (first, second, third))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert not all(torch.equal(ours[name], other[name]) for name in ours)
    for name, tensor in first.codec.state().items():
        assert torch.equal(tensor, second.codec.state()[name])


def test_an_interruption_restores_flags_and_gradients() -> None:
    run = Run()
    flags = [p.requires_grad for p in run.model.parameters()]

    def interrupt(_step: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(CHECK_EVERY, interrupt)
    assert [p.requires_grad for p in run.model.parameters()] == flags
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("codec", ["keyed", "learned"])
def test_mixed_precision_trains_float32_weights(codec: str) -> None:
    run = Run(codec)
    before = state(run.model)
    run.train(2 * CHECK_EVERY, autocast=lambda _: torch.autocast("cpu", dtype=torch.bfloat16))
    if codec == "keyed":
        assert run.losses[-1] < run.losses[0]
    moved = [name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.model.state_dict().values())
    assert all(
        t.dtype == torch.float32 for t in (*run.model.state_dict().values(), *run.codec.state().values())
    )


def test_the_learned_codec_learns_to_write_and_read() -> None:
    run = Run("learned")
    run.train(10 * CHECK_EVERY)
    assert run.wrong() < 0.05
    assert run.fidelity() > 0.9


@pytest.mark.parametrize("codec", ["keyed", "learned"])
def test_a_step_without_room_is_taken_in_parts(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("activemark_fast.marking.finetune")
    plenty, scarce = Run(codec), Run(codec)
    plenty.train(2)
    real, sizes = module.message_loss, []

    def short_of_memory(decoded: dict[int, Decoded]) -> Tensor:
        images = len(decoded[DEPTH - 2].loss)
        sizes.append(images)
        if images > 8 or sizes == [32, 16, 8, 8]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(decoded)

    monkeypatch.setattr(module, "message_loss", short_of_memory)
    scarce.train(2)
    assert sizes[:4] == [32, 16, 8, 8]
    assert set(sizes[4:]) == {4}
    assert scarce.losses == pytest.approx(plenty.losses, rel=0.05)
    # Adam's first step has one size whatever the gradient's: where that is near 0 its sign is chance.
    for ours, theirs in zip(plenty.model.parameters(), scarce.model.parameters(), strict=True):
        assert float((ours - theirs).detach().abs().median()) < 1e-6
