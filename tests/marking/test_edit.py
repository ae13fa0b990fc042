from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import open_clip
import pytest
import torch
import torchvision
from tiny import vit
from torch import Tensor, nn

from activemark_fast.backbone import Backbone
from activemark_fast.codec import KeyedCodec
from activemark_fast.key import Key
from activemark_fast.marking.edit import (
    CLEAN_ROWS,
    FIRST_STRENGTH,
    GROUPS,
    LARGEST_GAIN,
    RIDGE,
    UNUSED,
    EditStrength,
    _next_gain,
    edit,
    search_edit,
)
from activemark_fast.marking.engine import Engine
from activemark_fast.marking.quality import QualityCheck
from activemark_fast.marking.suffix import (
    SiteActivations,
    feature_cosine,
    final_features,
    read_mark,
    site_activations,
)
from activemark_fast.profile import measure
from activemark_fast.progress import Progress
from activemark_fast.site import Site

KEY = Key(b"k" * 32)
WIDTH, DEPTH, BITS = 96, 6, 16


def timm_vit(**kwargs: Any) -> nn.Module:
    return vit(**({"embed_dim": WIDTH, "num_classes": 0} | kwargs))


def clip_tower(batch_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=3)
    vision = open_clip.CLIPVisionCfg(layers=DEPTH, width=WIDTH, head_width=24, image_size=32, patch_size=8)
    tower = open_clip.model.CLIP(16, vision, text).visual
    # open_clip starts the layers that write to the stream much smaller than trained ones are.
    with torch.no_grad():
        for block in tower.transformer.resblocks:
            block.mlp.c_proj.weight.normal_(std=0.05)
    if not batch_first:
        blocks = tower.transformer.state_dict()
        tower.transformer = open_clip.transformer.Transformer(WIDTH, DEPTH, 4, batch_first=False)
        tower.transformer.load_state_dict(blocks)
    return tower.eval()


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(32, 8, DEPTH, 4, WIDTH, 2 * WIDTH, num_classes=5).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_vit,
    "timm_layer_scale": lambda: timm_vit(init_values=0.1),
    "open_clip": clip_tower,
    "open_clip_sequence_first": lambda: clip_tower(batch_first=False),
    "torchvision": torchvision_vit,
}


def engine(batch: int = 128, autocast: Callable[[], Any] = nullcontext) -> Engine:
    return Engine(torch.device("cpu"), autocast, batch, False, 0, "")


@dataclass(frozen=True)
class Case:
    """A model at the site, with 48 images to edit on and 16 others to look at."""

    backbone: Backbone
    site: Site
    codec: KeyedCodec
    seen: SiteActivations
    unseen: SiteActivations
    messages: Tensor  # (2, 48, BITS)
    unseen_messages: Tensor  # (16, BITS)

    def read(self) -> dict[int, Tensor]:
        args = (self.codec, self.unseen, self.unseen_messages, self.site.block, nullcontext)
        return {tap: read.logits for tap, read in read_mark(self.backbone, *args).items()}

    def features(self) -> Tensor:
        return final_features(self.backbone, self.unseen, self.site.block, nullcontext)

    def edit(self, gain: float = 1.0, protection: float = 10.0, using: Engine | None = None) -> list[Tensor]:
        strength = EditStrength(gain, protection)
        held = (self.seen.output, self.messages, strength, using or engine())
        with Progress(shown=False) as bar:
            return edit(self.backbone, self.codec, self.site, *held, bar)

    @property
    def edited(self) -> range:
        return range(self.site.block + 1, self.site.taps[-1] + 1)

    def check(self) -> QualityCheck:
        held = (self.unseen, self.unseen_messages)
        return QualityCheck(self.backbone, self.codec, self.site, *held, nullcontext)


