from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from activemark_fast.codec import CODECS, KeyedCodec
from activemark_fast.codec.keyed import MAX_SLOTS, STRENGTH, keyed_directions, keyed_slots
from activemark_fast.key import Key, KeyStream
from activemark_fast.p_value import bit_scores, sign_flip_p_value
from activemark_fast.site import Site

KEY, OTHER = Key(b"k" * 32), Key(b"o" * 32)
SITE = Site(
    block=1,
    taps=(2, 4),
    num_tokens=17,
    prefix_tokens=1,
    width=48,
    massive_tokens=(0, 5),
    massive_channels=(3, 40),
)
BITS = 12


def stream(batch: int = 5, site: Site = SITE, seed: int = 0) -> Tensor:
    return torch.randn(batch, site.num_tokens, site.width, generator=torch.Generator().manual_seed(seed))


def messages(batch: int, bits: int = BITS, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 2, (batch, bits), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def codec(key: Key = KEY, site: Site = SITE, bits: int = BITS) -> KeyedCodec:
    return KeyedCodec.create(key, site, bits, stream(site=site), "token")


@settings(max_examples=20)
@given(
    st.binary(min_size=16, max_size=40),
    st.integers(1, 3),
    st.sets(st.integers(0, 63), max_size=5),
    st.integers(8, 14),
)
def test_directions_are_orthonormal_and_avoid_ones_and_massive_channels(
    material: bytes, taps: int, massive: set[int], bits: int
) -> None:
    site = replace(SITE, width=64, taps=tuple(range(2, 2 + taps)), massive_channels=tuple(sorted(massive)))
    directions = keyed_directions(Key(material), site, bits)
    assert directions.shape == (1 + taps, bits, 64)
    rows = directions.reshape(-1, 64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-12)
    np.testing.assert_allclose(rows.sum(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(rows[:, sorted(massive)], 0, atol=1e-12)


class FlippedKey:
    """The key, but one row of the Gaussian matrix has the other sign."""

    def __init__(self, key: Key, row: int) -> None:
        self._key, self._row = key, row

    def stream(self, purpose: str) -> FlippedKey:
        self._stream: KeyStream = self._key.stream(purpose)
        return self

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        drawn = self._stream.normal(shape)
        drawn[self._row] *= -1
        return drawn


@pytest.mark.parametrize("row", [0, 7, BITS, 2 * BITS + 3, 3 * BITS - 1])
def test_the_sign_of_every_row_is_a_coin_of_its_own(row: int) -> None:
    # The exact p-value rests on it: turning one Gaussian row round turns one direction round, nothing else.
    plain = keyed_directions(KEY, SITE, BITS).reshape(-1, SITE.width)
    flipped = keyed_directions(FlippedKey(KEY, row), SITE, BITS).reshape(-1, SITE.width)  # type: ignore[arg-type]
    plain[row] *= -1
    np.testing.assert_allclose(flipped, plain, atol=1e-12)


def test_two_keys_share_nothing() -> None:
    ours, theirs = (keyed_directions(key, SITE, BITS).reshape(-1, SITE.width) for key in (KEY, OTHER))
    # Cosines of independent directions in 45 dimensions are about N(0, 1/45): 6 sigma is 0.9.
    overlap = np.abs(ours @ theirs.T)
    assert overlap.max() < 0.9
    assert np.sqrt((overlap**2).mean()) == pytest.approx(45**-0.5, rel=0.15)
    np.testing.assert_array_equal(keyed_directions(KEY, SITE, BITS).reshape(-1, SITE.width), ours)
    large = replace(SITE, num_tokens=257)
    assert not np.array_equal(keyed_slots(KEY, large), keyed_slots(OTHER, large))


def test_slots_are_patches_without_massive_activations() -> None:
    assert keyed_slots(KEY, SITE).tolist() == [t for t in range(1, 17) if t != 5]
    large = replace(SITE, num_tokens=257)
    slots = keyed_slots(KEY, large)
    assert len(set(slots.tolist())) == len(slots) == MAX_SLOTS
    assert np.all(np.diff(slots) > 0)
    assert set(slots.tolist()) <= set(large.patch_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("batch", [1, 7])
def test_inject_changes_the_slots_only_and_by_opposite_vectors(batch: int, dtype: torch.dtype) -> None:
    mark, output, message = codec(), stream(batch).to(dtype), messages(batch)
    before = output.clone()
    injected = mark.inject(output, output, message)
    assert injected.shape == (2 * batch, SITE.num_tokens, SITE.width)
    assert injected.dtype == dtype
    assert torch.equal(output, before)
    others = [t for t in range(SITE.num_tokens) if t not in mark.slots.tolist()]
    doubled = output.repeat(2, 1, 1)
    assert torch.equal(injected[:, others], doubled[:, others])
    added = (injected - doubled)[:, mark.slots].float()
    expected = (mark.scale * (2 * message.float() - 1) @ mark.inject_directions)[:, None]
    expected = expected.expand(-1, len(mark.slots), -1)
    tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(added, torch.cat([expected, -expected]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32])
def test_messages_of_every_dtype(dtype: torch.dtype) -> None:
    mark, output, message = codec(), stream(3), messages(3)
    want = mark.inject(output, output, message)
    assert torch.equal(mark.inject(output, output, message.to(dtype)), want)


def test_length_of_the_injection() -> None:
    output = stream(40)
    output[:, 0] *= 1000  # a massive token
    output[:, :, 3] += 500  # a massive channel
    mark = KeyedCodec.create(KEY, SITE, BITS, output, "token")
    kept = [c for c in range(SITE.width) if c not in SITE.massive_channels]
    median = output[:, SITE.patch_tokens][..., kept].norm(dim=-1).median()
    injected = mark.inject(torch.zeros_like(output), output, messages(40))[:, mark.slots]
    torch.testing.assert_close(injected.norm(dim=2), (STRENGTH * median).expand(80, len(mark.slots)))


def test_what_is_merely_carried_along_is_not_read() -> None:
    mark, output, message = codec(), stream(6), messages(6)
    injected = mark.inject(output, output, message)
    for tap in SITE.taps:
        logits = mark.decode(injected, tap, message).logits
        assert logits.shape == (6, BITS)
        assert logits.dtype == torch.float32
        assert logits.abs().max() < 1e-5
        # Layer norm without its affine part takes out the mean, which no P sees, and scales every token.
        normed = mark.decode(torch.nn.functional.layer_norm(injected, (SITE.width,)), tap, message).logits
        assert normed.abs().max() < 0.1


def test_a_model_that_carries_the_mark_is_read_right() -> None:
    mark, output, message = codec(), stream(6), messages(6)
    injected = mark.inject(output, output, message)
    for tap in SITE.taps:
        moved = injected + injected @ mark.inject_directions.T @ mark.read_directions[tap]
        read = mark.decode(moved, tap, message)
        torch.testing.assert_close(read.logits, 2 * message.float() - 1, rtol=0, atol=1e-4)
        assert not read.errors.any()
        assert mark.decode(moved, tap, 1 - message).errors.tolist() == 6 * [BITS]
        logits = mark.sharpness * read.logits
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, message.float(), reduction="none")
        torch.testing.assert_close(read.loss, loss.mean(dim=1))
        other = next(t for t in SITE.taps if t != tap)
        assert mark.decode(moved, other, message).logits.abs().max() < 1e-4


def test_swapping_the_passes_turns_every_logit_round() -> None:
    mark, tapped = codec(), stream(8)
    plus, minus = tapped.chunk(2)
    for tap in SITE.taps:
        logits = mark.decode(tapped, tap, messages(4)).logits
        assert torch.equal(mark.decode(torch.cat([minus, plus]), tap, messages(4)).logits, -logits)
        same = mark.decode(torch.cat([plus, plus]), tap, messages(4))
        assert torch.equal(same.logits, torch.zeros(4, BITS))
        assert same.errors.tolist() == 4 * [BITS]


@pytest.mark.parametrize("autocast", [False, True])
def test_flipping_a_row_of_p_flips_exactly_that_bit(autocast: bool) -> None:
    mark, tapped = codec(), stream(8)
    exact = mark.decode(tapped, 4, messages(4)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        before = mark.decode(tapped, 4, messages(4)).logits
        assert torch.equal(before, exact)  # P is multiplied in float32, whatever the blocks run in
        mark.read_directions[4][7] *= -1
        after = mark.decode(tapped, 4, messages(4)).logits
    before[:, 7] *= -1
    assert torch.equal(after, before)


def innocent_map(width: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(width, 2 * width, generator=generator) * width**-0.5,
        torch.randn(2 * width, width, generator=generator) * width**-0.5,
        torch.softmax(torch.randn(tokens, tokens, generator=generator), dim=-1),
    )


def test_p_values_of_an_innocent_suspect_are_conservative_over_keys() -> None:
    # One suspect, many keys: a nonlinear map with a strong pass-through, and correlated images.
    site = Site(1, (2, 3), 9, 1, 40, (), ())
    wide, back, mix = innocent_map(site.width, site.num_tokens)
    output = stream(1, site) + 0.3 * stream(10, site, seed=1)
    keys, bits = 400, 8
    p_values = []
    for index in range(keys):
        key = Key(index.to_bytes(16, "big"))
        mark = KeyedCodec.create(key, site, bits, output, "token")
        message = torch.from_numpy(key.stream("messages").bits((len(output), bits)))
        tapped, scores = mark.inject(output, output, message), []
        for tap in site.taps:
            tapped = tapped + torch.nn.functional.gelu(mix @ tapped @ wide) @ back
            scores += bit_scores(mark.decode(tapped, tap, message).logits, message)
        p_values.append(sign_flip_p_value(scores))
    for level in (0.01, 0.05, 0.2, 0.5):
        assert sum(p <= level for p in p_values) <= binom.ppf(0.9999, keys, level)
    # It is a test that can reject at all: without ties it is close to uniform.
    assert sum(p <= 0.5 for p in p_values) >= binom.ppf(1e-4, keys, 0.4)


def test_state_round_trip() -> None:
    mark = codec()
    restored = CODECS["keyed"].restore(KEY, SITE, BITS, mark.state(), "token")
    assert set(mark.state()) == {"scale"}
    output, message = stream(3), messages(3)
    assert torch.equal(mark.inject(output, output, message), restored.inject(output, output, message))
    for tap in SITE.taps:
        read, again = (codec.decode(stream(6), tap, message) for codec in (mark, restored))
        assert torch.equal(read.logits, again.logits)
    assert mark.to(torch.device("cpu")) is mark
    assert (mark.name, mark.exact, mark.taps, mark.bits) == ("keyed", True, SITE.taps, BITS)


def test_most_bits_a_width_has_room_for() -> None:
    most = (SITE.width - 1 - len(SITE.massive_channels)) // 3
    assert codec(bits=most).inject_directions.shape == (most, SITE.width)
    with pytest.raises(ValueError, match=f"bits: wanted at most {most} .* width 48 .*, got {most + 1}"):
        codec(bits=most + 1)


def test_a_model_without_a_token_to_write_to() -> None:
    crowded = replace(SITE, massive_tokens=tuple(range(17)))
    with pytest.raises(ValueError, match="model: wanted patch tokens"):
        KeyedCodec.create(KEY, crowded, BITS, stream(), "token")
