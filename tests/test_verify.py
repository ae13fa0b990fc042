from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import vit
from torch import Tensor, nn

from activemark_fast import decision
from activemark_fast.attacks import prune
from activemark_fast.backbone import Backbone
from activemark_fast.decision import PLAIN_PRICE
from activemark_fast.embedding import Embedding, embed
from activemark_fast.freedoms import EVIDENCE_AT
from activemark_fast.key import Key
from activemark_fast.looks import Prefix
from activemark_fast.marking.reading import Channel
from activemark_fast.marking.suffix import SiteActivations
from activemark_fast.triggers import ImageMismatchError
from activemark_fast.verdict import Verdict
from activemark_fast.verification import verify
from activemark_fast.verifier import Verifier
from activemark_fast.watermark import Watermark, WatermarkError

KEY, OTHER = Key(b"k" * 32), Key(b"o" * 32)
WIDTH, DEPTH, COUNT = 128, 6, 32


def images(count: int = COUNT, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def embedding(**settings: Any) -> Embedding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return embed(vit(), KEY, images(), **({"fidelity": 0.95, "max_steps": 0} | settings))


@pytest.fixture(scope="module")
def keyed() -> Embedding:
    return embedding()


@pytest.fixture(scope="module")
def learned() -> Embedding:
    return embedding(codec="learned", max_steps=1)


def marked_copy(keyed: Embedding, **kwargs: Any) -> Any:
    model = vit(seed=9, **kwargs)
    wanted = model.state_dict()
    model.load_state_dict({n: t for n, t in keyed.model.state_dict().items() if n in wanted}, strict=False)
    return model


def check(suspect: nn.Module, keyed: Embedding, **settings: Any) -> Verdict:
    verdict = verify(suspect, keyed.watermark, KEY, images(), **settings)
    json.dumps(verdict.to_dict(), allow_nan=False)
    assert str(verdict).startswith(verdict.decision.upper())
    return verdict


def test_every_tower_of_a_model_is_paid_for(keyed: Embedding) -> None:
    alone = check(keyed.model, keyed, exhaustive=True)
    several = nn.ModuleDict({str(index): copy.deepcopy(keyed.model) for index in range(5)})
    among = check(several, keyed, exhaustive=True)
    assert alone.p_value is not None
    assert among.p_value == pytest.approx(5 * alone.p_value)


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 2, 0), (2, 1, 0)])
def test_queries_keys_and_values_in_another_order_hide_no_mark(
    order: tuple[int, int, int], keyed: Embedding
) -> None:
    """As other code may keep them in one matrix: read in the usual order they are wrong."""
    state = keyed.model.state_dict()
    for name in [name for name in state if ".attn.qkv." in name]:
        state[name] = torch.cat([state[name].chunk(3)[part] for part in order])
    suspect = vit()
    suspect.load_state_dict(state)
    assert check(suspect, keyed).decision == "match"


def test_the_marked_model(keyed: Embedding) -> None:
    verdict = check(keyed.model, keyed, exhaustive=True)
    assert (verdict.decision, verdict.identical, verdict.codec) == ("match", True, "keyed")
    assert verdict.p_value is not None
    assert list(verdict.bands) == ["loud", "natural", "passive"]
    assert max(verdict.bands.values()) < 1e-9
    assert verdict.p_value < 1e-17
    assert verdict.p_value == pytest.approx(PLAIN_PRICE * 3 * min(verdict.bands.values()))
    assert verdict.images == COUNT
    assert (verdict.bits, verdict.tau, verdict.alpha) == (32, 5, 1e-6)
    assert verdict.bit_errors.mean() < 8  # chance is 16
    assert verdict.detection_rate == (verdict.bit_errors <= 5).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_innocent_models(seed: int, keyed: Embedding) -> None:
    verdict = check(vit(seed), keyed)
    assert (verdict.decision, verdict.identical) == ("no match", False)
    assert verdict.p_value is not None
    assert verdict.p_value > 1e-3
    assert verdict.detection_rate == 0


