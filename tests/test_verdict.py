from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from datetime import datetime, timezone
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from activemark_fast.commitment import Opening, Timestamp
from activemark_fast.p_value import bit_scores, sign_flip_p_value
from activemark_fast.verdict import (
    Verdict,
    clopper_pearson,
    default_tau,
    detection_threshold,
    fair_coin_pass_rate,
)

SCORES = st.lists(st.integers(-6, 6), min_size=1, max_size=12)


def brute_force(scores: list[int]) -> float:
    """Share of all sign choices whose sum is at least the observed one."""
    reached = sum(
        sum(s * abs(score) for s, score in zip(signs, scores, strict=True)) >= sum(scores)
        for signs in product((-1, 1), repeat=len(scores))
    )
    return reached / 2 ** len(scores)


@given(SCORES)
def test_p_value_is_the_share_of_all_sign_choices(scores: list[int]) -> None:
    assert sign_flip_p_value(scores) == brute_force(scores)


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=9))
def test_p_value_of_large_scores(scores: list[int]) -> None:
    assert sign_flip_p_value(scores) == brute_force(scores)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_p_value_is_valid_whatever_the_absolute_scores(weights: list[int]) -> None:
    # Enumerated: every sign choice is equally likely, so P(p <= q) can be counted, for every q that occurs.
    p_values = [
        sign_flip_p_value([s * w for s, w in zip(signs, weights, strict=True)])
        for signs in product((-1, 1), repeat=len(weights))
    ]
    for q, _ in Counter(p_values).items():
        assert sum(p <= q for p in p_values) / len(p_values) <= q


@given(SCORES, st.integers(0, 11))
def test_p_value_falls_as_a_bit_turns_right(scores: list[int], bit: int) -> None:
    bit %= len(scores)
    turned = [abs(s) if i == bit else s for i, s in enumerate(scores)]
    assert sign_flip_p_value(turned) <= sign_flip_p_value(scores)


@pytest.mark.parametrize("n", [1, 2, 31, 32, 64, 512])
def test_floor_and_ceiling(n: int) -> None:
    assert sign_flip_p_value([3] * n) == 2.0**-n
    assert sign_flip_p_value([-3] * n) == 1.0
    assert sign_flip_p_value([0] * n) == 1.0


def test_zeros_take_no_part() -> None:
    assert sign_flip_p_value([0, 0, 5, 0]) == 0.5
    assert sign_flip_p_value([4, 0, -3, 7]) == sign_flip_p_value([4, -3, 7])


def test_many_large_scores() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        scores = (256 * generator.choice((-1, 1), 256)).tolist()
        # All weights are equal: the number of negative scores is binomial.
        negative = sum(s < 0 for s in scores)
        expected = sum(math.comb(256, k) for k in range(negative + 1)) / 2**256
        assert sign_flip_p_value(scores) == expected
        assert 2.0**-256 <= expected <= 1


def test_p_value_takes_integers_of_numpy_and_torch() -> None:
    scores = [3, -1, 2]
    assert sign_flip_p_value(np.array(scores)) == sign_flip_p_value(scores)  # type: ignore[arg-type]
    assert sign_flip_p_value(list(torch.tensor(scores))) == sign_flip_p_value(scores)


def test_no_scores() -> None:
    with pytest.raises(ValueError, match="scores: wanted at least one"):
        sign_flip_p_value([])


def test_fair_coin_pass_rate() -> None:
    assert fair_coin_pass_rate(32, 5) == pytest.approx(5.65e-5, rel=1e-3)
    assert fair_coin_pass_rate(32, 32) == 1
    assert fair_coin_pass_rate(8, 0) == 2**-8


@pytest.mark.parametrize("bits", [14, 16, 24, 32, 33, 48, 64, 128, 256])
def test_default_tau_is_the_largest_that_chance_rarely_meets(bits: int) -> None:
    tau = default_tau(bits)
    assert fair_coin_pass_rate(bits, tau) <= 1e-4 < fair_coin_pass_rate(bits, tau + 1)


def test_default_tau_of_32_bits() -> None:
    assert default_tau(32) == 5


MESSAGE = [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]]
LOGITS = [[-1.0, 2.0, -0.5, 0.0], [1e-20, -3.0, -1.0, 0.0], [5.0, -1.0, 1.0, -2.0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.int8, torch.float32])
def test_bits_for_every_dtype_of_the_message(dtype: torch.dtype) -> None:
    logits, message = torch.tensor(LOGITS), torch.tensor(MESSAGE).to(dtype)
    assert bit_scores(logits, message) == [3, 1, 1, 1]
    assert all(type(score) is int for score in bit_scores(logits, message))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bits_for_every_dtype_of_the_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0]], dtype=dtype)
    assert bit_scores(logits, torch.tensor([[1, 1, 1]])) == [1, -1, 0]


def test_logits_of_zero_favour_no_side() -> None:
    for bit in (0, 1):
        message = torch.full((5, 8), bit, dtype=torch.uint8)
        assert bit_scores(torch.zeros(5, 8), message) == [0] * 8