def case(model: nn.Module, block: int | None = None) -> Case:
    backbone = Backbone(model)
    pixels = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(backbone.dtype)
    site = measure(backbone, pixels[:8]).site(block=block).site
    activations = site_activations(backbone, pixels, site.block, nullcontext)
    codec = KeyedCodec.create(KEY, site, BITS, activations.output, "token")
    drawn = KEY.stream("test").bits((3, 48, BITS))
    return Case(
        backbone,
        site,
        codec,
        activations[:48],
        activations[48:],
        torch.from_numpy(drawn[:2]),
        torch.from_numpy(drawn[2, :16]),
    )


def wrong(logits: Tensor, message: Tensor) -> float:
    return float(((logits > 0) != message.bool()).double().mean())


@pytest.mark.parametrize("name", MODELS)
def test_the_mark_is_read_on_unseen_images_and_the_features_stay(name: str) -> None:
    marked = case(MODELS[name]())
    assert len(marked.site.taps) == 2
    model = marked.backbone.model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    clean = marked.features()
    for logits in marked.read().values():
        assert 0.25 < wrong(logits, marked.unseen_messages) < 0.75
    marked.edit()
    for logits in marked.read().values():
        assert wrong(logits, marked.unseen_messages) < 0.08
    assert feature_cosine(marked.features(), clean) > 0.75

    edited = {id(marked.backbone.mlp_out(b).weight) for b in range(marked.site.block + 1, DEPTH - 1)}
    allowed = {key for key, parameter in model.named_parameters() if id(parameter) in edited}
    assert len(allowed) == DEPTH - 2 - marked.site.block
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == allowed


def test_a_model_that_takes_tokens_first_gets_the_same_edit() -> None:
    ours, theirs = case(clip_tower()), case(clip_tower(batch_first=False))
    ours.edit()
    theirs.edit()
    for block in range(ours.site.block + 1, DEPTH - 1):
        expected = ours.backbone.mlp_out(block).weight
        torch.testing.assert_close(theirs.backbone.mlp_out(block).weight, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [None, 0.1], ids=["plain", "layer_scale"])