def test_where_no_injection_is_answered_the_passive_band_tells(
    keyed: Embedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(check(keyed.model, keyed).bands) == ["loud"]  # it settled the verdict
    generator = torch.Generator().manual_seed(0)

    def unanswered(self: Channel, _backbone: Backbone, activations: SiteActivations, *_: Any) -> Tensor:
        reads, bits = self.sent.shape[1:]
        return torch.randn(len(self.codec.taps), len(activations), reads, bits, generator=generator)

    monkeypatch.setattr(Channel, "agreement", unanswered)
    verdict = check(keyed.model, keyed)
    assert verdict.decision == "match"
    assert min(verdict.bands["loud"], verdict.bands["natural"]) > 1e-3
    assert verdict.bands["passive"] < 1e-12
    assert verdict.detection_rate == 0
    innocent = check(vit(1), keyed)
    assert innocent.decision == "no match"
    assert innocent.bands["passive"] > 1e-3


def test_a_match_is_read_until_it_is_evidence_and_the_rest_until_no_band_has_hope(keyed: Embedding) -> None:
    match, innocent = check(keyed.model, keyed), check(vit(1), keyed)
    assert match.images < COUNT
    assert match.paid_p_value is not None
    assert match.paid_p_value <= EVIDENCE_AT
    # The loud band's images; the natural one is read on alone.
    assert (innocent.decision, innocent.images) == ("no match", 16)


def test_tau_and_alpha(keyed: Embedding) -> None:
    strict, loose = check(keyed.model, keyed, tau=0), check(keyed.model, keyed, tau=31)
    assert strict.detection_rate == (strict.bit_errors == 0).mean()
    assert loose.detection_rate == 1
    # Below the floor of the test nothing can match, and such a p-value is no "no match" either.
    floored = check(keyed.model, keyed, alpha=1e-37)
    assert (floored.decision, floored.alpha) == ("inconclusive", 1e-37)
    assert "too few for a match" in floored.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_of_the_marked_model_match(dtype: torch.dtype, keyed: Embedding) -> None:
    verdict = check(marked_copy(keyed).to(dtype), keyed)
    assert (verdict.decision, verdict.identical) == ("match", False)
    assert check(vit().to(dtype), keyed).decision == "no match"


def test_pruned_and_disturbed_models_match(keyed: Embedding) -> None:
    assert check(prune(keyed.model, None, 0, 0.3), keyed).decision == "match"
    noisy = marked_copy(keyed)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(
                0.1
                * parameter.std()
                * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    assert check(noisy, keyed).decision == "match"


@pytest.mark.parametrize(("depth", "taps"), [(5, 2), (4, 1)])
def test_suspects_with_their_last_blocks_cut_off(depth: int, taps: int, keyed: Embedding) -> None:
    assert keyed.watermark.site.taps == (3, 4)
    verdict = check(marked_copy(keyed, depth=depth), keyed)
    assert verdict.decision == "match"
    assert verdict.p_value is not None
    assert PLAIN_PRICE * 2 * 2.0 ** (-64 * taps) <= verdict.p_value < 1e-8
    other = check(vit(depth=depth), keyed)
    assert other.decision == "inconclusive"
    assert f"no sign of the mark, but the suspect has {depth} blocks, the marked model 6" in other.reason


def test_suspects_with_new_last_blocks_and_heads(keyed: Embedding) -> None:
    longer = marked_copy(keyed, depth=8)
    longer.reset_classifier(11)
    assert check(longer, keyed).decision == "match"


@pytest.mark.parametrize(("original_rate", "decision"), [(0.0, "match"), (0.34, "inconclusive")])
def test_a_learned_codec_that_reads_the_original_makes_no_match(
    learned: Embedding, original_rate: float, decision: str
) -> None:
    fields = {field.name: getattr(learned.watermark, field.name) for field in dataclass_fields(Watermark)}
    del fields["mac"]
    fields["state"] = fields["state"] | {"original_rate": torch.tensor(original_rate)}
    watermark = Watermark.seal(Key.of(KEY), **fields)
    verdict = verify(learned.model, watermark, KEY, images(), tau=31)  # every image counts as detected
    assert verdict.decision == decision
    assert ("proves nothing" in verdict.reason) == (decision == "inconclusive")


def test_the_learned_codec_reads_at_its_only_tap(learned: Embedding) -> None:
    verdict = check(learned.model, learned)
    assert (verdict.codec, verdict.p_value, verdict.images) == ("learned", None, COUNT)
    assert verdict.decision == "no match"  # one step teaches nothing
    always = verify(learned.model, learned.watermark, KEY, images(), tau=31)
    assert always.decision == "match"
    assert check(marked_copy(learned, depth=5), learned).images == COUNT
    short = check(marked_copy(learned, depth=4), learned)
    assert (short.decision, short.images) == ("inconclusive", 0)
    assert "4 blocks" in short.reason


def rearranged(model: Any, *order: int) -> Any:
    """A copy with these of its blocks."""
    made = copy.deepcopy(model)
    made.blocks = nn.Sequential(*(copy.deepcopy(model.blocks[index]) for index in order))
    return made


@pytest.mark.parametrize(
    ("order", "where"),
    [
        ((1, 2, 3, 4, 5), "carries the mark"),
        ((0, 0, 1, 2, 3, 4, 5), "it has 7 blocks, the marked model 6"),
        ((0, 1, 2, 2, 3, 4, 5), "carries the mark"),
    ],
    ids=["dropped", "doubled", "the site doubled"],
)
def test_blocks_that_moved_are_read_where_they_are(
    order: tuple[int, ...], where: str, keyed: Embedding
) -> None:
    verdict = check(rearranged(keyed.model, *order), keyed)
    assert verdict.decision == "match"
    assert where in verdict.reason
    other = check(rearranged(vit(), *order), keyed)
    assert other.decision == "inconclusive"


def test_where_a_mark_may_lie_in_a_suspect_of_other_depth(keyed: Embedding) -> None:
    verifier = Verifier(keyed.watermark, KEY, images())

    def places(blocks: int, depth: int | None = None) -> list[tuple[int, ...]]:
        found = verifier.sites(blocks, blocks if depth is None else depth)
        return [(site.block, *site.taps) for site in found]

    assert places(6) == [(2, 3, 4)]
    assert places(6, 4) == [(2, 3)]
    assert places(6, 3) == places(2) == []
    assert places(7) == [(2, 3, 4), (2, 3, 5), (2, 4, 5), (3, 4, 5)]
    assert places(5) == [(2, 3, 4), (1, 2, 3)]  # others would have two of them in one place
    assert len(places(10)) == 35
    assert places(12) == [(2, 3, 4), (2, 3, 10), (2, 9, 10), (8, 9, 10), (5, 7, 9)]


def overflowing() -> nn.Module:
    model = vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.copy_(3e38 * model.blocks[1].mlp.fc2.weight.sign())
    return model


def not_finite(value: float) -> nn.Module:
    model = vit()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[3, 4] = value
    return model


def zeros() -> nn.Module:
    model = vit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize(
    ("suspect", "reason"),
    [
        (lambda: vit(embed_dim=64), "the suspect has width 64, the marked model 128"),
        (lambda: vit(img_size=48), r"images of \(48, 48\) as 37 tokens, the marked model \(32, 32\) as 17"),
        (lambda: vit(patch_size=4), r"images of \(32, 32\) as 65 tokens, the marked model \(32, 32\) as 17"),
        (lambda: vit(class_token=False, global_pool="avg"), "as 16 tokens, .* as 17"),
        (lambda: not_finite(float("nan")), r"NaN or infinite weights in 'blocks\.1\.mlp\.fc1\.weight'"),
        (lambda: not_finite(float("-inf")), r"NaN or infinite weights in 'blocks\.1\.mlp\.fc1\.weight'"),
        (overflowing, "NaN or infinite activations"),
        (zeros, "cannot be read: no token .* depends on the image"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), "cannot be read: looked for a list of at least 3 blocks"),
        (lambda: nn.Identity(), "cannot be read"),
    ],
    ids=[
        "width",
        "image_size",
        "patches",
        "no_class_token",
        "nan",
        "infinity",
        "overflow",
        "zeros",
        "no_vit",
        "no_parameters",
    ],
)
def test_suspects_that_cannot_be_read(
    suspect: Callable[[], nn.Module], reason: str, keyed: Embedding
) -> None:
    verdict = check(suspect(), keyed)
    assert verdict.decision == "inconclusive"
    assert verdict.images == 0
    assert verdict.p_value is None
    assert not verdict.identical
    assert math.isnan(verdict.detection_rate)
    assert re.search(reason, verdict.reason), verdict.reason


def test_tokens_before_the_patches_are_the_suspects_own(keyed: Embedding) -> None:
    fields = {field.name: getattr(keyed.watermark, field.name) for field in dataclass_fields(Watermark)}
    del fields["mac"]
    fields["site"] = replace(keyed.watermark.site, prefix_tokens=4)
    verdict = verify(keyed.model, Watermark.seal(KEY, **fields), KEY, images())
    assert verdict.decision == "inconclusive"
    assert verdict.reason == "the suspect has 1 tokens before its patches, the marked model 4"


def test_a_nan_where_nothing_is_read_hides_no_mark(keyed: Embedding) -> None:
    suspect = copy.deepcopy(keyed.model)
    with torch.no_grad():
        suspect.get_parameter("blocks.5.mlp.fc1.weight")[3, 4] = float("nan")
    assert check(suspect, keyed).decision == "match"


class Constant(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **_kwargs: object) -> Tensor:
        return torch.ones_like(x)


def dead_blocks() -> nn.Module:
    model = vit()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
    return model


def all_constant() -> nn.Module:
    model = vit()
    model.blocks = nn.Sequential(*(Constant(block) for block in model.blocks))
    return model


@pytest.mark.parametrize("suspect", [dead_blocks, all_constant], ids=["pass_through", "constant"])
def test_dead_suspects_are_no_match(suspect: Callable[[], nn.Module], keyed: Embedding) -> None:
    verdict = check(suspect(), keyed)
    assert verdict.decision == "no match"
    assert verdict.detection_rate == 0
    if suspect is all_constant:
        assert verdict.p_value == 1
        assert set(verdict.bit_errors.tolist()) == {32}


@pytest.mark.parametrize("kind", ["marked", "innocent", "too short"])
def test_the_suspect_is_left_as_it_was(kind: str, keyed: Embedding) -> None:
    suspect = {"marked": lambda: marked_copy(keyed), "innocent": vit, "too short": lambda: vit(depth=3)}[
        kind
    ]()
    suspect.train()
    suspect.blocks[1].eval()
    suspect.cls_token.requires_grad_(False)
    suspect.norm.weight.grad = torch.ones(WIDTH)

    def facts() -> list[Any]:
        return [
            [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in suspect.modules()],
            [(p.requires_grad, p.grad is None, p.data_ptr(), p._version) for p in suspect.parameters()],
        ]

    before, weights = facts(), {n: t.clone() for n, t in suspect.state_dict().items()}
    check(suspect, keyed)
    assert facts() == before
    assert all(torch.equal(weights[n], t) for n, t in suspect.state_dict().items())


def test_the_verdict_does_not_depend_on_the_mode_or_on_the_random_state(keyed: Embedding) -> None:
    torch.manual_seed(0)
    suspect = marked_copy(keyed, drop_path_rate=0.5, proj_drop_rate=0.5)
    first = check(suspect.eval(), keyed)
    torch.manual_seed(1)
    second = check(suspect.train(), keyed)
    assert first.to_dict() == second.to_dict()


@pytest.fixture(scope="module")
def sequential(keyed: Embedding) -> Verifier:
    return Verifier(keyed.watermark, KEY, images(), power=0.999)


def test_a_verdict_from_as_few_images_as_suffice(keyed: Embedding, sequential: Verifier) -> None:
    match = sequential.judge(keyed.model)
    assert (match.decision, match.identical, match.images) == ("match", True, 8)
    assert match.p_value is not None
    assert match.p_value <= 1e-6
    for seed in range(4):
        innocent = sequential.judge(vit(seed))
        assert (innocent.decision, innocent.identical) == ("no match", False)
        assert 8 <= innocent.images <= COUNT


def test_a_verifier_that_reads_all_images_is_verify(keyed: Embedding, learned: Embedding) -> None:
    for made in (keyed, learned):
        verifier = Verifier(made.watermark, KEY, images())
        for suspect in (made.model, vit(1), vit(depth=3), vit(2), nn.Identity()):
            verdict = verify(suspect, made.watermark, KEY, images(), exhaustive=True)
            assert verifier.judge(suspect).to_dict() == verdict.to_dict()
    early = Verifier(learned.watermark, KEY, images(), power=0.9)  # no p-value, so nothing to stop by
    assert early.judge(vit(1)).to_dict() == check(vit(1), learned).to_dict()


def test_the_taps_read_do_not_depend_on_the_suspect_before(keyed: Embedding, sequential: Verifier) -> None:
    before = sequential.judge(keyed.model)
    assert sequential.judge(marked_copy(keyed, depth=4)).decision == "match"
    assert sequential.judge(keyed.model).to_dict() == before.to_dict()


def test_a_prefix_is_computed_once_and_only_as_far_as_needed(keyed: Embedding, sequential: Verifier) -> None:
    backbone = Backbone(copy.deepcopy(keyed.model))
    prefix = Prefix()
    first = sequential.read(backbone, backbone.depth, prefix)
    assert [len(look) for look in prefix.kept] == [32, 8]  # the first tell how the tokens vary
    prefix.kept[1].output.fill_(math.nan)  # what is there is used
    assert sequential.read(backbone, backbone.depth, prefix).to_dict() != first.to_dict()


def test_another_key(keyed: Embedding) -> None:
    with pytest.raises(WatermarkError, match=r"^key: wanted the key this watermark was made with") as caught:
        verify(keyed.model, keyed.watermark, OTHER, images())
    assert "o" * 32 not in str(caught.value)


def test_a_changed_watermark(keyed: Embedding) -> None:
    for changed in (
        replace(keyed.watermark, bits=10**9),
        replace(keyed.watermark, bits="many"),  # type: ignore[arg-type]
        replace(keyed.watermark, codec="learned"),
        replace(keyed.watermark, digests=keyed.watermark.digests[:16]),
    ):
        with pytest.raises(WatermarkError):
            verify(keyed.model, changed, KEY, images())


def test_a_saved_watermark(keyed: Embedding, tmp_path: Path) -> None:
    keyed.watermark.save(tmp_path / "watermark.safetensors")
    read = Watermark.load(tmp_path / "watermark.safetensors")
    assert verify(keyed.model, read, KEY, images()).to_dict() == check(keyed.model, keyed).to_dict()


def test_missing_images(keyed: Embedding) -> None:
    with pytest.raises(
        ImageMismatchError, match=f"images: wanted the {COUNT} images of the embedding .*, got none"
    ):
        verify(keyed.model, keyed.watermark, KEY)


def test_other_images(keyed: Embedding, tmp_path: Path) -> None:
    other = images()
    other[5, 0, 0, 0] += 1
    other[9] = 0
    with pytest.raises(ImageMismatchError, match="images: image 5 is not the one"):
        verify(keyed.model, keyed.watermark, KEY, other)
    with pytest.raises(ImageMismatchError, match=f"images: wanted the {COUNT} images .*, got 20"):
        verify(keyed.model, keyed.watermark, KEY, images()[:20])
    swapped = images()
    swapped[[3, 4]] = swapped[[4, 3]]
    with pytest.raises(ImageMismatchError, match="images: image 3 is not"):
        verify(keyed.model, keyed.watermark, KEY, swapped)
    for index in range(COUNT):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / f"{index:02}.png")
    with pytest.raises(ImageMismatchError, match="images: image 0 is not"):
        verify(keyed.model, keyed.watermark, KEY, tmp_path)
    assert verify(keyed.model, keyed.watermark, KEY, torch.cat([images(), images(8)])).decision == "match"


