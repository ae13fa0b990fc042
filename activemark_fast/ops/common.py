"""What the operators share: where they run, and what their arguments must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from activemark_fast.ops.bits import words_for

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AXES = {"token": 1, "channel": 2}
"""Dimension of (images, tokens, width) on which a channel of the learned codec is an index."""


class Perceptron(NamedTuple):
    """Two linear layers of the learned codec, with ReLU between, in any floating-point dtype."""

    weight1: Tensor  # (hidden, inputs)
    bias1: Tensor  # (hidden,)
    weight2: Tensor  # (outputs, hidden)
    bias2: Tensor  # (outputs,)


PERCEPTRON_SCHEMA = ", ".join(f"Tensor {name}" for name in Perceptron._fields)
GRADIENTS_SCHEMA = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
"""Of what `perceptron_backward` returns."""


def runs_in_triton(stream: Tensor) -> bool:
    """Whether the Triton kernels take a residual stream: in half or single precision, on a CUDA device."""
    return stream.is_cuda and stream.dtype in KERNEL_DTYPES


def in_full_precision(stream: Tensor) -> torch.autocast:
    """The context of the PyTorch implementations: what they multiply must not be rounded by autocast."""
    return torch.autocast(stream.device.type, enabled=False)


def compute_dtype(stream: Tensor) -> torch.dtype:
    """What is accumulated in: float32, and float64 for a stream in float64."""
    return torch.promote_types(stream.dtype, torch.float32)


def perceptron(inputs: Tensor, layers: Perceptron) -> tuple[Tensor, Tensor]:
    """(images, inputs), in the dtype that is computed in → the hidden layer and the outputs."""
    weight1, bias1, weight2, bias2 = (tensor.to(inputs.dtype) for tensor in layers)
    with in_full_precision(inputs):
        hidden = torch.relu(inputs @ weight1.T + bias1)
        return hidden, hidden @ weight2.T + bias2


def perceptron_backward(
    grad: Tensor,  # (images, outputs)
    inputs: Tensor,  # (images, inputs)
    hidden: Tensor,  # (images, hidden)
    layers: Perceptron,
) -> tuple[Tensor, Perceptron]:
    """Gradients to the inputs, in their dtype, and to the layers, each in its own."""
    with in_full_precision(inputs):
        inner = (grad @ layers.weight2.to(grad.dtype)) * (hidden > 0)
        to_inputs = inner @ layers.weight1.to(grad.dtype)
        gradients = (inner.T @ inputs, inner.sum(dim=0), grad.T @ hidden, grad.sum(dim=0))
    to_layers = (gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, layers, strict=True))
    return to_inputs, Perceptron(*to_layers)


def perceptron_backward_fake(
    channel: Tensor,  # (images, length)
    layers: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Tensors shaped as the gradients to a channel and to the layers."""
    return channel.new_empty(channel.shape), *map(torch.empty_like, layers)


def check_stream(name: str, stream: Tensor) -> None:
    """Raises TypeError or ValueError if `stream` is no (images, tokens, width) of a floating-point dtype."""
    if not isinstance(stream, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor, got {type(stream).__name__}")
    if not stream.is_floating_point():
        raise TypeError(f"{name}: wanted a real floating-point dtype, got {stream.dtype}")
    if stream.dim() != 3:
        raise ValueError(f"{name}: wanted the shape (images, tokens, width), got {tuple(stream.shape)}")


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device
) -> None:
    """Raises TypeError or ValueError if `tensor` has not this shape and dtype on this device.

    Args:
        name: of the argument.
        tensor: its value.
        shape: wanted; -1 stands for any size but 0.
        dtype: wanted; None stands for any real floating-point dtype.
        device: wanted.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor, got {type(tensor).__name__}")
    if dtype is None and not tensor.is_floating_point():
        raise TypeError(f"{name}: wanted a real floating-point dtype, got {tensor.dtype}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: wanted {dtype}, got {tensor.dtype}")
    fits = tensor.dim() == len(shape) and all(
        size == wanted or (wanted == -1 and size > 0)
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{name}: wanted the shape ({wanted}), got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: wanted a tensor on {device}, got one on {tensor.device}")


def check_keyed(stream: Tensor, directions: Tensor, scale: Tensor, slots: Tensor) -> None:
    """Raises TypeError or ValueError if the arguments of the keyed codec do not fit its stream."""
    check_tensor("directions", directions, (-1, stream.shape[2]), None, stream.device)
    check_tensor("scale", scale, (), None, stream.device)
    check_tensor("slots", slots, (-1,), torch.int64, stream.device)
    for name, tensor in (("directions", directions), ("scale", scale)):
        if tensor.requires_grad:
            raise ValueError(f"{name}: wanted a tensor that needs no gradient: nothing keyed is trained")


def check_words(name: str, words: Tensor, images: int, bits: int, stream: Tensor) -> None:
    """Raises TypeError or ValueError if `words` holds no packed messages of `images` images."""
    check_tensor(name, words, (images, words_for(bits)), torch.int32, stream.device)


def check_channel(stream: Tensor, index: int, axis: str) -> int:
    """The length of a channel. Raises TypeError or ValueError for an axis or an index that is not there."""
    if axis not in AXES:
        raise ValueError(f"axis: wanted 'token' or 'channel', got {axis!r}")
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"index: wanted int, got {type(index).__name__}")
    size = stream.shape[AXES[axis]]
    if not 0 <= index < size:
        raise ValueError(f"index: wanted 0 to {size - 1}, got {index}")
    return stream.shape[3 - AXES[axis]]


def check_perceptron(name: str, layers: Perceptron, inputs: int, outputs: int, stream: Tensor) -> None:
    """Raises TypeError or ValueError if `layers` have not so many inputs and outputs (-1: any)."""
    check_tensor(f"{name}.weight1", layers.weight1, (-1, inputs), None, stream.device)
    hidden = layers.weight1.shape[0]
    check_tensor(f"{name}.bias1", layers.bias1, (hidden,), None, stream.device)
    check_tensor(f"{name}.weight2", layers.weight2, (outputs, hidden), None, stream.device)
    check_tensor(f"{name}.bias2", layers.bias2, (layers.weight2.shape[0],), None, stream.device)
