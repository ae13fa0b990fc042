"""Whether a model's weights are numbers."""

from __future__ import annotations

import torch
from torch import nn


def non_finite_tensor(model: nn.Module) -> str | None:
    """Name of the first tensor in the model's state with a NaN or an infinity, or None."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            least, most = tensor.aminmax()  # NaN where there is one; needs no memory
            if not bool(torch.isfinite(least) & torch.isfinite(most)):
                return name
    return None
