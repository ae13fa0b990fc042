from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from activemark_fast.codec.codebooks import balanced_bits
from activemark_fast.key import Key
from activemark_fast.marking.reading import CROSSTALK_RIDGE, without_crosstalk

KEY = Key(b"the key of the tests of readings")


def readings(
    images: int, reads: int, bits: int, seed: int, noise: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Agreements of two taps, what was sent, and the answers of each row to each bit (taps, M, M)."""
    generator = torch.Generator().manual_seed(seed)
    stream = KEY.stream(f"messages/{seed}")
    sent = torch.from_numpy(balanced_bits(stream, images * reads, bits)).view(images, reads, bits)
    answers = torch.randn(2, bits, bits, generator=generator, dtype=torch.float64)
    signs = 2 * sent.double() - 1
    read = torch.einsum("nrj,tij->tnri", signs, answers)
    read += noise * torch.randn(read.shape, generator=generator, dtype=torch.float64)
    return read * signs, sent, answers


def errors(agreement: Tensor, sent: Tensor, answers: Tensor) -> tuple[float, float]:
    """Mean squared distance of readings to what rows answer to their own bits: as they are, and cleared."""
    own = answers.diagonal(dim1=1, dim2=2)[:, None, None]
    cleared = without_crosstalk(agreement, sent)
    return float((agreement - own).square().mean()), float((cleared - own).square().mean())


def one_by_one(agreement: Tensor, sent: Tensor) -> Tensor:
    """`without_crosstalk`, by a ridge regression for each reading over all the others."""
    bits = sent.shape[-1]
    signs = 2 * sent.flatten(0, 1).double() - 1
    read = agreement.flatten(1, 2).double() * signs
    cleared = torch.empty_like(read)
    for reading in range(len(signs)):
        others = torch.arange(len(signs)) != reading
        s = signs[others]
        moments = s.T @ s + CROSSTALK_RIDGE * bits * torch.eye(bits)
        answers = torch.linalg.solve(moments, s.T @ read[:, others])
        for row in range(bits):
            rest = torch.arange(bits) != row
            cleared[:, reading, row] = read[:, reading, row] - signs[reading, rest] @ answers[:, rest, row].T
    return (cleared * signs).view(agreement.shape)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 12), st.integers(0, 99))
def test_each_reading_is_cleared_by_what_the_others_tell(
    images: int, reads: int, bits: int, seed: int
) -> None:
    agreement, sent, _ = readings(images, reads, bits, seed)
    torch.testing.assert_close(without_crosstalk(agreement, sent), one_by_one(agreement, sent))


@given(st.integers(1, 8), st.integers(2, 9), st.integers(0, 99), st.data())
def test_flipping_a_row_of_the_read_out_flips_what_is_left_of_it_and_nothing_else(
    images: int, bits: int, seed: int, data: st.DataObject
) -> None:
    agreement, sent, _ = readings(images, 2, bits, seed)
    flips = torch.tensor(data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=bits, max_size=bits)))
    assert torch.equal(without_crosstalk(agreement * flips, sent), without_crosstalk(agreement, sent) * flips)


def test_answers_to_other_bits_go_and_those_to_the_own_one_stay() -> None:
    before, after = errors(*readings(64, 6, 32, seed=1, noise=0.0))
    assert before > 25
    assert after < 0.1


@pytest.mark.parametrize("noise", [0.5, 3.0, 20.0])
@pytest.mark.parametrize(("images", "reads"), [(8, 6), (8, 2), (128, 6)])
def test_no_reading_gets_much_worse_however_few_there_are(images: int, reads: int, noise: float) -> None:
    before, after = errors(*readings(images, reads, 32, seed=2, noise=noise))
    assert after < 1.5 * before
