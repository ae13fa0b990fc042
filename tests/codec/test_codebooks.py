from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from activemark_fast.codec.codebooks import (
    BANDS,
    Codebook,
    SiteMeasure,
    balanced_bits,
    codebooks,
    draw_sent,
    max_bits,
)
from activemark_fast.codec.keyed import orthonormal
from activemark_fast.key import Key
from activemark_fast.marking.reading import row_scores
from activemark_fast.site import Site

KEY = Key(b"tests of the codebooks' directions")
WIDTH, TOKENS, BITS = 64, 17, 8
SITE = Site(block=1, taps=(2, 4), num_tokens=TOKENS, prefix_tokens=1, width=WIDTH, depth=6)


def activations(seed: int = 0, images: int = 12) -> Tensor:
    """(images, tokens, width), tokens that vary along 20 directions mostly."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(20, WIDTH, generator=generator)
    wide = torch.randn(images, TOKENS, 20, generator=generator) @ basis
    return wide + 0.05 * torch.randn(images, TOKENS, WIDTH, generator=generator)


def books(output: Tensor | None = None) -> list[Codebook]:
    return codebooks(KEY, SITE, BITS, SiteMeasure.of(activations() if output is None else output, 1))


def test_directions_are_orthonormal_and_read_nothing_that_is_merely_carried_along() -> None:
    for book in books():
        for read in book.read_directions.values():
            rows = torch.cat([book.inject_directions, read, torch.full((1, WIDTH), WIDTH**-0.5)]).double()
            torch.testing.assert_close(
                rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-5
            )


def test_natural_directions_lie_where_the_tokens_vary() -> None:
    covariance = SiteMeasure.of(activations(), 1).covariance.float()
    within = {
        book.band.name: float((book.inject_directions @ covariance @ book.inject_directions.T).trace())
        for book in books()
    }
    assert within["natural"] > 2 * within["loud"]


def test_every_patch_token_is_a_slot_and_lengths_follow_the_tokens() -> None:
    for book, longer in zip(books(), books(3 * activations()), strict=True):
        assert book.slots.tolist() == list(range(1, TOKENS))
        assert float(longer.scale) == pytest.approx(3 * float(book.scale))
        # A layer norm takes the scale out, so it moves no direction.
        torch.testing.assert_close(longer.inject_directions, book.inject_directions, rtol=0, atol=1e-4)


def test_flipping_a_row_of_the_read_out_flips_its_scores_and_nothing_else() -> None:
    book = books()[1]
    generator = torch.Generator().manual_seed(3)
    tapped = torch.randn(20, TOKENS, WIDTH, generator=generator)  # of any suspect
    message = torch.randint(0, 2, (10, BITS), generator=generator)

    def scores() -> list[int]:
        logits = book.decode(tapped, 4, message).logits * (2 * message - 1)
        return row_scores([logits[None, :, None]])

    before = scores()
    book.read_directions[4][3] *= -1
    after = scores()
    assert after[3] == -before[3] != 0
    assert after[:3] + after[4:] == before[:3] + before[4:]


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 5))
def test_rows_keep_their_signs(width: int, count: int, seed: int) -> None:
    width += count + 1
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    fixed = torch.ones(1, width, dtype=torch.float64)
    made = orthonormal(rows, fixed)
    flips = torch.tensor([(-1.0) ** i for i in range(count)], dtype=torch.float64)[:, None]
    torch.testing.assert_close(orthonormal(flips * rows, fixed), flips * made)
    assert bool(((made * rows).sum(dim=1) > 0).all())


def test_what_is_measured_turns_with_the_stream() -> None:
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)).double()).Q
    ones = torch.full((WIDTH, 1), WIDTH**-0.5, dtype=torch.float64)
    # An orthogonal map that fixes the all-ones vector, as the stream's symmetries do.
    outside = torch.eye(WIDTH, dtype=torch.float64) - ones @ ones.T
    q = torch.linalg.qr(torch.cat([ones, outside @ turn[:, 1:]], dim=1)).Q
    reference = torch.linalg.qr(torch.cat([ones, torch.eye(WIDTH, dtype=torch.float64)[:, 1:]], dim=1)).Q
    matrix = q @ reference.T
    assert torch.allclose(matrix @ ones, ones, atol=1e-10) or torch.allclose(matrix @ ones, -ones, atol=1e-10)
    plain = SiteMeasure.of(activations(), 1)
    moved = SiteMeasure.of((activations().double() @ matrix).float(), 1).turned_back(matrix)
    torch.testing.assert_close(moved.covariance, plain.covariance, rtol=1e-3, atol=1e-3)
    assert moved.spread == pytest.approx(plain.spread, rel=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tokens_that_are_not_finite_are_of_no_use(value: float) -> None:
    assert not SiteMeasure.of(torch.full((4, TOKENS, WIDTH), value), 1).usable
    assert SiteMeasure.of(activations(), 1).usable


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_tokens_that_do_not_vary_are_read_all_the_same(value: float) -> None:
    dead = SiteMeasure.of(torch.full((4, TOKENS, WIDTH), value), 1)
    assert dead.usable
    for book in codebooks(KEY, SITE, BITS, dead):
        assert bool(torch.isfinite(book.inject_directions).all())
        assert float(book.scale) > 0


@pytest.mark.parametrize("bits", [1, 3, 8, 33])
def test_bits_agree_as_often_as_not(bits: int) -> None:
    size = 1 << (bits - 1).bit_length()
    drawn = balanced_bits(KEY.stream("balance"), 2 * size, bits)
    assert drawn.shape == (2 * size, bits)
    signs = 2 * drawn - 1
    np.testing.assert_array_equal(signs.T @ signs, 2 * size * np.eye(bits))
    assert len(balanced_bits(KEY.stream("balance"), 5, bits)) == 5


def test_what_is_sent_follows_from_key_and_purpose() -> None:
    sent, again = draw_sent(KEY, "verify", 10, BITS), draw_sent(KEY, "verify", 10, BITS)
    assert [tuple(part.shape) for part in sent] == [
        (10, band.reads, BITS) for band in BANDS for _ in range(band.books)
    ]
    assert all(torch.equal(a, b) for a, b in zip(sent, again, strict=True))
    assert not torch.equal(sent[0], draw_sent(KEY, "check", 10, BITS)[0])


def test_there_is_room_for_both_sets_of_rows() -> None:
    assert max_bits(WIDTH) == 31
    codebooks(KEY, SITE, max_bits(WIDTH), SiteMeasure.of(activations(), 1))
