from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from activemark_fast.p_value import sign_flip_p_value
from activemark_fast.sequential import (
    FEWEST_IMAGES,
    LEAST_IMAGES,
    WEAKEST_MARK,
    look_ends,
    look_penalties,
    mark_excluded,
    out_of_reach,
)


@given(st.integers(1, 2000))
def test_the_looks_end_with_all_images(images: int) -> None:
    ends = look_ends(images)
    assert ends[-1] == images
    assert ends == sorted(set(ends))
    assert ends[:-1] == [8 * 2**look for look in range(len(ends) - 1)]


@given(st.integers(1, 20))
def test_the_weights_of_the_looks_sum_to_one(looks: int) -> None:
    penalties = look_penalties(looks)
    assert len(penalties) == looks
    assert sum(Fraction(1, penalty) for penalty in penalties) == 1


def test_the_p_value_stays_valid_under_the_most_eager_stopping() -> None:
    """Innocent suspects with strong habits, whoever looks stopping at the smallest p-value there is."""
    draws = np.random.default_rng(0)
    ends = look_ends(64)
    smallest = []
    for _ in range(2000):
        # Each bit of an innocent has a leaning of its own, which the key's fair sign turns either way.
        leaning = draws.choice([-1, 1], 8) * draws.uniform(0, 0.9, 8)
        read = np.where(draws.uniform(-1, 1, (64, 8)) < leaning, 1, -1)
        smallest.append(
            min(
                penalty * sign_flip_p_value(read[:end].sum(axis=0).tolist())
                for end, penalty in zip(ends, look_penalties(len(ends)), strict=True)
            )
        )
    p_values = np.array(smallest)
    for level in (0.02, 0.05, 0.2):
        assert (p_values <= level).mean() <= level + 3 * np.sqrt(level / len(p_values))


@given(
    st.integers(2, 64),
    st.integers(1, 3),
    st.floats(1e-6, 0.5),
    st.integers(0, 2**32 - 1),
)
def test_a_mark_is_excluded_when_the_limit_is_below_it_at_every_tap(
    n: int, taps: int, miss: float, seed: int
) -> None:
    agreement = np.random.default_rng(seed).uniform(-0.5, 0.7, (n, taps))
    limits = [stats.ttest_1samp(column, 0).confidence_interval(1 - 2 * miss).high for column in agreement.T]
    assert mark_excluded(agreement, miss) == (max(limits) < WEAKEST_MARK)


@pytest.mark.parametrize("end", [8, 16, 64])
def test_how_often_a_mark_of_the_stated_strength_is_given_up(end: int) -> None:
    draws = np.random.default_rng(end)
    right = draws.random((4000, end, 32)) < (1 + WEAKEST_MARK) / 2
    agreement = 2 * right.mean(axis=2) - 1
    given_up = np.mean([mark_excluded(row[:, None], 0.05) for row in agreement])
    assert 0.03 < given_up < 0.07


def suspects(count: int, rows: int, shown: float, mark: float, seed: int) -> np.ndarray:
    """(count, 128, rows) agreements of +1 and -1: what each row shows by itself, and of a mark."""
    draws = np.random.default_rng(seed)
    true = np.clip(draws.normal(0, shown, (count, 1, rows)) + mark, -1, 1)
    return np.where(draws.random((count, 128, rows)) < (1 + true) / 2, 1.0, -1.0)


def z(scores: np.ndarray) -> np.ndarray:
    sums = scores.sum(axis=-2)
    return sums.sum(axis=-1) / np.sqrt((sums**2).sum(axis=-1))


@pytest.mark.parametrize("shown", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("end", [32, 64])
def test_a_mark_that_would_be_found_is_hardly_ever_given_up_for_out_of_reach(shown: float, end: int) -> None:
    made = suspects(400, 64, shown, 0.08 + shown, seed=0)
    wanted = stats.norm.sf(np.median(z(made)))  # by what half of them reach
    found = z(made) >= -stats.norm.ppf(wanted)
    given_up = np.array([out_of_reach(scores[:end], 128, wanted) for scores in made])
    assert 100 < found.sum() < 300
    assert (found & given_up).sum() <= 2


def test_most_innocents_are_out_of_reach_after_few_images() -> None:
    steady, fickle = (suspects(200, 64, shown, 0, seed=1) for shown in (0.5, 0.0))
    assert np.mean([out_of_reach(scores[:32], 128, 1e-9) for scores in steady]) > 0.95
    assert np.mean([out_of_reach(scores[:64], 128, 1e-9) for scores in fickle]) > 0.7


def test_a_mark_that_a_fifth_of_the_images_show_is_hardly_ever_given_up() -> None:
    """As a model would have it that was taught not to answer, on most kinds of images."""
    draws = np.random.default_rng(3)
    innocent, marked = suspects(400, 64, 0.1, 0, seed=4), suspects(400, 64, 0.1, 0.8, seed=5)
    shows = np.arange(128) < 26
    given_up = found = 0
    for with_mark, without in zip(marked, innocent, strict=True):
        scores = np.where(draws.permutation(shows)[:, None], with_mark, without)
        found += stats.norm.sf(z(scores)) <= 1e-9
        ends = [end for end in look_ends(128)[:-1] if end >= LEAST_IMAGES]
        given_up += any(out_of_reach(scores[:end], 128, 1e-9) for end in ends)
    assert found > 350
    assert given_up <= 2


def test_with_all_images_read_a_match_is_out_of_reach_or_there() -> None:
    scores = suspects(1, 64, 0.3, 0.1, seed=2)[0]
    reached = stats.norm.sf(z(scores))
    assert not out_of_reach(scores, 128, reached)
    assert out_of_reach(np.broadcast_to(scores.mean(axis=0), scores.shape), 128, reached / 2)
    assert not out_of_reach(np.ones((32, 3)), 128, 0.3)
    assert out_of_reach(-np.ones((32, 3)), 128, 0.3)
    assert not out_of_reach(-np.ones((FEWEST_IMAGES - 1, 3)), 128, 0.3)
