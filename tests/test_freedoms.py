from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import get_type_hints

import pytest
import torch
from torch import nn

from activemark_fast import Key, Watermark, embed, verify
from activemark_fast.commitment import Commitment
from activemark_fast.freedoms import ARCHITECTURES, BITS, FIELDS, Kind, alternatives
from activemark_fast.normalisation import NORMALISATIONS, Preprocess, known_normalisation
from activemark_fast.site import Site
from activemark_fast.watermark import WatermarkError
from tests.tiny import vit

KEY = b"tests of what an owner may choose"


def fields_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of a dataclass's fields, those of its dataclass fields in their place."""
    for name, kind in get_type_hints(cls).items():
        if name not in {field.name for field in fields(cls)}:
            continue
        if is_dataclass(kind):
            yield from fields_of(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_field_of_the_watermark_has_a_kind() -> None:
    assert set(fields_of(Watermark)) == FIELDS.keys()
    assert all(isinstance(kind, Kind) for kind in FIELDS.values())


def test_every_field_that_is_written_has_a_kind(marked: tuple[nn.Module, Watermark]) -> None:
    header = marked[1]._header()
    written = {
        f"{name}.{inner}" if isinstance(value, dict) else name
        for name, value in header.items()
        for inner in (value if isinstance(value, dict) else [""])
    }
    assert written <= FIELDS.keys()
    assert "site.taps" not in written  # they follow from block and depth


@pytest.fixture(scope="module")
def marked() -> tuple[nn.Module, Watermark]:
    made = embed(vit(), KEY, fidelity=0.95)
    return made.model, made.watermark


def forged(watermark: Watermark, **changes: object) -> Watermark:
    """A watermark with other fields, sealed under the owner's key, as a forger would."""
    names = {field.name for field in fields(Watermark)} - {"mac"}
    given = {name: getattr(watermark, name) for name in names} | changes
    return Watermark.seal(Key.of(KEY), **given)


SITE_CHANGES: dict[str, dict[str, object]] = {
    "site.block": {"block": 5},
    "site.taps": {"taps": (3,)},
    "site.prefix_tokens": {"prefix_tokens": 17},
    "site.massive_channels": {"massive_channels": (3, 5)},
    "site.depth": {"depth": 1 << 20},
}


@pytest.mark.parametrize("field", SITE_CHANGES)
def test_no_site_that_embed_does_not_write_is_read(marked: tuple[nn.Module, Watermark], field: str) -> None:
    model, watermark = marked
    site = replace(watermark.site, **SITE_CHANGES[field])  # type: ignore[arg-type]
    with pytest.raises(WatermarkError, match=field):
        verify(model, forged(watermark, site=site), KEY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 9),
        ("bits", 64),  # more than the width has room for
        ("axis", "channel"),
        ("state", {"scale": torch.tensor(0.1)}),
        ("digests", (b"0" * 32,) * 16),
        ("image_source", "folder"),
    ],
)
def test_no_field_that_embed_does_not_write_is_read(
    marked: tuple[nn.Module, Watermark], field: str, value: object
) -> None:
    model, watermark = marked
    named = "digests" if field == "image_source" else field
    with pytest.raises(WatermarkError, match=named):
        verify(model, forged(watermark, **{field: value}), KEY)


def test_the_p_value_pays_for_what_the_owner_could_choose(marked: tuple[nn.Module, Watermark]) -> None:
    model, watermark = marked
    verdict = verify(model, watermark, KEY)
    factor = 1
    for count in verdict.alternatives.values():
        factor *= count
    assert verdict.decision == "match"
    assert verdict.p_value is not None
    assert verdict.paid_p_value == pytest.approx(min(1, verdict.p_value * factor))
    assert verdict.chosen == ()
    # One of 4 blocks, the usual ones of 64 depths and 32 lengths, one of 6 normalisations.
    assert verdict.alternatives == {"block": 4, "depth": 2, "bits": 2, "normalisation": 6}


@pytest.mark.parametrize("architecture", [False, True])
@pytest.mark.parametrize("suspects_depth", [3, 4, 12, 64])
def test_the_weights_of_all_choices_sum_to_at_most_1(suspects_depth: int, architecture: bool) -> None:
    total = 0.0
    for depth in range(3, 64 + 3):
        for bits in BITS:
            for block in range(depth - 2):
                site = Site(block, (depth - 1,), num_tokens=5, prefix_tokens=1, width=8, depth=depth)
                choices = alternatives(site, bits, suspects_depth, architecture)
                total += 1 / math.prod(choices.values())
    assert total * len(NORMALISATIONS) * (ARCHITECTURES if architecture else 1) == pytest.approx(1)


def test_many_claims_in_a_commitment_are_paid_for(marked: tuple[nn.Module, Watermark]) -> None:
    model, watermark = marked
    others = [Key(bytes([n]) * 32) for n in range(3)]
    claims = [(Key.of(KEY), watermark), *((key, embed(vit(), key, fidelity=0.9).watermark) for key in others)]
    alone, among_four = (Commitment.make(Key.of(KEY), marks) for marks in (claims[:1], claims))
    unpaid = verify(model, watermark, KEY).alternatives
    assert verify(model, watermark, KEY, commitment=alone).alternatives == unpaid
    paid = verify(model, watermark, KEY, commitment=among_four).alternatives
    assert paid == unpaid | {"committed claim": 4}


def test_a_normalisation_of_ones_own_is_chosen(marked: tuple[nn.Module, Watermark]) -> None:
    model, watermark = marked
    own = replace(watermark.preprocess, mean=(0.3, 0.3, 0.3))
    verdict = verify(model, forged(watermark, preprocess=own), KEY)
    assert "the normalisation of images" in verdict.chosen
    if verdict.evidence is not None:
        assert verdict.evidence.startswith("none by itself")


def test_the_last_digits_of_a_normalisation_are_nobodys_choice(marked: tuple[nn.Module, Watermark]) -> None:
    model, watermark = marked
    mean, std = watermark.preprocess.mean, watermark.preprocess.std
    shifted = replace(watermark.preprocess, mean=(mean[0] + 4e-4, *mean[1:]), std=(std[0] - 4e-4, *std[1:]))
    plain, moved = (verify(model, w, KEY) for w in (watermark, forged(watermark, preprocess=shifted)))
    assert plain.p_value == moved.p_value
    assert (plain.bit_errors == moved.bit_errors).all()


def test_published_normalisations_are_told_apart() -> None:
    for mean, std in NORMALISATIONS:
        known = known_normalisation(Preprocess((8, 8), mean, std))
        assert known is not None
        assert (known.mean, known.std) == (mean, std)
    assert known_normalisation(Preprocess((8, 8), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))) is None


def test_an_unknown_depth_is_paid_like_one_block() -> None:
    site = Site(block=0, taps=(1,), num_tokens=5, prefix_tokens=1, width=8)
    assert alternatives(site, 32, 12, False)["block"] == 1
