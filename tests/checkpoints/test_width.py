"""What is narrowed computes what it did: stream, heads, MLPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_plan import Known, carried, streams, target, timm_clip, timm_vit
from tiny import longer_heads, more_heads, padded
from torch import Tensor, nn

from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints.plan import plans

WIDTH = 32


def angles(view: Backbone) -> Tensor:
    """Products of all tokens as layer norms see them, after three blocks: no turn changes them."""
    tokens = streams(view).flatten(0, 1)
    tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
    return tokens @ tokens.T / tokens.shape[1]


def by_head(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries, keys and values, sorted by head first."""
    return rows.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def test_a_padded_stream_and_longer_heads() -> None:
    source = timm_vit(1)
    with torch.no_grad():
        source.norm.weight.fill_(1)
        source.norm.bias.fill_(0)
    for width, how in ((40, "zero"), (64, "twice"), (48, "turned")):
        state = longer_heads(padded(source.state_dict(), width, how), 4, 2)
        loaded, plan = carried(state, timm_vit(2))
        torch.testing.assert_close(angles(loaded.backbone), angles(Backbone(source)), rtol=1e-3, atol=1e-3)
        assert plan.fit.doubts == (
            f"a residual stream of {width} channels, wanted 32",
            "an attention of 40 channels, wanted 32",
        )
        assert plan.fit.converted.keys() == set(plan.fit.doubts)


def test_more_heads_that_rows_are_sorted_by() -> None:
    """Five heads of 8, or four of 10: the weights do not tell, so there is a plan for each."""
    source = timm_vit(1)
    state = {}
    for name, tensor in more_heads(source.state_dict(), 4).items():
        if ".attn.qkv." in name:  # as Megatron keeps them
            name, tensor = name.replace("attn.qkv", "self_attention.linear_qkv"), by_head(tensor, 5)
        state[name] = tensor
    loaded = target(timm_vit(2))
    known = {name: Known(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    every = plans(loaded.wanted, known)
    assert [plan.depth for plan in every] == [3, 3]
    same = []
    for plan in every:
        loaded.load(plan.tensors(state))
        loaded.fill(plan.neutral)
        same.append(torch.allclose(streams(loaded.backbone), streams(Backbone(source)), rtol=1e-3, atol=1e-3))
    assert sorted(same) == [False, True]


def test_a_narrower_stream_is_computed_as_it_is() -> None:
    source = timm_vit(1, embed_dim=24, num_heads=3, mlp_ratio=4)  # heads of 8, as the model's
    loaded, plan = carried(source.state_dict(), timm_vit(2))
    assert plan.fit.doubts == ("a residual stream of 24 channels, wanted 32",)
    torch.testing.assert_close(angles(loaded.backbone), angles(Backbone(source)), rtol=1e-3, atol=1e-3)


def test_channels_behind_a_norm_are_chosen() -> None:
    source = timm_clip(1)
    state: dict[str, Any] = source.state_dict()
    doubled = {}
    for name, tensor in state.items():
        reads = name.endswith(("qkv.weight", "fc1.weight"))
        writes = "norm" in name or name.endswith(("proj.weight", "proj.bias", "fc2.weight", "fc2.bias"))
        axis = 1 if reads else -1 if name in ("cls_token", "pos_embed") else 0
        twice = torch.cat([tensor, tensor], axis) / (1 + reads)
        doubled[name] = twice if reads or writes or axis == -1 else tensor
    loaded, _ = carried(doubled, timm_clip(2))
    torch.testing.assert_close(angles(loaded.backbone), angles(Backbone(source)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_dead_and_broken_weights_of_another_width(value: float) -> None:
    state = {name: torch.full_like(t, value) for name, t in timm_vit(1, embed_dim=40).state_dict().items()}
    loaded, plan = carried(state, timm_vit(2))
    assert plan.depth == 3
    first = loaded["blocks.0.mlp.fc2.weight"]
    assert bool((first == 0).all()) if value == 0 else not bool(torch.isfinite(first).all())


def test_what_cannot_be_narrowed_is_left_as_it_was() -> None:
    for source, model in (
        (timm_vit(1, embed_dim=96), timm_vit(2)),  # too wide
        (timm_vit(1, embed_dim=16), timm_vit(2)),  # too narrow
        (
            timm_vit(1, embed_dim=40, qkv_bias=False),
            timm_vit(2, qkv_bias=False),
        ),  # nothing to fold a bias into
        (timm_vit(1, embed_dim=40, num_heads=5, qk_norm=True), timm_vit(2, qk_norm=True)),
    ):
        plan = carried(source.state_dict(), model)[1]
        assert plan.depth == 0
        assert "wanted (32" in plan.fit.why["patch_embed.proj.weight"]
