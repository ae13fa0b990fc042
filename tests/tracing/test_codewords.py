from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from activemark_fast import Key
from activemark_fast.tracing.codewords import (
    CUTOFF,
    LEVELS,
    AccusationTest,
    colluders_withstood,
    draw_biases,
    draw_codewords,
    example_codeword,
)

KEY = Key(b"tests of codewords and accusations")
ANSWERS = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=7)


def few(answers: list[float]) -> tuple[AccusationTest, np.ndarray, np.ndarray]:
    """The test on a few positions, all codewords there are, and the probability of each."""
    biases = draw_biases(KEY, len(answers))
    test = AccusationTest.of(np.array([answers]), np.zeros((1, len(answers))), biases)
    words = np.array(list(itertools.product([False, True], repeat=len(answers))))
    return test, words, np.where(words, biases, 1 - biases).prod(axis=1)


def collusion(members: int, positions: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers of the noisy mean of some copies, the biases, and the codewords of all recipients."""
    biases = draw_biases(KEY, positions)
    words = draw_codewords(KEY, [f"recipient {i}" for i in range(200)], biases)
    noise = np.random.default_rng(seed).normal(size=positions)
    return (2.0 * words[:members] - 1).mean(axis=0) + 0.3 * noise, biases, words


@given(ANSWERS)
def test_the_p_value_is_the_share_of_all_codewords(answers: list[float]) -> None:
    test, words, chances = few(answers)
    scores = test.scores(words)
    for score, p_value in zip(scores, test.p_values(scores), strict=True):
        assert p_value == pytest.approx(chances[scores >= score].sum(), rel=1e-7)


@given(ANSWERS, st.floats(0, 1))
def test_an_innocent_recipient_reaches_no_p_value_more_often_than_it_says(
    answers: list[float], level: float
) -> None:
    test, words, chances = few(answers)
    reached = test.p_values(test.scores(words)) <= level
    assert chances[reached].sum() <= level * (1 + 1e-12)


@given(ANSWERS)
def test_a_higher_score_has_a_lower_p_value(answers: list[float]) -> None:
    test, words, _ = few(answers)
    scores = np.sort(test.scores(words))
    assert (np.diff(test.p_values(scores)) <= 0).all()
    assert (np.diff(test.deviations(scores)) >= 0).all()


@given(ANSWERS, st.data())
def test_a_position_that_was_not_read_counts_for_nothing(answers: list[float], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(answers) - 1))
    answers[index] = math.nan
    test, words, _ = few(answers)
    turned = words.copy()
    turned[:, index] = ~turned[:, index]
    assert (test.scores(words) == test.scores(turned)).all()


def test_nothing_read_accuses_nobody() -> None:
    test, words, _ = few([math.nan] * 4)
    assert (test.p_values(test.scores(words)) == 1).all()
    assert (test.deviations(test.scores(words)) == 0).all()


def test_a_million_innocent_recipients() -> None:
    """Counted, whatever three colluders did: at every level at most as many as the p-value says."""
    answers, biases, _ = collusion(3, 256, seed=0)
    test = AccusationTest.of(answers.reshape(2, -1), np.zeros((2, 128)), biases)
    generator, count = np.random.default_rng(1), 1_000_000
    p_values = np.concatenate(
        [
            test.p_values(test.scores(generator.random((10_000, 256), dtype=np.float32) < biases))
            for _ in range(count // 10_000)
        ]
    )
    for level in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        most = binom.ppf(1 - 1e-4, count, level)  # a correct test has more once in 10,000
        assert (p_values <= level).sum() <= most, level
    # … and not far fewer: nothing is given away.
    assert (p_values <= 1e-3).sum() > 0.8 * count * 1e-3


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_colluders_by_mean_are_told_from_the_others(members: int) -> None:
    answers, biases, words = collusion(members, 512, seed=members)
    test = AccusationTest.of(answers.reshape(2, -1), np.zeros((2, 256)), biases)
    p_values = test.p_values(test.scores(words)) * len(words)
    assert p_values[:members].min() <= 1e-6
    assert p_values[members:].min() > 1e-3


def test_what_the_model_answers_by_itself_is_taken_out() -> None:
    answers, biases, words = collusion(1, 512, seed=0)
    reference = 10 * np.random.default_rng(5).normal(size=(2, 256))
    for share in (0.0, 0.6, 1.0):  # an attack may leave any share of it
        test = AccusationTest.of(answers.reshape(2, -1) + share * reference, reference, biases)
        assert test.p_values(test.scores(words))[0] < 1e-30


def test_one_position_that_went_astray_decides_nothing() -> None:
    answers, biases, words = collusion(1, 512, seed=0)
    answers[7] = 1e6
    test = AccusationTest.of(answers.reshape(2, -1), np.zeros((2, 256)), biases)
    assert test.p_values(test.scores(words))[0] < 1e-20


def test_scores_are_exact_integers() -> None:
    answers, biases, words = collusion(3, 512, seed=0)
    test = AccusationTest.of(answers.reshape(2, -1), np.zeros((2, 256)), biases)
    agrees = words == (test.levels > 0)
    assert (test.scores(words) == (agrees * np.abs(test.levels)).sum(axis=1)).all()
    assert abs(np.abs(test.levels).sum() - LEVELS) <= 512


def test_biases_and_codewords_follow_from_the_key() -> None:
    biases = draw_biases(KEY, 100_000)
    assert biases.min() >= CUTOFF
    assert biases.max() <= 1 - CUTOFF
    # Arcsine within the cut-off: half of it lies where sin² r has r within the middle half of its range.
    least = math.asin(math.sqrt(CUTOFF))
    quarter = math.sin(least + (math.pi / 2 - 2 * least) / 4) ** 2
    assert np.mean((biases > quarter) & (biases < 1 - quarter)) == pytest.approx(0.5, abs=0.01)
    words = draw_codewords(KEY, ["a", "b"], biases)
    assert (words == draw_codewords(KEY, ["a", "b"], biases)).all()
    assert (words[:1] == draw_codewords(KEY, ["a"], biases)).all()
    assert (words[0] != words[1]).any()
    assert (words[0] != draw_codewords(Key(b"another key of sixteen"), ["a"], biases)[0]).any()
    assert (example_codeword(KEY, biases) != words).any(axis=1).all()
    for word in words:
        assert np.mean(word - biases) == pytest.approx(0, abs=0.01)


FIRST_BIASES = [0.877564803475382, 0.703836286778425, 0.890361844112653, 0.0922001990121925]
FIRST_WORD = "a3b40819"


def test_the_first_numbers_never_change() -> None:
    """A copy made today is traced with the same numbers years later."""
    key = Key(bytes(range(32)))
    assert draw_biases(key, 4).tolist() == pytest.approx(FIRST_BIASES, abs=1e-12)
    word = draw_codewords(key, ["Ada Lovelace"], draw_biases(key, 32))[0]
    assert np.packbits(word).tobytes().hex() == FIRST_WORD


def test_colluders_withstood() -> None:
    assert colluders_withstood(818, 1000, 1e-6) == 1  # π² 2² ln(10⁹) = 818.1
    assert colluders_withstood(819, 1000, 1e-6) == 2
    assert colluders_withstood(100, 1000, 1e-6) == 0
