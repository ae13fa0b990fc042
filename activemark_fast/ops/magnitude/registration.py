"""The operator behind `op`, registered with PyTorch: schema, fake, and what runs where."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from activemark_fast.ops.magnitude.native import (
    has_cuda,
    magnitudes_cpu,
    magnitudes_cuda,
    max_top_cuda,
    takes,
)
from activemark_fast.ops.magnitude.reference import Outputs, magnitudes_reference
from activemark_fast.ops.registry import register_compiled

_WITHOUT_CUDA = (
    "activemark_fast was built without CUDA: PyTorch sorts the magnitudes of a CUDA tensor, which is slow; "
    "install it where nvcc is found, or with ACTIVEMARK_CUDA=on to see why it is not"
)


def _fake(x: Tensor, k: int) -> Outputs:
    images = x.shape[0]
    return (
        x.new_empty(images, k, dtype=torch.float32),
        x.new_empty(images, k, dtype=torch.int64),
        x.new_empty(images, dtype=torch.float32),
        x.new_empty(images, dtype=torch.float32),
        x.new_empty(images, dtype=torch.int64),
    )


def _on_cpu(x: Tensor, k: int) -> Outputs:
    return magnitudes_cpu(x, k) if takes(x) else magnitudes_reference(x, k)


def _on_cuda(x: Tensor, k: int) -> Outputs:
    if not takes(x):
        return magnitudes_reference(x, k)
    if not has_cuda():
        warnings.warn(_WITHOUT_CUDA, RuntimeWarning, stacklevel=1)
        return magnitudes_reference(x, k)
    return magnitudes_cuda(x, k) if k <= max_top_cuda() else magnitudes_reference(x, k)


register_compiled(
    "magnitudes(Tensor x, int k) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=magnitudes_reference,
    cpu=_on_cpu,
    cuda=_on_cuda,
)