@given(st.integers(0, 2**32 - 1))
def test_scores_turn_round_with_the_sign_of_the_logits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-1, 2, (6, 5), generator=generator).float()
    message = torch.randint(0, 2, (6, 5), generator=generator)
    assert bit_scores(-logits, message) == [-score for score in bit_scores(logits, message)]
    assert bit_scores(logits, 1 - message) == [-score for score in bit_scores(logits, message)]


KEYED = Verdict(
    "match", "the suspect carries the mark", np.array([0, 1, 7]), 32, 5, 2 / 3, 5e-20, 1e-6, "keyed", True
)
LEARNED = Verdict("no match", "too few", np.array([16, 17]), 32, 5, 0.0, None, 1e-6, "learned")
UNREADABLE = Verdict(
    "inconclusive", "other width", np.zeros(0, np.int64), 32, 5, float("nan"), None, 1e-6, "keyed"
)


@pytest.mark.parametrize("verdict", [KEYED, LEARNED, UNREADABLE], ids=["keyed", "learned", "unreadable"])
def test_verdict_as_json(verdict: Verdict) -> None:
    decoded = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert decoded["decision"] == verdict.decision
    assert decoded["reason"] == verdict.reason
    assert decoded["codec"] == verdict.codec
    assert decoded["bit_errors"] == verdict.bit_errors.tolist()
    assert decoded["images"] == verdict.images == len(verdict.bit_errors)
    assert decoded["p_value"] == verdict.p_value
    assert decoded["detection_rate"] == (verdict.detection_rate if verdict.images else None)
    assert (decoded["bits"], decoded["tau"], decoded["alpha"]) == (32, 5, 1e-6)
    assert decoded["identical"] is verdict.identical


def test_verdict_as_text() -> None:
    keyed = str(KEYED)
    assert keyed.startswith("MATCH: the suspect carries the mark\n")
    for part in ("R = 0.667 over 3 images", "at most 5 of 32 bits wrong", "mean 2.67", "5e-20", "identical"):
        assert part in keyed
    learned = str(LEARNED)
    assert "p-value: none" in learned
    assert "identical" not in learned
    assert str(UNREADABLE) == "INCONCLUSIVE: other width"


@given(st.integers(1, 60), st.data())
def test_clopper_pearson_is_what_its_definition_says(images: int, draw: st.DataObject) -> None:
    count = draw.draw(st.integers(0, images))
    low, high = clopper_pearson(count, images)
    expected = binomtest(count, images).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert low <= count / images <= high


@given(st.integers(1, 300), st.floats(1e-6, 0.2), st.floats(1e-9, 1e-2))
def test_the_detection_threshold_keeps_both_rates(images: int, chance: float, rate: float) -> None:
    wanted, weakest = detection_threshold(images, chance, rate, miss=0.01)
    if wanted <= images:
        assert binom.sf(wanted - 1, images, chance) <= rate * (1 + 1e-9)
        assert binom.cdf(wanted - 1, images, weakest) == pytest.approx(0.01)
    if wanted > 1:
        assert binom.sf(wanted - 2, images, chance) > rate * (1 - 1e-9)


def opening(committed: bool = True, trusted: bool | None = None) -> Opening:
    time = datetime(2026, 11, 25, 18, 0, 0, tzinfo=timezone.utc)
    stamp = None if trusted is None else Timestamp(time, trusted)
    return Opening(committed, "2026-11-25T17:00:00Z", stamp, "ab" * 32)


def test_evidence_of_a_keyed_match() -> None:
    told = (
        "an owner who lies would have to try about 2e+19 keys against this one model, 3.2e+10 years of one "
        "processor core or more than 6.3e+06 of one H100"
    )
    assert KEYED.evidence == told
    paid = replace(KEYED, alternatives={"block": 10, "bits": 32})
    assert paid.evidence == told.replace("2e+19", "6.2e+16").replace("3.2e+10", "9.9e+07").replace(
        "6.3e+06", "2e+04"
    )
    weak = replace(KEYED, p_value=1e-9)
    assert weak.evidence is not None
    assert weak.evidence.startswith("weak by itself: an owner who lies would have to try about 1e+09 keys")
    assert LEARNED.evidence is None
    assert UNREADABLE.evidence is None
    assert str(replace(KEYED, opening=opening())).count("committed, signed by abab") == 1
    dated = replace(KEYED, opening=opening(trusted=True))
    assert dated.evidence == f"{told}; and the owner was bound to this key before 2026-11-25T18:00:00+00:00"


@pytest.mark.parametrize(
    ("opened", "proves"),
    [
        (None, False),
        (opening(), False),
        (opening(trusted=False), False),
        (opening(committed=False, trusted=True), False),
        (opening(trusted=True), True),
    ],
    ids=["none", "undated", "unchecked", "another's", "dated"],
)
def test_what_could_have_been_fitted_needs_an_older_commitment(opened: Opening | None, proves: bool) -> None:
    learned = replace(LEARNED, decision="match", chosen=("the codec",), opening=opened)
    assert learned.evidence is not None
    if proves:
        assert learned.evidence == (
            "if the suspect and every model it was made from are younger than 2026-11-25T18:00:00+00:00, "
            "when the codec had been committed to"
        )
    else:
        assert learned.evidence.startswith("none by itself: the owner chose the codec and may have fitted")
