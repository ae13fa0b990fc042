from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import longer_heads, more_heads, padded, units, vit
from torch import Tensor, nn

from activemark_fast import band_reading, looks
from activemark_fast.align import _procrustes, best_explained, find_alignment, site_sample
from activemark_fast.attacks import permute_inside, permute_residual, rotate_residual
from activemark_fast.backbone import Backbone
from activemark_fast.bulk import verify_many
from activemark_fast.codec.codebooks import Codebook, codebooks
from activemark_fast.codec.passive import Rows, passive_rows
from activemark_fast.decision import ALIGNED_PRICE, PLAIN_PRICE
from activemark_fast.embedding import Embedding, embed
from activemark_fast.key import Key
from activemark_fast.normalisation import Preprocess
from activemark_fast.site import Site
from activemark_fast.verdict import Verdict
from activemark_fast.verification import verify
from activemark_fast.verifier import Verifier
from activemark_fast.watermark import Watermark

WIDTH = 24
KEY = Key(b"k" * 32)


def sample(seed: int = 0, rows: int = 4 * WIDTH) -> Tensor:
    """Activations whose channels differ in mean and spread, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) + 2 * torch.eye(WIDTH)
    return torch.randn(rows, WIDTH, generator=generator) @ mixing + torch.randn(WIDTH, generator=generator)


def rotation(seed: int) -> Tensor:
    """Orthogonal, with the all-ones vector fixed."""
    gaussian = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([torch.ones(WIDTH, 1, dtype=torch.float64), gaussian[:, 1:]], 1)).Q
    inner = torch.linalg.qr(gaussian[1:, 1:]).Q
    one = torch.ones(1, 1, dtype=torch.float64)
    return (basis @ torch.block_diag(one, inner) @ basis.T).float()


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.booleans(), st.floats(0, 0.1))
def test_permutations_and_rotations_are_found(seed: int, scale: float, rotated: bool, noise: float) -> None:
    ours = sample()
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed))
    matrix = rotation(seed) if rotated else torch.eye(WIDTH)[:, order]
    theirs = scale * (
        ours @ matrix + noise * torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    )
    theirs = theirs + scale * torch.linspace(-3, 3, len(ours))[:, None]  # layer norm takes this out
    found = find_alignment(ours.half(), theirs)
    assert found is not None
    assert found.kind == ("rotation" if rotated else "permutation")
    assert found.worthwhile
    assert found.explained > 0.95
    assert found.scale == pytest.approx(scale, rel=0.1)
    # The all-ones vector itself may be sent anywhere: no direction of a mark has a part of it.
    centre = torch.eye(WIDTH) - 1 / WIDTH
    assert torch.allclose(centre @ found.matrix @ centre, centre @ matrix @ centre, atol=5 * noise + 0.01)
    assert torch.allclose(found.matrix @ found.matrix.T, torch.eye(WIDTH), atol=1e-5)


def test_what_needs_no_alignment() -> None:
    ours = sample()
    same = find_alignment(ours, 1.3 * ours)
    assert same is not None
    assert (same.kind, same.worthwhile) == ("identity", False)
    scaled = find_alignment(ours, 100 * ours)
    assert scaled is not None
    assert (scaled.kind, scaled.worthwhile) == ("identity", True)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(0, 3))
def test_no_map_explains_more_than_the_best(seed: int, scale: float, noise: float) -> None:
    ours = sample(seed)
    theirs = scale * (ours @ rotation(seed) + noise * sample(seed + 1))
    best = best_explained(ours, theirs)
    assert best <= 1 + 1e-6
    centred = theirs - theirs.mean(dim=1, keepdim=True)
    spread = (centred - centred.mean(dim=0)).square().sum()
    moved = (ours - ours.mean(dim=1, keepdim=True)) @ rotation(seed)
    factor = (moved * centred).sum() / moved.square().sum()
    assert best >= 1 - (centred - factor * moved).square().sum() / spread - 1e-4


def test_what_the_best_map_explains() -> None:
    ours = sample()
    assert best_explained(ours, 3 * ours @ rotation(1)) == pytest.approx(1, abs=1e-5)
    assert math.isnan(best_explained(ours, torch.full_like(ours, torch.nan)))
    assert not best_explained(ours, torch.zeros_like(ours)) >= 0


@pytest.mark.parametrize("rank", [1, 3, WIDTH])
def test_the_nearest_orthogonal_matrix(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(WIDTH, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    products = left @ right.T
    found = _procrustes(products)
    assert torch.allclose(found @ found.T, torch.eye(WIDTH, dtype=torch.float64), atol=1e-9)
    # The largest <Q, products> of all orthogonal Q is the sum of the singular values.
    assert float((found * products).sum()) == pytest.approx(
        float(torch.linalg.svdvals(products).sum()), rel=1e-6
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_stranger_is_not_explained(seed: int) -> None:
    found = find_alignment(sample(), sample(seed + 1))
    assert found is not None
    assert not found.worthwhile


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan"), float("inf")])
def test_constant_and_broken_suspects(value: float) -> None:
    assert find_alignment(sample(), torch.full((4 * WIDTH, WIDTH), value)) is None


def test_the_sample_is_of_clean_patch_tokens_and_comes_from_the_key() -> None:
    model = vit(embed_dim=48, depth=3)
    site = Site(0, (1,), 17, 1, 48, (3,), ())
    preprocess = Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3)
    taken = site_sample(Backbone(model), KEY, site, preprocess, nullcontext)
    assert taken.shape == (16 * 12, 48)
    assert taken.dtype == torch.float32
    assert torch.equal(taken, site_sample(Backbone(model), KEY, site, preprocess, nullcontext))
    other = site_sample(Backbone(model), Key(b"o" * 32), site, preprocess, nullcontext)
    assert not torch.allclose(taken, other)


CLEAR = 1e-15  # two taps of 32 bits cannot show less than 5e-20


def images() -> Tensor:
    return torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def marked() -> Embedding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return embed(vit(), KEY, images(), fidelity=0.95)


def check(suspect: nn.Module, marked: Embedding, align: bool | None = None) -> Verdict:
    return verify(suspect, marked.watermark, KEY, images(), align=align)


@pytest.mark.parametrize(
    ("attack", "kind"), [(permute_residual, "permutation"), (rotate_residual, "rotation")]
)
def test_a_moved_residual_stream_hides_no_mark(
    attack: Callable[..., nn.Module], kind: str, marked: Embedding
) -> None:
    moved = attack(marked.model, None, 3, 1)
    blind = check(moved, marked, align=False)
    assert (blind.decision, blind.aligned) == ("no match", None)
    found = check(moved, marked)
    assert (found.decision, found.aligned) == ("match", kind)
    assert found.p_value is not None
    assert found.p_value < ALIGNED_PRICE * CLEAR
    assert abs(found.bit_errors - check(marked.model, marked).bit_errors).mean() < 0.1
    asked = check(moved, marked, align=True)
    assert (asked.decision, asked.aligned) == ("match", kind)
    assert asked.p_value == pytest.approx(found.p_value / ALIGNED_PRICE)
    assert f"after undoing a {kind}" in asked.reason
    for innocent in (vit(), vit(5)):
        verdict = check(attack(innocent, None, 3, 1), marked)
        assert verdict.decision == "no match"
        assert verdict.p_value is not None
        assert verdict.p_value > 1e-3


def wider(model: nn.Module, width: int, how: str) -> nn.Module:
    """The model with a residual stream of more channels, in timm's own code, with longer heads."""
    made = vit(embed_dim=width, mlp_ratio=512.5 / width)
    made.load_state_dict(longer_heads(padded(model.state_dict(), width, how), 4, width // 4 - 32))
    pixels = images()[:2]
    assert torch.allclose(made(pixels), model(pixels), atol=1e-5)
    return made


@pytest.mark.parametrize(
    ("width", "how", "kind"),
    [(136, "zero", "permutation"), (256, "twice", "rotation"), (160, "turned", "rotation")],
)
def test_a_padded_residual_stream_hides_no_mark(width: int, how: str, kind: str, marked: Embedding) -> None:
    suspect = wider(marked.model, width, how)
    found = check(suspect, marked)
    assert (found.decision, found.aligned) == ("match", kind)
    assert found.p_value is not None
    assert found.p_value < ALIGNED_PRICE * CLEAR
    assert abs(found.bit_errors - check(marked.model, marked).bit_errors).mean() < 0.1
    asked = check(suspect, marked, align=True).p_value
    assert asked == pytest.approx(found.p_value / ALIGNED_PRICE)
    blind = check(suspect, marked, align=False)
    assert (blind.decision, blind.reason) == (
        "inconclusive",
        f"the suspect has width {width}, the marked model 128",
    )
    (result,) = verify_many([suspect], marked.watermark, KEY, vit(7), images())
    assert result.verdict is not None
    assert result.verdict.decision == "match"
    for innocent in (vit(), vit(5)):
        verdict = check(wider(innocent, width, how), marked)
        assert verdict.decision == "inconclusive"
        assert f"the suspect has width {width}, the marked model 128" in verdict.reason or (
            f"no sign of the mark, but the suspect has width {width}" in verdict.reason
        )


def test_more_heads_and_units_hide_no_mark(marked: Embedding) -> None:
    for makes in (vit(5), marked.model):
        state = units(more_heads(makes.state_dict(), 4), lambda t: torch.cat([t, 0 * t[:8]]))
        suspect = vit(mlp_ratio=520 / 128)
        for block in suspect.blocks:
            block.attn.qkv, block.attn.proj = nn.Linear(128, 480), nn.Linear(160, 128)
            block.attn.num_heads, block.attn.attn_dim = 5, 160
        suspect.load_state_dict(state)
        verdict = check(suspect, marked)
        assert verdict.decision == ("match" if makes is marked.model else "no match")


def test_a_narrower_residual_stream() -> None:
    """A map from more channels into fewer has orthonormal columns."""
    ours = sample()
    few = torch.linalg.qr(torch.randn(WIDTH, WIDTH - 4, generator=torch.Generator().manual_seed(3))).Q
    found = find_alignment(ours, ours @ few)
    assert found is not None
    assert torch.allclose(found.matrix.T @ found.matrix, torch.eye(WIDTH - 4), atol=1e-5)


def test_a_scaled_residual_stream_hides_no_mark(marked: Embedding) -> None:
    scaled = vit()
    scaled.load_state_dict(marked.model.state_dict())
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            if name.startswith(("patch_embed", "pos_embed", "cls_token")) or "fc2" in name or ".proj" in name:
                parameter *= 1000
    # Lengths are measured on the suspect, so nothing has to be undone.
    plain = check(scaled, marked, align=False)
    assert plain.decision == "match"
    assert plain.detection_rate == pytest.approx(check(marked.model, marked).detection_rate, abs=0.1)
    found = check(scaled, marked, align=True)
    assert (found.decision, found.aligned) == ("match", "scaling")


def test_symmetries_inside_the_blocks_need_no_alignment(marked: Embedding) -> None:
    verdict = check(permute_inside(marked.model, None, 3, 1), marked, align=False)
    plain = check(marked.model, marked, align=False)
    assert (verdict.decision, verdict.identical) == ("match", False)
    assert abs(verdict.bit_errors - plain.bit_errors).max() <= 1


def test_what_is_not_needed_is_not_tried_and_not_paid_for(marked: Embedding) -> None:
    plain = check(marked.model, marked)
    unpaid = check(marked.model, marked, align=False).p_value
    assert unpaid is not None
    assert (plain.aligned, plain.p_value) == (None, PLAIN_PRICE * unpaid)
    assert pytest.approx(1) == 1 / PLAIN_PRICE + 1 / ALIGNED_PRICE


@pytest.mark.parametrize(
    "attack",
    [permute_residual, rotate_residual, lambda model, *_: wider(model, 136, "turned")],
    ids=["permuted", "rotated", "padded"],
)
def test_the_alignment_never_sees_the_signs_of_the_read_out(
    attack: Callable[..., nn.Module], marked: Embedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes the p-value of an aligned reading exact: flipping rows of P flips their scores, no more."""
    seen: list[list[int]] = []
    matrices: list[Tensor] = []

    def record_scores(scores: list[int]) -> float:
        seen.append(list(scores))
        return 0.5

    def record_matrix(original: Tensor, suspect: Tensor) -> object:
        found = find_alignment(original, suspect)
        assert found is not None
        matrices.append(found.matrix)
        return found

    for module in (band_reading, looks):
        monkeypatch.setattr(module, "sign_flip_p_value", record_scores)
    monkeypatch.setattr(looks, "find_alignment", record_matrix)
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (3, 2, 32), generator=generator) * 2 - 1
    row_signs = torch.randint(0, 2, (2, 128), generator=generator) * 2 - 1

    def flipped(*arguments: Any) -> list[Codebook]:
        books = codebooks(*arguments)
        for book, of_book in zip(books, signs, strict=True):
            for tap, sign in zip((3, 4), of_book, strict=True):
                book.read_directions[tap] *= sign[:, None]
        return books

    def flipped_rows(*arguments: Any) -> dict[int, Rows]:
        made = passive_rows(*arguments)
        return {
            block: Rows(rows.answers * sign[: len(rows.answers), None], rows.inputs)
            for (block, rows), sign in zip(made.items(), row_signs, strict=True)
        }

    for makes, rows in ((codebooks, passive_rows), (flipped, flipped_rows)):
        monkeypatch.setattr(looks, "codebooks", makes)
        monkeypatch.setattr(looks, "passive_rows", rows)
        Verifier(marked.watermark, KEY, images(), align=True).judge(attack(vit(5), None, 3, 1))
    assert torch.equal(*matrices)
    plain, turned = seen[:3], seen[3:]  # of the loud band, the natural and the passive one
    assert (torch.tensor(plain[0]) * signs[0].flatten()).tolist() == turned[0]
    assert (torch.tensor(plain[1]) * signs[1:].flatten()).tolist() == turned[1]
    of_rows = row_signs[:, : len(plain[2]) // len(row_signs)].flatten()
    assert (torch.tensor(plain[2]) * of_rows).tolist() == turned[2]
    assert plain != turned


@pytest.mark.parametrize(
    ("explained", "align", "sampled"), [(0.4, None, 4), (0.6, None, 32), (0.4, True, 32)]
)
def test_who_is_explained_by_no_map_is_let_go_early(
    marked: Embedding, monkeypatch: pytest.MonkeyPatch, explained: float, align: bool | None, sampled: int
) -> None:
    taken: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        taken.append(len(arguments[-1]))
        return site_sample(*arguments)

    monkeypatch.setattr(looks, "best_explained", lambda *_: explained)
    monkeypatch.setattr(looks, "site_sample", counted)
    verify(vit(5), marked.watermark, KEY, images(), align=align)
    assert sum(taken) == sampled


def test_without_activations_to_align_with(marked: Embedding) -> None:
    fields = {f.name: getattr(marked.watermark, f.name) for f in dataclasses.fields(Watermark)}
    del fields["mac"]
    old = Watermark.seal(KEY, **(fields | {"alignment": None}))
    plain = check(marked.model, marked, align=False)
    assert verify(marked.model, old, KEY, images()).to_dict() == plain.to_dict()
    assert verify(rotate_residual(marked.model, None, 3, 1), old, KEY, images()).decision == "no match"
    with pytest.raises(ValueError, match="align: wanted a watermark with activations to align with"):
        verify(marked.model, old, KEY, images(), align=True)
