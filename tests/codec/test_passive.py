"""The passive band: what it reads, and that its p-value is exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from activemark_fast.codec.passive import (
    FLOOR,
    MAX_ROWS,
    MOST,
    Moments,
    Rows,
    inputs_and_answers,
    passive_rows,
    passive_scores,
    readings,
)
from activemark_fast.key import Key
from activemark_fast.p_value import sign_flip_p_value
from activemark_fast.site import Site

SITE = Site(2, (4, 6), num_tokens=17, prefix_tokens=1, width=24, depth=8)


def key(number: int) -> Key:
    return Key(b"a key of the passive band's tests" + number.to_bytes(4, "big"))


def block(seed: int, count: int = 400, width: int = 24, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Input and output of a block, (count, width): a random nonlinear map."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(count, width, generator=generator) * torch.linspace(0.1, 3, width)
    weights = torch.randn(width, width, generator=generator) / width**0.5
    return [before.to(dtype), (before + torch.tanh(before @ weights)).to(dtype)]


def moments(before: Tensor, after: Tensor, at_once: int = 400) -> Moments:
    made = Moments(before.shape[1], 0, before.device)
    for pair in zip(before.split(at_once), after.split(at_once), strict=True):
        made.add(*inputs_and_answers(*pair))
    return made


def rows_of(number: int) -> Rows:
    return passive_rows(key(number), SITE)[3]


def test_readings_are_those_of_whitened_correlations() -> None:
    before, after = block(0)
    x, y = (part.double().numpy() for part in inputs_and_answers(before, after))

    def whitened(values: np.ndarray) -> np.ndarray:
        centred = values - values.mean(axis=0)
        covariance = centred.T @ centred / len(centred)
        covariance += FLOOR * np.diagonal(covariance).mean() * np.eye(len(covariance))
        return np.linalg.solve(np.linalg.cholesky(covariance), centred.T)

    matrix = whitened(y) @ whitened(x).T / len(x)
    rows = rows_of(0)
    u, v = rows.answers.numpy(), rows.inputs.numpy()
    expected = np.einsum("rd,de,re->r", u, matrix, v) / np.sqrt((matrix**2).mean())
    np.testing.assert_allclose(readings(rows, moments(before, after)), expected, rtol=1e-4, atol=1e-4)


def test_rows_are_orthonormal_and_of_every_block_behind_the_site() -> None:
    rows = passive_rows(key(1), SITE)
    assert list(rows) == [3, 4, 5, 6]
    for of_block in rows.values():
        for part in (of_block.answers, of_block.inputs):
            assert part.shape == ((SITE.width - 1) // 2, SITE.width)
            torch.testing.assert_close(part @ part.T, torch.eye(len(part), dtype=torch.float64))
            assert float(part.sum(dim=1).abs().max()) < 1e-9  # a layer norm takes out the mean
    wide = Site(0, (1, 1), 17, 1, 1024, depth=3)
    assert len(passive_rows(key(1), wide)[1].answers) == MAX_ROWS
    # Where the site has moved, with all behind it, so have the rows.
    moved = passive_rows(key(1), Site(3, (5, 7), 17, 1, 24, depth=9))
    assert torch.equal(moved[4].answers, rows[3].answers)
    assert not torch.equal(rows[3].answers, rows[4].answers)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(0.01, 100))
def test_neither_the_size_of_a_stream_nor_of_what_is_added_matters(
    seed: int, size: float, added: float
) -> None:
    before, after = block(seed)
    plain = readings(rows_of(seed), moments(before, after))
    other = readings(rows_of(seed), moments(size * before, size * before + added * (after - before)))
    torch.testing.assert_close(other, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("at_once", [1, 7, 400])
def test_moments_add_up(at_once: int) -> None:
    before, after = block(3)
    torch.testing.assert_close(
        readings(rows_of(3), moments(before, after, at_once)),
        readings(rows_of(3), moments(before, after)),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_streams_of_any_dtype_are_read_in_float32(dtype: torch.dtype) -> None:
    before, after = block(4, dtype=dtype)
    expected = readings(rows_of(4), moments(before.float(), after.float()))
    torch.testing.assert_close(readings(rows_of(4), moments(before, after)), expected)


def test_flipping_the_sign_of_a_row_flips_what_it_reads_alone() -> None:
    pair = block(5)
    rows = rows_of(5)
    flipped = rows.answers.clone()
    flipped[4] *= -1
    plain = readings(rows, moments(*pair))
    signs = torch.ones(len(plain), dtype=torch.float64)
    signs[4] = -1
    torch.testing.assert_close(readings(Rows(flipped, rows.inputs), moments(*pair)), signs * plain)


def test_p_values_of_keys_that_a_model_does_not_depend_on_are_no_smaller_than_chance() -> None:
    """Of 600 keys, on one model of two blocks."""
    made = [moments(*block(seed)) for seed in (6, 7)]
    p_values = np.array(
        [
            sign_flip_p_value(
                passive_scores([readings(rows, block) for rows, block in zip(of_key, made, strict=True)])
            )
            for number in range(600)
            for of_key in [list(passive_rows(key(number), SITE).values())[:2]]
        ]
    )
    for level in (0.5, 0.1, 0.02):
        # Three standard errors above what is allowed.
        assert (p_values <= level).mean() <= level + 3 * (level / 600) ** 0.5
    assert p_values.min() < 0.02  # and it is no constant


@pytest.mark.parametrize(
    "after", ["nothing added", "constant", "infinite"], ids=["nothing", "constant", "infinite"]
)
def test_a_block_that_tells_nothing_scores_nothing(after: Any) -> None:
    before, _ = block(8)
    outputs = {"nothing added": before, "constant": before + 1, "infinite": before * torch.inf}
    read = readings(rows_of(8), moments(before, outputs[after]))
    if after == "constant":  # what is left is rounding
        assert bool(torch.isfinite(read).all())
        return
    assert passive_scores([read]) == [0] * len(read)
    assert sign_flip_p_value(passive_scores([read])) == 1.0


def test_scores_are_whole_and_no_row_outweighs_the_others() -> None:
    scores = passive_scores([torch.tensor([1.0, -1.0, 0.0]), torch.tensor([100.0])])
    assert scores == [0, 0, 0, 2 * 8]
    assert max(map(abs, passive_scores([torch.cat([torch.ones(99), torch.tensor([1e6])])]))) == MOST