def test_images_that_were_made_from_the_key() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        made = embed(vit(depth=3), KEY, fidelity=0.9)
    with pytest.raises(
        ImageMismatchError, match="images: wanted none, for this mark's are made from the key"
    ):
        verify(made.model, made.watermark, KEY, images())
    assert verify(made.model, made.watermark, KEY).decision == "match"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"suspect": None}, TypeError, "suspect: wanted a torch.nn.Module, got NoneType"),
        ({"suspect": {}}, TypeError, "suspect: wanted a torch.nn.Module, got dict"),
        ({"watermark": "x.safetensors"}, TypeError, "watermark: wanted a Watermark, got str"),
        ({"key": 5}, TypeError, "key: wanted"),
        ({"key": b"short"}, ValueError, "key: wanted at least 16 bytes"),
        ({"images": 5}, TypeError, "images: wanted"),
        ({"alpha": 0}, ValueError, "alpha: wanted above 0 and at most 0.001, got 0"),
        ({"alpha": 0.01}, ValueError, "alpha: wanted above 0 and at most 0.001, got 0.01"),
        ({"alpha": float("nan")}, ValueError, "alpha: wanted"),
        ({"alpha": "small"}, TypeError, "alpha: wanted a number, got str"),
        ({"tau": -1}, ValueError, "tau: wanted 0 to 31, got -1"),
        ({"tau": 32}, ValueError, "tau: wanted 0 to 31, got 32"),
        ({"tau": 5.0}, TypeError, "tau: wanted int, got float"),
        ({"align": 1}, TypeError, "align: wanted True, False or None, got int"),
        ({"commitment": "c.json"}, TypeError, "commitment: wanted a Commitment, got str"),
        ({"device": "nowhere"}, ValueError, "device: wanted"),
        ({"device": 1.5}, TypeError, "device: wanted"),
        ({"precision": "fp8"}, ValueError, "precision: wanted"),
    ],
)
def test_errors_name_the_argument(
    arguments: dict[str, Any], error: type[Exception], message: str, keyed: Embedding
) -> None:
    given: dict[str, Any] = {
        "suspect": keyed.model,
        "watermark": keyed.watermark,
        "key": KEY,
        "images": images(),
    } | arguments
    with pytest.raises(error, match=f"^{message}"):
        verify(**given)


def test_too_few_images_to_exclude_a_mark_are_inconclusive(
    keyed: Embedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision, "MISS", 1e-12)
    verdict = check(vit(3), keyed)
    assert verdict.decision == "inconclusive"
    assert re.search(r"32 images are too few to exclude one: about \d+ images, or more bits", verdict.reason)
    assert check(keyed.model, keyed).decision == "match"
