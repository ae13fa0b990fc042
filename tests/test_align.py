from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import vit
from torch import Tensor

from activemark_fast.align import find_alignment, site_sample
from activemark_fast.backbone import Backbone
from activemark_fast.key import Key
from activemark_fast.site import Site
from activemark_fast.triggers import Preprocess

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