@pytest.mark.parametrize("protection", [0.5, 20.0])
def test_one_block_against_the_formula_in_float64(protection: float, scale: float | None) -> None:
    # Site at the third block from the end: one block carries the whole mark.
    marked = case(timm_vit(init_values=scale).double(), DEPTH - 3)
    (tap,) = marked.site.taps
    backbone, codec, gain = marked.backbone, marked.codec, 0.7
    linear = backbone.mlp_out(tap)
    before = linear.weight.detach().clone()
    hidden: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
    clean = marked.seen.output
    slots, read = codec.slots, codec.read_directions[tap].double()
    with torch.no_grad():
        h_clean = backbone.run(clean, tap, tap + 1)
        k_clean = hidden.pop()
        dk, delta = [], []
        for message in marked.messages:
            signs = 2 * message.double() - 1
            injected = clean.clone()
            injected[:, slots] += (codec.scale.double() * signs @ codec.inject_directions.double())[:, None]
            h = backbone.run(injected, tap, tap + 1)
            # Every GROUPS-th slot is in one group.
            change, moved = hidden.pop() - k_clean, (h - h_clean) @ read.T
            wanted = gain * codec.scale.double() * signs
            for group in range(GROUPS):
                dk.append(change[:, slots[group::GROUPS]].mean(dim=1))
                delta.append(wanted - moved[:, slots[group::GROUPS]].mean(dim=1))
    hook.remove()
    k, d = torch.cat(dk), torch.cat(delta)
    every = max(1, len(clean) * clean.shape[1] // (CLEAN_ROWS * linear.in_features))
    k0 = k_clean.flatten(0, 1)[::every]
    matrix = k.T @ k / len(k) + protection * k0.T @ k0 / len(k0)
    matrix += RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    change = read.T @ torch.linalg.solve(matrix, k.T @ d / len(k)).T
    if scale is not None:
        change /= scale
    marked.edit(gain, protection)
    torch.testing.assert_close(
        linear.weight - before, change, rtol=1e-3, atol=1e-4 * float(change.abs().max())
    )


def test_gain_and_protection_are_dials() -> None:
    def measured(gain: float, protection: float) -> tuple[float, float]:
        marked = case(timm_vit())
        clean = marked.features()
        marked.edit(gain, protection)
        signs = 2 * marked.unseen_messages.float() - 1
        return float((marked.read()[DEPTH - 2] * signs).mean()), feature_cosine(marked.features(), clean)

    weak, usual, shielded = measured(0.3, 10.0), measured(1.0, 10.0), measured(1.0, 300.0)
    assert weak[0] < usual[0]
    assert weak[1] > usual[1]
    assert shielded[0] < usual[0]
    assert shielded[1] > usual[1]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_edit_in_mixed_and_in_half_precision(precision: torch.dtype) -> None:
    half = case(timm_vit().to(precision))
    half.edit()
    for logits in half.read().values():
        assert wrong(logits, half.unseen_messages) < 0.08
    assert half.backbone.dtype == precision

    mixed = case(timm_vit())
    mixed.edit(using=engine(autocast=lambda: torch.autocast("cpu", dtype=precision)))
    for logits in mixed.read().values():
        assert wrong(logits, mixed.unseen_messages) < 0.08
    assert mixed.backbone.dtype == torch.float32


@pytest.mark.parametrize("fidelity", [0.8, 0.97])
def test_search_keeps_the_fidelity_and_its_history(fidelity: float) -> None:
    marked = case(timm_vit())
    check = marked.check()
    with Progress(shown=False) as bar:
        quality, history = search_edit(
            marked.backbone,
            marked.codec,
            marked.site,
            marked.seen.output,
            marked.messages,
            check,
            fidelity,
            engine(),
            bar,
        )
    assert quality == check()
    last = history[-1]
    assert last["stage"] == "edit"
    assert [row["stage"] for row in history[:-1]] == ["edit scale"] * (len(history) - 1)
    assert last["fidelity"] == quality.fidelity
    assert last["margin"] == quality.margin
    assert quality.fidelity >= fidelity
    assert float(last["gain"]) == LARGEST_GAIN or 1 - quality.fidelity >= (1 - UNUSED) * (1 - fidelity)
    assert all(0 < float(row["gain"]) <= LARGEST_GAIN for row in history)
    # The model holds the one edit there was, scaled.
    alone = case(timm_vit())
    before = [alone.backbone.mlp_out(block).weight.detach().clone() for block in alone.edited]
    changes = alone.edit(FIRST_STRENGTH.gain, FIRST_STRENGTH.protection)
    for block, weight, change in zip(alone.edited, before, changes, strict=True):
        scaled = weight + change * (float(last["gain"]) / FIRST_STRENGTH.gain)
        assert torch.equal(marked.backbone.mlp_out(block).weight, scaled)


@pytest.mark.parametrize("name", ["timm_layer_scale", "open_clip_sequence_first"])
@pytest.mark.parametrize("batch", [48, 20, 1])
def test_what_a_change_adds_to_the_stream_is_not_run_again(name: str, batch: int) -> None:
    # The same edit, but each block is run anew with the weights it was given.
    ours, theirs = case(MODELS[name]()), case(MODELS[name]())
    ours.edit(using=engine(batch))
    real = theirs.backbone.run
    streams: list[Tensor] = []

    def run(tokens: Tensor, start: int, stop: int) -> Tensor:
        if torch.is_grad_enabled():  # mlp_gain
            return real(tokens, start, stop)
        if streams:
            tokens = real(streams.pop(), start - 1, start)
        streams.append(tokens)
        return real(tokens, start, stop)

    object.__setattr__(theirs.backbone, "run", run)
    theirs.edit()
    for block in ours.edited:
        expected = theirs.backbone.mlp_out(block).weight
        torch.testing.assert_close(ours.backbone.mlp_out(block).weight, expected, rtol=1e-3, atol=1e-4)


def test_less_memory_than_planned_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("activemark_fast.marking.edit")
    real, batches = module._moments, []

    def short_of_memory(*args: Any) -> Any:
        batches.append(args[-1].batch)
        if args[-1].batch > 12 and batches.count(batches[-1]) == 2:  # when a block has been changed already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    plenty, scarce = case(timm_vit()), case(timm_vit())
    with Progress(shown=False) as bar:
        for marked, patch in ((plenty, None), (scarce, short_of_memory)):
            if patch is not None:
                monkeypatch.setattr(module, "_moments", patch)
            held = (marked.seen.output, marked.messages, marked.check(), 0.97, engine(48), bar)
            search_edit(marked.backbone, marked.codec, marked.site, *held)
    assert batches[0] == 48
    assert batches[-1] == 12
    for block in plenty.edited:
        expected = plenty.backbone.mlp_out(block).weight
        torch.testing.assert_close(scarce.backbone.mlp_out(block).weight, expected, rtol=1e-3, atol=1e-4)


def test_layer_scale_of_zero() -> None:
    model = timm_vit(init_values=0.1)
    with torch.no_grad():
        model.get_parameter("blocks.3.ls2.gamma")[5] = 0
    with pytest.raises(ValueError, match=r"^model: block 3 scales a channel of its MLP by 0"):
        case(model).edit()


def test_a_silent_mlp() -> None:
    model = timm_vit()
    with torch.no_grad():
        for layer in ("weight", "bias"):
            model.get_parameter(f"blocks.4.mlp.fc1.{layer}").zero_()
    with pytest.raises(ValueError, match=r"^model: the MLP of block 4 is silent"):
        case(model).edit()


@pytest.mark.parametrize(
    ("fidelities", "kept"),
    [
        ([0.9997, 0.9, 0.99, 0.96], 2),  # the last look lost too much: the best before it
        ([0.9, 0.95, 0.96, 0.969], 3),  # none was allowed: the last, the nearest there is
        ([float("nan"), 0.9, 0.972], 2),
        ([0.971], 0),
    ],
)
def test_search_ends_at_a_strength_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, fidelities: list[float], kept: int
) -> None:
    marked = case(timm_vit())
    check = marked.check()
    told = iter([*fidelities, *fidelities[-1:] * 4])
    monkeypatch.setattr(check, "fidelity", lambda: next(told))
    with Progress(shown=False) as bar:
        held = (marked.seen.output, marked.messages, check, 0.97, engine(), bar)
        before = [marked.backbone.mlp_out(block).weight.detach().clone() for block in marked.edited]
        quality, history = search_edit(marked.backbone, marked.codec, marked.site, *held)
    gain = float(history[-1]["gain"])
    assert gain == history[kept]["gain"]
    assert quality.fidelity == pytest.approx(fidelities[kept])
    changes = case(timm_vit()).edit(FIRST_STRENGTH.gain, FIRST_STRENGTH.protection)
    for block, weight, change in zip(marked.edited, before, changes, strict=True):
        expected = weight + change * (gain / FIRST_STRENGTH.gain)
        torch.testing.assert_close(marked.backbone.mlp_out(block).weight, expected, rtol=1e-4, atol=1e-6)


def test_the_next_strength_follows_the_power_that_two_looks_tell() -> None:
    # lost = 0.01 * gain^3: the square is tried first, then the cube is known.
    first = _next_gain({0.5: 0.01 * 0.5**3}, 0.005)
    assert first == pytest.approx(0.5 * (0.95 * 0.005 / (0.01 * 0.5**3)) ** 0.5)
    second = _next_gain({0.5: 0.01 * 0.5**3, first: 0.01 * first**3}, 0.005)
    assert 0.01 * second**3 == pytest.approx(0.95 * 0.005)
    assert _next_gain({0.5: float("inf")}, 0.005) == pytest.approx(0.05)
    assert _next_gain({0.5: 0.0}, 0.005) == LARGEST_GAIN
