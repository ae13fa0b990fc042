from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import vit
from torch import Tensor, nn

from activemark_fast import embed, load_model, verify
from activemark_fast.backbone import Backbone
from activemark_fast.embedding import Embedding, UnverifiedMarkError
from activemark_fast.key import Key
from activemark_fast.photographs import shipped_photographs
from activemark_fast.utility import features
from activemark_fast.watermark import fingerprint

KEY, OTHER = Key(b"k" * 32), Key(b"o" * 32)
WIDTH, DEPTH = 128, 6


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def folder_of_images(path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(
            path / f"{index:02}.png"
        )
    return path


def marked(model: nn.Module, pictures: object = None, key: object = KEY, **settings: Any) -> Embedding:
    """A mark of low fidelity; that other targets are just missed does not matter here."""
    defaults: dict[str, Any] = {"fidelity": 0.95}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return embed(model, key, pictures, **(defaults | settings))  # type: ignore[arg-type]


class Unchanged:
    """Everything of a model that embedding must not touch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.flags = self._flags()

    def _flags(self) -> list[Any]:
        parameters = [(p.requires_grad, p.grad is None, p.data_ptr()) for p in self.model.parameters()]
        modules = [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in self.model.modules()
        ]
        return [parameters, modules]

    def check(self) -> None:
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor.nan_to_num(7), self.state[name].nan_to_num(7)), name
            assert tensor.dtype == self.state[name].dtype
        assert self._flags() == self.flags


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return fingerprint(one) == fingerprint(other)


@pytest.fixture(scope="module")
def demo() -> tuple[nn.Module, Embedding]:
    """The demo model and what marks it, with images from the key."""
    model = load_model("demo")
    before = Unchanged(model)
    embedding = embed(model, KEY)
    before.check()
    return model, embedding


def test_the_demo_model_with_images_from_the_key(demo: tuple[nn.Module, Embedding]) -> None:
    model, embedding = demo
    assert embedding.steps == 0
    assert embedding.fidelity >= 0.998
    assert embedding.quality.reaches(0.998)
    assert "massive activations emerge" in embedding.site_reason
    assert embedding.watermark.image_source == "key"
    verdict = verify(embedding.model, embedding.watermark, KEY, exhaustive=True)
    assert (verdict.decision, verdict.identical, verdict.images) == ("match", True, 128)
    assert verdict.paid_p_value is not None
    assert verdict.paid_p_value < 1e-15
    assert verdict.detection_rate > 0.98
    innocent = verify(model, embedding.watermark, KEY)
    assert (innocent.decision, innocent.identical) == ("no match", False)
    assert innocent.detection_rate == 0


def test_fidelity_is_of_natural_images_that_the_mark_has_not_seen(demo: tuple[nn.Module, Embedding]) -> None:
    model, embedding = demo
    assert embedding.clean_source == "the photographs that the package ships"
    view = Backbone(model)
    others = preprocess_photographs(view)  # other crops than those it was measured on
    before, after = features(model, others), features(embedding.model, others)
    cosine = torch.cosine_similarity(before, after, dim=-1)
    told = embedding.quality.features
    for index, (mean, tail) in enumerate((told.class_token, told.mean_patch)):
        assert float(cosine[:, index].mean()) == pytest.approx(mean, abs=1e-3)
        assert tail <= mean
    assert embedding.fidelity == min(told.class_token[0], told.mean_patch[0], told.patches[0])


def preprocess_photographs(view: Backbone) -> Tensor:
    """Crops of the photographs that are held out, mirrored and half as large."""
    shipped = shipped_photographs()
    held = shipped.images[shipped.sources % 4 == 0][64:]
    return view.preprocess(held.flip(3))


def test_own_clean_images_are_used_and_told(tmp_path: Path) -> None:
    embedding = marked(vit(), clean=folder_of_images(tmp_path))
    assert embedding.clean_source.startswith("the images given, beside")


def test_where_no_loss_is_allowed_no_mark_is_handed_out() -> None:
    model = vit()
    before = Unchanged(model)
    with pytest.raises(UnverifiedMarkError, match="not handed out"):
        marked(model, fidelity=1 - 1e-9, inplace=True)
    before.check()


@pytest.mark.parametrize("form", ["none", "tensor", "folder", "iterable"])
def test_every_form_of_images(form: str, tmp_path: Path) -> None:
    forms: dict[str, Callable[[], object]] = {
        "none": lambda: None,
        "tensor": images,
        "folder": lambda: folder_of_images(tmp_path),
        "iterable": lambda: [(batch, 0) for batch in images().split(8)],
    }
    model = vit()
    pictures = forms[form]()
    embedding = marked(model, pictures)
    assert embedding.watermark.image_source == ("key" if form == "none" else form)
    wanted = {"none": 128, "folder": 20}.get(form, 32)
    for suspect, decision in ((embedding.model, "match"), (model, "no match"), (vit(seed=1), "no match")):
        verdict = verify(suspect, embedding.watermark, KEY, pictures, exhaustive=True)
        assert verdict.decision == decision
        assert verdict.images == wanted


def test_the_mark_of_another_key_is_no_match() -> None:
    model = vit()
    ours, theirs = marked(model, images()), marked(model, images(), OTHER)
    assert verify(theirs.model, ours.watermark, KEY, images()).decision == "no match"
    assert verify(ours.model, theirs.watermark, OTHER, images()).decision == "no match"
    # Both owners' marks in one model: each is read by its own key.
    both = marked(ours.model, images(), OTHER)
    assert verify(both.model, both.watermark, OTHER, images()).decision == "match"
    assert verify(both.model, ours.watermark, KEY, images()).decision == "match"


@pytest.mark.parametrize("codec", ["keyed", "learned"])
def test_the_model_is_left_alone_and_the_copy_is_as_it_was(codec: str) -> None:
    model = vit().train()
    model.blocks[2].eval()
    model.cls_token.requires_grad_(False)
    model.blocks[4].mlp.fc2.weight.requires_grad_(False)
    model.blocks[0].norm1.weight.grad = torch.ones(WIDTH)
    before = Unchanged(model)
    embedding = marked(model, images(), codec=codec, max_steps=5)
    before.check()
    assert embedding.steps == (5 if codec == "learned" else 0)
    assert embedding.model is not model
    assert not same_weights(embedding.model, model)
    for ours, theirs in zip(embedding.model.modules(), model.modules(), strict=True):
        assert ours.training == theirs.training
    for new, old in zip(embedding.model.parameters(), model.parameters(), strict=True):
        assert new.requires_grad == old.requires_grad
        assert new.device == old.device
        assert new.dtype == old.dtype
        assert new.data_ptr() != old.data_ptr()
    embedding.model(images(2)).sum().backward()


def test_inplace_gives_exactly_the_same_weights() -> None:
    model, copied = vit().train(), vit().train()
    apart = marked(model, images())
    before = [(p.requires_grad, p.data_ptr()) for p in copied.parameters()]
    inside = marked(copied, images(), inplace=True)
    assert inside.model is copied
    assert all(m.training for m in copied.modules())
    assert [(p.requires_grad, p.data_ptr()) for p in copied.parameters()] == before
    assert same_weights(copied, apart.model)
    assert not same_weights(copied, model)
    assert inside.watermark.mac == apart.watermark.mac


def test_the_same_inputs_give_the_same_weights_and_watermark() -> None:
    results = []
    for seed in (1, 2):
        model = vit()
        torch.manual_seed(seed)
        results.append(marked(model, images()))
    first, second = results
    assert same_weights(first.model, second.model)
    assert first.watermark.mac == second.watermark.mac
    assert first.quality == second.quality
    assert first.history == second.history
    third = marked(vit(), images(), OTHER)
    assert not same_weights(first.model, third.model)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("file", "where"),
    [
        ("marking.mark_keyed", "search_edit"),
        ("marking.mark_learned", "finetune"),
        ("embedding", "fingerprint"),
    ],
)
def test_an_interruption_leaves_the_model_alone(
    file: str, where: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"activemark_fast.{file}")
    real = getattr(module, where)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, where, interrupted)
    model = vit().train()
    before = Unchanged(model)
    codec = "learned" if where == "finetune" else "keyed"
    with pytest.raises(KeyboardInterrupt):
        marked(model, images(), codec=codec, inplace=inplace, max_steps=1)
    before.check()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_mixed_precision(precision: str) -> None:
    model = vit()
    embedding = marked(model, images(), precision=precision)
    assert all(p.dtype == torch.float32 for p in embedding.model.parameters())
    for reading in ("fp32", precision):
        assert (
            verify(embedding.model, embedding.watermark, KEY, images(), precision=reading).decision == "match"
        )
        assert verify(model, embedding.watermark, KEY, images(), precision=reading).decision == "no match"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", ["keyed", "learned"])
def test_models_in_half_precision(dtype: torch.dtype, codec: str) -> None:
    model = vit().to(dtype)
    embedding = marked(model, images(), codec=codec, max_steps=3)
    assert embedding.steps == (3 if codec == "learned" else 0)
    assert all(p.dtype == dtype for p in embedding.model.parameters())
    assert all(bool(torch.isfinite(p).all()) for p in embedding.model.parameters())
    if codec == "keyed":
        assert verify(embedding.model, embedding.watermark, KEY, images()).decision == "match"


def test_targets_that_are_missed_are_told() -> None:
    with pytest.warns(RuntimeWarning, match=r"margin .* detection rate .* a lower fidelity or fewer bits"):
        embedding = embed(vit(), KEY, images(), fidelity=0.9999)
    assert embedding.quality.keeps(0.9999)  # fidelity wins
    assert embedding.fidelity == embedding.quality.fidelity
    assert [entry["stage"] for entry in embedding.history if "factor" in entry] == [
        entry["stage"] for entry in embedding.history
    ]
    assert embedding.seconds > 0


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_the_learned_codec(axis: str) -> None:
    model = vit()
    before = Unchanged(model)
    embedding = marked(model, images(), codec="learned", axis=axis, max_steps=3)
    before.check()
    watermark = embedding.watermark
    assert (watermark.codec, watermark.axis) == ("learned", axis)
    assert embedding.history[-1]["stage"] == "fine-tuning"
    verdict = verify(embedding.model, watermark, KEY, images())
    assert verdict.p_value is None
    assert verdict.identical


def test_block_bits_and_architecture_as_asked_for() -> None:
    embedding = marked(vit(), images(), block=1, bits=24, architecture="timm:vit_tiny_patch16_224")
    assert embedding.watermark.site.block == 1
    assert embedding.watermark.bits == 24
    assert embedding.watermark.architecture == "timm:vit_tiny_patch16_224"
    assert "as asked for" in embedding.site_reason
    verdict = verify(embedding.model, embedding.watermark, KEY, images())
    assert (verdict.decision, verdict.bits) == ("match", 24)


def test_the_key_in_every_form(tmp_path: Path) -> None:
    Key(bytes(range(32))).write(tmp_path / "owner.key")
    written = Key.of(tmp_path / "owner.key")
    embedding = marked(vit(), images(16), written)
    for form in (written, tmp_path / "owner.key"):
        assert verify(embedding.model, embedding.watermark, form, images(16)).decision == "match"
    assert "owner.key" not in repr(embedding.watermark)


def no_vit() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


def with_value(value: float, name: str = "blocks.3.mlp.fc1.bias") -> nn.Module:
    model = vit()
    with torch.no_grad():
        model.get_parameter(name)[0] = value
    return model


def overflowing() -> nn.Module:
    model = vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1e39)
        model.blocks[1].mlp.fc2.weight.clamp_(-3e38, 3e38)
    return model


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (lambda: None, {}, TypeError, "model: wanted a torch.nn.Module, got NoneType"),
        (lambda: {"a": 1}, {}, TypeError, "model: wanted a torch.nn.Module, got dict"),
        (no_vit, {}, ValueError, "looked for a list of at least 3 blocks"),
        (lambda: vit(depth=2), {}, ValueError, "looked for a list of at least 3 blocks"),
        (
            lambda: with_value(float("nan")),
            {},
            ValueError,
            r"model: .*NaN or infinity in 'blocks\.3\.mlp\.fc1\.bias'",
        ),
        (lambda: with_value(float("inf")), {}, ValueError, r"model: .*NaN or infinity in 'blocks\.3\.mlp"),
        (overflowing, {}, ValueError, "model: wanted finite features, got NaN or infinity"),
        (vit, {"key": 7}, TypeError, "key: wanted"),
        (vit, {"key": b"short"}, ValueError, "key: wanted at least 16 bytes"),
        (vit, {"images": 7}, TypeError, "images: wanted"),
        (vit, {"images": torch.zeros(3, 3, 32, 32)}, ValueError, "images: wanted at least 16"),
        (vit, {"images": torch.zeros(20, 3, 16, 16)}, ValueError, "images: wanted"),
        (vit, {"images": torch.full((20, 3, 32, 32), float("nan"))}, ValueError, "images: wanted finite"),
        (vit, {"images": "no such folder"}, ValueError, "images: wanted a folder"),
        (vit, {"codec": "morse"}, ValueError, r"codec: wanted one of \['keyed', 'learned'\], got 'morse'"),
        (vit, {"codec": ["keyed"]}, TypeError, "codec: wanted one of .*, got list"),
        (vit, {"clean": 7}, TypeError, "clean: wanted"),
        (vit, {"clean": torch.zeros(3, 3, 32, 32)}, ValueError, "clean: wanted at least 16 images, got 3"),
        (vit, {"clean": "no such folder"}, ValueError, "clean: wanted a folder"),
        (vit, {"bits": 7}, ValueError, "bits: wanted a multiple of 8, 8 to 256, got 7"),
        (vit, {"bits": 264}, ValueError, "bits: wanted a multiple of 8, 8 to 256, got 264"),
        (vit, {"bits": 64}, ValueError, "bits: wanted at most 63 for a model of width 128"),
        (
            vit,
            {"bits": 8},
            ValueError,
            "bits: wanted at least 16, .* never a match at 1e-06; got 8",
        ),
        (vit, {"bits": 16, "block": 3}, ValueError, "bits: wanted at least 24, .*; got 16"),
        (lambda: vit(depth=4), {"bits": 16}, ValueError, "bits: wanted at least 24, .*; got 16"),
        (vit, {"bits": 32.0}, TypeError, "bits: wanted int, got float"),
        (vit, {"bits": True}, TypeError, "bits: wanted int, got bool"),
        (vit, {"axis": "row"}, ValueError, "axis: wanted one of .*, got 'row'"),
        (vit, {"axis": "channel"}, ValueError, "axis: .* wanted 'token', got 'channel'"),
        (vit, {"axis": None}, TypeError, "axis: wanted one of .*, got NoneType"),
        (vit, {"block": 4}, ValueError, "block: wanted 0 to 3 .*, got 4"),
        (vit, {"block": -1}, ValueError, "block: wanted 0 to 3 .*, got -1"),
        (vit, {"block": "2"}, TypeError, "block: wanted int, got str"),
        (vit, {"block": 2.0}, TypeError, "block: wanted int, got float"),
        (vit, {"fidelity": 0.0}, ValueError, "fidelity: wanted a cosine"),
        (vit, {"fidelity": 1}, ValueError, "fidelity: wanted a cosine"),
        (vit, {"fidelity": float("nan")}, ValueError, "fidelity: wanted a cosine"),
        (vit, {"fidelity": "high"}, TypeError, "fidelity: wanted a number, got str"),
        (vit, {"max_steps": -1}, ValueError, "max_steps: wanted 0 or more, got -1"),
        (vit, {"max_steps": 1.5}, TypeError, "max_steps: wanted int, got float"),
        (vit, {"architecture": Path("x")}, TypeError, "architecture: wanted a string"),
        (vit, {"device": "nowhere"}, ValueError, "device: wanted a device of this machine, got 'nowhere'"),
        (vit, {"device": "meta"}, ValueError, "device: wanted a device of this machine, got 'meta'"),
        (vit, {"device": 3.5}, TypeError, "device: wanted a string or a torch.device, got float"),
        (
            vit,
            {"precision": "int4"},
            ValueError,
            "precision: wanted 'auto', 'fp32', 'bf16' or 'fp16', got 'int4'",
        ),
        (vit, {"precision": [1]}, ValueError, "precision: wanted"),
    ],
)
def test_errors_name_the_argument(
    model: Callable[[], Any], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = model()
    before = Unchanged(given) if isinstance(given, nn.Module) else None
    arguments: dict[str, Any] = {"key": KEY, "images": images(16)} | settings
    with pytest.raises(error, match=f"^{message}") as caught:
        embed(given, **arguments)
    assert "k" * 32 not in str(caught.value)
    if before is not None:
        before.check()


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 16, "block": 3}, {"block": 4}])
def test_what_the_shape_of_a_model_forbids_is_refused_before_any_work(
    settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("activemark_fast.embedding.prepare")
    with pytest.raises(ValueError, match=r"^(bits|block): wanted"):
        embed(vit(), KEY, images(16), **settings)  # type: ignore[arg-type]


def test_the_copy_can_be_copied_and_saved(tmp_path: Path) -> None:
    embedding = marked(vit(), images(16))
    assert same_weights(copy.deepcopy(embedding.model), embedding.model)
    torch.save(embedding.model.state_dict(), tmp_path / "marked.pt")
    fresh = vit(seed=3)
    fresh.load_state_dict(torch.load(tmp_path / "marked.pt"))
    verdict = verify(fresh, embedding.watermark, KEY, images(16))
    assert (verdict.decision, verdict.identical) == ("match", True)
