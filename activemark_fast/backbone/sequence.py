"""An image tower as a sequence of blocks on one residual stream: stem, blocks, what comes after.

Nothing here imports timm, open_clip, transformers or torchvision. Tower and blocks are found by structure
(`towers`); how the blocks are called (layout of the stream, further arguments, final norm, last linear layer)
is found by running the tower on a few random images (`probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from activemark_fast.backbone.calls import Call, bypassing, removing
from activemark_fast.backbone.family import family_of, normalisation_of, owners_of, register_tokens
from activemark_fast.backbone.probe import enter, probe
from activemark_fast.dress import hindrance, unwrapped
from activemark_fast.following import computed_on
from activemark_fast.normalisation import Preprocess
from activemark_fast.towers import (
    NoSuchTowerError,
    NotAViTError,
    Stop,
    evaluating,
    feed,
    find_towers,
    first_matrix,
    pair,
    random_images,
)


class BlockSequence:
    """An image tower as a stem, blocks, and what comes after. Refers to the live modules, copies nothing.

    The *blocks* are the longest sequence of blocks of one class, each of which takes what the one before
    returned and keeps its shape: all blocks of a plain ViT, those of one stage of a hierarchical model.
    The residual stream between them is seen as (B, N, D) here, whatever its layout: sequences, maps with the
    channels first or last, patches of several images packed into one sequence.

    Building one runs the tower on a few random images, in eval mode and without gradients, on its device and
    in its dtype; the training flags are restored. Masks and the like which the tower hands to its blocks are
    kept from that run: build a new view after moving the model to another device or dtype.

    Args:
        model: any module that takes images (B, 3, H, W), or holds modules that do.
        image_size: (height, width) in pixels; by default what the tower says of itself, else 224 x 224.
        tower: dotted name of the module in `model` that is to be seen; by default, of those that take images,
            the one with the longest list of blocks.

    Attributes:
        model: what was given.
        towers: dotted names of all modules in `model` that take images and hold blocks; "" is the model.
        tower: which of them is seen.
        encoder: that module.
        family: "timm", "open_clip", "transformers", "torchvision" or "structure".
        blocks: the live blocks, in order.
        norm: the live final norm; `nn.Identity` where the tower has none.
        depth, width, num_tokens: number of blocks, of channels, of tokens for `image_size`.
        prefix_tokens: how many tokens before the patches do not depend on the image (class, registers).
        has_class_token: whether token 0 is a class token.
        image_size: (height, width) in pixels.
        mean, std: what the channels of the model's images, in [0, 1], are normalised with.

    Raises:
        TypeError: `model` is not a module, or `image_size` not a pair of integers.
        NotAViTError: nothing in the model can be seen so.
        NoSuchTowerError: there is no such `tower`.
    """

    def __init__(
        self, model: nn.Module, *, image_size: tuple[int, int] | None = None, tower: str | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
        if image_size is not None and pair(image_size) != image_size:
            raise TypeError(
                f"image_size: wanted a pair (height, width) of positive integers, got {image_size!r}"
            )
        self.model = model
        model = unwrapped(model)
        hindered = hindrance(model)
        if hindered is not None:
            raise NotAViTError(f"model: {hindered}")
        found = {one.name: one for one in find_towers(model, image_size)}
        if tower is not None and tower not in found:
            names = ", ".join(repr(name) if name else "'' (the model itself)" for name in found)
            raise NoSuchTowerError(f"tower: wanted one of {names}, got {tower!r}")
        self.towers = tuple(found)
        self.tower = self.towers[0] if tower is None else tower
        chosen = found[self.tower]
        self.encoder = chosen.module
        self.image_size: tuple[int, int] = chosen.image_size
        self._like = first_matrix(next(iter(chosen.lists.values()))[0])
        with evaluating(self.encoder), torch.no_grad():
            self._probe = probe(self.encoder, chosen.lists, self.image_size, self._like)
            self.blocks = self._probe.blocks
            self.norm = self._probe.norm
            self.depth = len(self.blocks)
            self._layout = self._probe.layout
            self._runs: Sequence[Callable[..., Any]] = self.blocks
            self._calls = {} if self._probe.calls is None else {0: self._probe.calls}
            owners = [*chosen.owners[:-1], *owners_of(self.encoder, self.blocks[0])]
            self.family = family_of(owners)
            self.mean, self.std = normalisation_of(owners, self.family)
            tokens = self._two_stems()
        self.num_tokens: int = tokens.shape[1]
        self.width: int = tokens.shape[2]
        self.prefix_tokens = self._count_prefix(tokens)
        self.has_class_token: bool = self.prefix_tokens > register_tokens(owners)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.family}, depth={self.depth}, width={self.width}, "
            f"num_tokens={self.num_tokens}, prefix_tokens={self.prefix_tokens}, image_size={self.image_size})"
        )

    def renew(self) -> None:
        """Looks again at what may change with the model's weights; call it after loading others in place.

        Raises:
            NotAViTError: the model can no longer be seen so; no token depends on the image, for example.
        """
        with evaluating(self.encoder), torch.no_grad():
            if any(True for calls in self._calls.values() for call in calls for _ in call.tensors()):
                self._calls.clear()  # what blocks are called with may be made of weights
            self.prefix_tokens = self._count_prefix(self._two_stems())

    @property
    def device(self) -> torch.device:
        """Where the first block is computed: where its parameters are, unless they follow."""
        return computed_on(first_matrix(self.blocks[0]).device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first block's matrices (norms may be kept wider)."""
        return first_matrix(self.blocks[0]).dtype

    @property
    def preprocess(self) -> Preprocess:
        """How images become the model's input."""
        return Preprocess(self.image_size, self.mean, self.std)

    def stem(self, images: Tensor) -> Tensor:
        """What enters block 0.

        Args:
            images: (B, 3, H, W) of `image_size`, normalised, in the model's dtype and on its device.

        Returns:
            (B, num_tokens, width).

        Raises:
            TypeError: `images` is not a floating-point tensor.
            ValueError: `images` has another shape.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise TypeError(f"images: wanted a floating-point tensor, got {_kind(images)}")
        if images.ndim != 4 or images.shape[1:] != (3, *self.image_size):
            wanted = f"(B, 3, {self.image_size[0]}, {self.image_size[1]})"
            raise ValueError(f"images: wanted shape {wanted}, got {_kind(images)}")
        return self.batch_first(enter(self.encoder, self.blocks, images)[0], len(images))

    def run(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        """The residual stream after blocks `start` to `stop - 1`, in the mode the blocks are in.

        Args:
            tokens: (B, N, width), what enters block `start`.
            start: index of the first block.
            stop: one more than the index of the last block; 0 <= start <= stop <= depth.

        Returns:
            (B, N, width), what leaves block `stop - 1`.

        Raises:
            ValueError: `tokens` has another shape, or the range of blocks is not within the model.
        """
        self._check_tokens(tokens)
        if not 0 <= start <= stop <= self.depth:
            raise ValueError(f"start, stop: wanted 0 <= start <= stop <= {self.depth}, got {start}, {stop}")
        batch = len(tokens)
        calls = self._calls_for(batch)
        stream = self._layout.native(tokens)
        for run, call in zip(self._runs[start:stop], calls[start:stop], strict=True):
            stream = call.run(run, stream)
        return self.batch_first(stream, batch)

    def final_tokens(self, tokens: Tensor) -> Tensor:
        """What the final norm makes of the residual stream after the last block. Differentiable.

        Of a stage of a hierarchical model the later stages run first, so there may be fewer tokens, of
        another width; one where the norm comes after pooling.

        Args:
            tokens: (B, N, width), what leaves the last block.

        Returns:
            (B, N', D').

        Raises:
            ValueError: `tokens` has another shape.
        """
        self._check_tokens(tokens)
        if not self._probe.goes_on:
            rows = tokens.flatten(0, 1) if isinstance(self.norm, nn.BatchNorm1d) else tokens
            return self.norm(rows).view_as(tokens)

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            raise Stop(output)

        images = torch.zeros(len(tokens), 3, *self.image_size, device=tokens.device, dtype=self.dtype)
        handle = self.norm.register_forward_hook(stop)
        with bypassing(self.blocks, self._probe.packed, self._layout.native(tokens)), removing([handle]):
            try:
                feed(self.encoder, images)
            except Stop as stopped:
                (output,) = stopped.carried
        return _channels_last(output, self.norm).reshape(len(tokens), -1, _norm_width(self.norm))

    def features(self, tokens: Tensor) -> Tensor:
        """The model's final features: `final_tokens`, pooled. Differentiable.

        Args:
            tokens: (B, N, width), what leaves the last block.

        Returns:
            (B, F, D'): the class token, if there is one, and the mean of the patch tokens; F is 2 or 1.

        Raises:
            ValueError: `tokens` has another shape.
        """
        tokens = self.final_tokens(tokens)
        pooled = tokens[:, self.prefix_tokens :].mean(dim=1)
        return torch.stack([tokens[:, 0], pooled] if self.has_class_token else [pooled], dim=1)

    def batch_first(self, values: Tensor, batch: int) -> Tensor:
        """(B, N, C) of the residual stream of `batch` images in the model's own layout."""
        return self._layout.rows(values, batch, self._layout.channels_first)

    def _check_tokens(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[2] != self.width:
            raise ValueError(f"tokens: wanted a tensor of shape (B, N, {self.width}), got {_kind(tokens)}")

    def _noise(self, batch: int) -> Tensor:
        return random_images(batch, self.image_size, self._like)

    def _calls_for(self, batch: int) -> list[Call]:
        """How the blocks are called for so many images."""
        key = batch if self._probe.calls is None else 0
        if key not in self._calls:
            calls: list[Call] = []

            def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.append(Call.of(args, kwargs)[1])
                if len(calls) == self.depth:
                    raise Stop

            handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
            bypassed = bypassing(self.blocks, self._probe.packed, None)
            with evaluating(self.encoder), bypassed, removing(handles), torch.no_grad(), suppress(Stop):
                feed(self.encoder, self._noise(batch).to(self.device))
            self._calls[key] = calls
        return self._calls[key]

    def _two_stems(self) -> Tensor:
        """Block 0's input for two images, (2, N, D)."""
        return self.batch_first(enter(self.encoder, self.blocks, self._noise(2))[0], 2)

    def _count_prefix(self, tokens: Tensor) -> int:
        varies = (tokens[0] != tokens[1]).any(dim=1).tolist()
        if True not in varies:
            raise NotAViTError(
                f"no token that enters the blocks of {type(self.encoder).__name__} depends on the image"
            )
        return varies.index(True)


def _norm_width(norm: nn.Module) -> int:
    """Channels that a norm works on."""
    return max((p.numel() for p in norm.parameters(recurse=False)), default=1)


def _channels_last(values: Tensor, norm: nn.Module) -> Tensor:
    """What a norm returned, with its channels last."""
    first = values.ndim == 4 and values.shape[1] == _norm_width(norm) != values.shape[-1]
    return values.movedim(1, -1) if first else values


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return type(value).__name__
