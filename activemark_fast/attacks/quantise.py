"""Quantisation: integer weights, casts to narrow floating-point formats."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from activemark_fast.attacks.matrices import block_matrices
from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled

GROUP = 32
"""Weights that share one scale below 8 bits (as in llama.cpp's and torchao's int4)."""
FLOATS = {16: torch.bfloat16, 8: torch.float8_e4m3fn}


@torch.no_grad()
def quantise(
    model: nn.Module, data: Labelled | None, seed: int, strength: float, *, activations: bool = False
) -> nn.Module:
    """A copy of `model` with the matrices of its blocks rounded to integers and back.

    Symmetric, round to nearest (Jacob et al. 2018): at 8 bits one scale for each row of a matrix, below for
    each group of 32 weights of a row (Yao et al. 2022). The weights are stored back in their own dtype, so
    that the copy is a plain model which computes what the integers would.

    Args:
        model: a plain ViT.
        data: not used.
        seed: not used.
        strength: bits of a weight, 2 to 8.
        activations: also round what enters every linear layer of the blocks to 8 bits, with one scale for
            each token (int8 dynamic quantisation).

    Raises:
        ValueError: `strength` is not 2 to 8.
    """
    bits = int(strength)
    if not 2 <= bits <= 8:
        raise ValueError(f"strength: wanted 2 to 8 bits, got {strength}")
    rounded = copy.deepcopy(model)
    backbone = Backbone(rounded)
    for module, name in block_matrices(backbone):
        weight: Tensor = getattr(module, name)
        grouped = bits < 8 and weight.shape[1] % GROUP == 0
        rows = weight.reshape(-1, GROUP) if grouped else weight
        weight.copy_(_rounded(rows, bits).reshape(weight.shape))
        if activations and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_round_inputs)
    return rounded


@torch.no_grad()
def cast(model: nn.Module, data: Labelled | None, seed: int, strength: float) -> nn.Module:
    """A copy of `model` whose parameters went through a narrow format and back.

    Args:
        model: a plain ViT.
        data: not used.
        seed: not used.
        strength: 16 (bf16, all parameters) or 8 (fp8 e4m3, the blocks' matrices, with one scale each;
            Micikevicius et al. 2022).

    Raises:
        ValueError: another `strength`.
    """
    if strength not in FLOATS:
        raise ValueError(f"strength: wanted 16 or 8 bits, got {strength}")
    dtype = FLOATS[int(strength)]
    narrowed = copy.deepcopy(model)
    if dtype == torch.bfloat16:
        for parameter in narrowed.parameters():
            parameter.copy_(parameter.to(dtype))
        return narrowed
    for module, name in block_matrices(Backbone(narrowed)):
        weight: Tensor = getattr(module, name)
        scale = weight.abs().amax().float().clamp_min(1e-12) / torch.finfo(dtype).max
        weight.copy_((weight / scale).to(dtype).to(weight.dtype) * scale)
    return narrowed


def _rounded(values: Tensor, bits: int) -> Tensor:
    """`values` (..., K) on the grid of `bits`-bit signed integers, one scale for each row of K."""
    largest = 2 ** (bits - 1) - 1
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / largest
    return (values / scale).round() * scale


def _round_inputs(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (_rounded(args[0], 8), *args[1:])
