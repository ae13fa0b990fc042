"""One view of an image tower as a sequence of blocks on one residual stream: stem, blocks, what comes after.

Nothing here imports timm, open_clip, transformers or torchvision. Tower and blocks are found by structure
(`towers`); how the blocks are called (layout of the stream, further arguments, final norm, last linear layer)
is found by running the tower on a few random images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activemark_fast.dress import copied, hindrance, unwrapped
from activemark_fast.normalisation import Preprocess
from activemark_fast.towers import (
    FEWEST_BLOCKS,
    LOOKED_FOR,
    NotAViTError,
    Stop,
    evaluating,
    feed,
    find_towers,
    first_fact,
    first_matrix,
    pair,
    random_images,
    shape_of,
    whole,
)

__all__ = ["Backbone", "Layer", "NotAViTError", "evaluating", "non_finite_tensor"]

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# What images are normalised with where the model itself does not say.
_FAMILY_NORMALISATION = {"timm": _HALF, "open_clip": _CLIP, "transformers": _HALF, "torchvision": _IMAGENET}
_MODEL_TYPE_NORMALISATION = {"clip": _CLIP, "dino": _IMAGENET, "deit": _IMAGENET}

_REGISTERS = (
    "num_reg_tokens",
    "num_register_tokens",
    "config.num_register_tokens",
    "reg_token",
    "register_tokens",
)
Layer = nn.Linear | nn.Conv2d
"""What writes to the residual stream: a linear layer or a 1 x 1 convolution."""

_MEANS = ("image_mean", "pretrained_cfg.mean")
_STDS = ("image_std", "pretrained_cfg.std")


@dataclass(frozen=True, eq=False)
class _Call:
    """How a block was called: its residual stream, by position or by name, and what else."""

    stream: str | None
    more: tuple[Any, ...]
    named: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, _Call]:
        """The stream that a block is called with, and the rest."""
        if args:
            return args[0], cls(None, args[1:], kwargs)
        name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
        rest = {key: value for key, value in kwargs.items() if key != name}
        return None if name is None else kwargs[name], cls(name, (), rest)

    def tensors(self) -> Iterator[Tensor]:
        """All that a block is called with besides its stream."""
        return _tensors([self.more, self.named])

    def run(self, block: Callable[..., Any], stream: Tensor) -> Tensor:
        """What the block makes of another stream."""
        if self.stream is None:
            return _hidden(block(stream, *self.more, **self.named))
        return _hidden(block(**{self.stream: stream}, **self.named))


@dataclass(eq=False)
class _Visit:
    """One call of a block while the whole tower runs.

    Attributes:
        path: name of its list.
        index: its place in it.
        call: how it was called.
        shape: of the stream that it took.
        keeps: whether it returned one of the same shape.
        follows: whether it took what the block before it in the list had just returned.
        packed: what it returned in a tuple beside the stream, None for what holds tensors; None where it
            returned no tuple.
        begun: how many calls of layers had been noted before it.
        ended: and after it.
    """

    path: str
    index: int
    call: _Call
    shape: torch.Size
    follows: bool
    begun: int
    keeps: bool = False
    packed: tuple[Any, ...] | None = None
    ended: int = 0


class Backbone:
    """One view of an image tower. Refers to the live modules, copies nothing.

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
        ValueError: there is no such `tower`.
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
            raise ValueError(f"tower: wanted one of {', '.join(map(repr, found))}, got {tower!r}")
        self.towers = tuple(found)
        self.tower = self.towers[0] if tower is None else tower
        chosen = found[self.tower]
        self.encoder = chosen.module
        self.image_size: tuple[int, int] = chosen.image_size
        self._lists = chosen.lists
        self._like = first_matrix(next(iter(chosen.lists.values()))[0])
        with evaluating(self.encoder), torch.no_grad():
            self._probe()
            owners = [*chosen.owners[:-1], *_path(self.encoder, self.blocks[0])]
            self.family = _family(owners)
            self.mean, self.std = _normalisation(owners, self.family)
            tokens = self._probe_stem()
        self.num_tokens: int = tokens.shape[1]
        self.width: int = tokens.shape[2]
        self.prefix_tokens = self._count_prefix(tokens)
        registers = first_fact(list(reversed(owners)), _REGISTERS, _token_count) or 0
        self.has_class_token: bool = self.prefix_tokens > registers

    def __repr__(self) -> str:
        return (
            f"Backbone({self.family}, depth={self.depth}, width={self.width}, num_tokens={self.num_tokens}, "
            f"prefix_tokens={self.prefix_tokens}, image_size={self.image_size})"
        )

    def of_copy(self, device: torch.device, shared: bool = False) -> Backbone:
        """A view of a copy of the tower, in eval mode and on `device`.

        shared: with the same parameters and buffers.
        """
        kept = (*self.encoder.parameters(), *self.encoder.buffers()) if shared else ()
        tower = copied(self.encoder, {id(tensor): tensor for tensor in kept}).eval().to(device)
        return Backbone(tower, image_size=self.image_size, tower="")

    def renew(self) -> None:
        """Looks again at what may change with the model's weights; call it after loading others in place.

        Raises:
            NotAViTError: the model can no longer be seen so; no token depends on the image, for example.
        """
        with evaluating(self.encoder), torch.no_grad():
            if any(True for calls in self._calls.values() for call in calls for _ in call.tensors()):
                self._calls.clear()  # what blocks are called with may be made of weights
            self.prefix_tokens = self._count_prefix(self._probe_stem())

    @property
    def device(self) -> torch.device:
        """Where the first block's parameters are."""
        return first_matrix(self.blocks[0]).device

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
        return self.batch_first(self._reach(images)[0], len(images))

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
        stream = self._native(tokens)
        for run, call in zip(self._runs[start:stop], calls[start:stop], strict=True):
            stream = call.run(run, stream)
        return self.batch_first(stream, batch)

    def compiled(self) -> Backbone:
        """A view of the same model whose `run` compiles blocks, alike ones once, when they are first run."""
        view = copy.copy(self)
        view._runs = [torch.compile(block) for block in self.blocks]
        return view

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
        if not self._goes_on:
            rows = tokens.flatten(0, 1) if isinstance(self.norm, nn.BatchNorm1d) else tokens
            return self.norm(rows).view_as(tokens)

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            raise Stop(output)

        images = torch.zeros(len(tokens), 3, *self.image_size, device=tokens.device, dtype=self.dtype)
        handle = self.norm.register_forward_hook(stop)
        with self._bypassing(self._native(tokens)), _removing([handle]):
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
        return self._rows(values, batch, self._channels_first)

    def hidden(self, layer: Layer, values: Tensor, batch: int) -> Tensor:
        """(B, N, C) of what `layer`, a `carrier` or `attention_out`, takes or makes for `batch` images."""
        return self._rows(values, batch, isinstance(layer, nn.Conv2d))

    def carrier(self, index: int) -> Layer:
        """The live linear layer, or 1 x 1 convolution, of block `index` that adds to the residual stream.

        It is the one with the most inputs, of several the last: not that of attention or of an adapter.

        Raises:
            ValueError: there is no such block, or no linear layer of it maps to `width`.
        """
        if not 0 <= index < self.depth:
            raise ValueError(f"index: wanted 0 <= index < {self.depth}, got {index}")
        called = [layer for layer in self._layers.get(index, []) if layer not in self._within]
        if not called:
            raise ValueError(f"block {index} called no torch.nn.Linear that maps to its width, {self.width}")
        widest = max(layer.weight.shape[1] for layer in called)
        return [layer for layer in called if layer.weight.shape[1] == widest][-1]

    def gated(self, index: int) -> bool:
        """Whether what `carrier(index)` takes is a product of two layers' outputs, as in a SwiGLU.

        Told by their widths: of the layers of the block that take the stream, those whose outputs fill the
        carrier's inputs fill them twice.

        Raises:
            ValueError: as `carrier`.
        """
        hidden = self.mlp_matrix(index).shape[1]
        taking = [layer.weight for layer in self.blocks[index].modules() if isinstance(layer, Layer)]
        made = [len(weight) for weight in taking if weight.shape[1] == self.width]
        return hidden != self.width and sum(size for size in made if size % hidden == 0) >= 2 * hidden

    def attention_out(self, index: int) -> tuple[Layer, Tensor] | None:
        """The live linear layer by which block `index` writes to the residual stream before `carrier` does.

        Found by structure: of the layers to `width` that are called before the carrier, and whose output,
        while the carrier is silenced, adds to the block's output channel by channel, the one with the most
        inputs, of several the last.

        Returns:
            The layer, and what one unit of its output adds, (width,) as of `mlp_gain`; None where there is
            none.

        Raises:
            ValueError: there is no such block, or it has no carrier.
        """
        last = self.carrier(index)
        layers = self._layers[index]
        before = layers[layers.index(last) - 1 :: -1] if layers[0] is not last else []
        for layer in sorted(before, key=lambda layer: -layer.weight.shape[1]):
            gain = self._gain(index, layer, silent=last)
            if gain is not None and bool(gain.any()):
                return layer, gain
        return None

    @contextmanager
    def inputs_of(self, layer: Layer, stop: bool = False) -> Iterator[list[Tensor]]:
        """A list to which each run of the block adds what `layer` takes, as `hidden` takes it.

        layer: as `carrier` or `attention_out` gives it. That of a torch.nn.MultiheadAttention is applied
        without a call; while the list is there it is the identity inside, and is applied to what comes out.
        stop: let each run end there, with `Stop`.
        """
        seen: list[Tensor] = []
        attention = self._within.get(layer)

        def note(taken: Tensor) -> None:
            seen.append(taken)
            if stop:
                raise Stop

        if attention is None:
            hooks = [layer.register_forward_pre_hook(lambda _module, args: note(args[0]))]
        else:
            linear = attention.out_proj
            weight, bias = linear.weight, linear.bias
            same = nn.Parameter(torch.eye(*weight.shape, out=torch.empty_like(weight)), requires_grad=False)
            zero = None if bias is None else nn.Parameter(torch.zeros_like(bias), requires_grad=False)

            def before(_module: nn.Module, _args: Any) -> None:
                linear.weight, linear.bias = same, zero

            def after(_module: nn.Module, _args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
                linear.weight, linear.bias = weight, bias
                note(output[0])
                return linear(output[0]), output[1]

            hooks = [attention.register_forward_pre_hook(before)]
            hooks.append(attention.register_forward_hook(after))
        try:
            with _removing(hooks):
                yield seen
        finally:
            if attention is not None:  # a run may have failed half way
                linear.weight, linear.bias = weight, bias

    def mlp_out(self, index: int) -> nn.Linear:
        """`carrier(index)`, for what takes no convolution.

        Raises:
            ValueError: as `carrier`, or it is a convolution.
        """
        layer = self.carrier(index)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"block {index} ends in a convolution, wanted a torch.nn.Linear")
        return layer

    def mlp_matrix(self, index: int) -> Tensor:
        """(width, H), a live view of the weight of `carrier(index)`."""
        return self.carrier(index).weight.flatten(1)

    def mlp_gain(self, index: int) -> Tensor:
        """What one unit of `carrier(index)`'s output adds to the block's output, for each channel.

        It is the LayerScale, or ones. Read off as the derivative of the block's output, which no cancellation
        blurs; a second, random cotangent checks that the block adds that layer channel by channel.

        Returns:
            (width,), float32 or wider, on the model's device.

        Raises:
            ValueError: there is no such block, or it is not pre-norm residual.
        """
        gain = self._gain(index, self.carrier(index))
        if gain is None:
            raise ValueError(
                f"block {index} is not pre-norm residual: its output is not the residual stream plus a "
                f"per-channel multiple of its last linear layer (a norm, a nonlinearity or another order of "
                "tokens comes after)"
            )
        return gain

    def _gain(self, index: int, layer: Layer, silent: Layer | None = None) -> Tensor | None:
        """As `mlp_gain`, of any linear layer of a block; None where it does not add channel by channel.

        silent: a layer whose output is taken for 0.
        """
        generator = torch.Generator().manual_seed(index)
        shape = (1, self.num_tokens, self.width)
        tokens = torch.randn(shape, generator=generator).to(self.device, self.dtype)
        signs = (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(self.device)
        written: list[Tensor] = []

        def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
            written.append(_hidden(output).detach().requires_grad_())
            made = written[-1].clone()  # a LayerScale may work in place, which a leaf forbids
            return (made, *output[1:]) if isinstance(output, tuple) else made

        block = self.blocks[index]
        hooks = [self._within.get(layer, layer).register_forward_hook(cut)]
        if silent is not None:
            hooks.append(
                silent.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
            )
        with evaluating(block), _removing(hooks), torch.enable_grad():
            output = self.run(tokens, index, index + 1)
        if len(written) != 1 or not output.requires_grad:
            return None
        (plain,) = torch.autograd.grad(
            output, written, torch.ones_like(output), retain_graph=True, allow_unused=True
        )
        (signed,) = torch.autograd.grad(output, written, signs.to(output.dtype), allow_unused=True)
        if plain is None or signed is None:
            return None
        wide = torch.promote_types(plain.dtype, torch.float32)
        if written[0].numel() != self.num_tokens * self.width:
            return None
        plain, signed = (
            self.hidden(layer, part, 1).reshape(-1, self.width).to(wide) for part in (plain, signed)
        )
        gain = plain[0]
        tolerance = torch.finfo(written[0].dtype).eps ** 0.5
        expected = signs.reshape(-1, self.width) * gain
        if not (
            torch.allclose(plain, gain.expand_as(plain), rtol=tolerance, atol=0)
            and torch.allclose(signed, expected, rtol=tolerance, atol=0)
        ):
            return None
        return gain.clone()

    def _check_tokens(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[2] != self.width:
            raise ValueError(f"tokens: wanted a tensor of shape (B, N, {self.width}), got {_kind(tokens)}")

    def _rows(self, values: Tensor, batch: int, channels_first: bool) -> Tensor:
        if channels_first and values.ndim == 4:
            values = values.movedim(1, -1)
        elif self._sequence_first and values.ndim == 3:
            values = values.transpose(0, 1)
        return values.reshape(batch, -1, values.shape[-1])

    def _native(self, tokens: Tensor) -> Tensor:
        """(B, N, D) in the model's own layout."""
        if self._sequence_first:
            return tokens.transpose(0, 1).contiguous()
        shape = list(self._shape)
        shape[self._batch_axis] *= len(tokens)
        values = tokens.reshape(shape)
        return values.movedim(-1, 1).contiguous() if self._channels_first else values

    def _described(self) -> str:
        return f"{len(self.blocks)} blocks {type(self.blocks[0]).__name__} in {type(self.encoder).__name__}"

    def _noise(self, batch: int) -> Tensor:
        return random_images(batch, self.image_size, self._like)

    def _reach(self, images: Tensor) -> tuple[Tensor, _Call]:
        """What enters block 0 in the model's own layout, and how it is called."""

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise Stop(*_Call.of(args, kwargs))

        with _removing([self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)]):
            try:
                feed(self.encoder, images)
            except Stop as stopped:
                stream, call = stopped.carried
                return stream, call
        raise NotAViTError(f"{self._described()}: the forward pass did not call them again")

    def _calls_for(self, batch: int) -> list[_Call]:
        """How the blocks are called for so many images."""
        key = batch if self._by_batch else 0
        if key not in self._calls:
            calls: list[_Call] = []

            def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.append(_Call.of(args, kwargs)[1])
                if len(calls) == self.depth:
                    raise Stop

            handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
            bypassed = self._bypassing(None)
            with evaluating(self.encoder), bypassed, _removing(handles), torch.no_grad(), suppress(Stop):
                feed(self.encoder, self._noise(batch).to(self.device))
            self._calls[key] = calls
        return self._calls[key]

    @contextmanager
    def _bypassing(self, stream: Tensor | None) -> Iterator[None]:
        """Blocks return what they are given for a while, the last one `stream` if there is one."""

        def passing(block: nn.Module, packed: tuple[Any, ...] | None) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                value = _Call.of(args, kwargs)[0]
                if stream is not None and block is self.blocks[-1]:
                    value = stream
                return value if packed is None else (value, *packed)

            return forward

        own = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for block, packed in zip(self.blocks, self._packed, strict=True):
                block.__dict__["forward"] = passing(block, packed)
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                del block.__dict__["forward"]
                if forward is not None:
                    block.__dict__["forward"] = forward

    def _probe(self) -> None:
        """Runs the whole tower once and picks its blocks, their layers and what comes after them."""
        layers: list[tuple[nn.Module, torch.Size]] = []
        visits = self._visits(layers)
        run = _longest_run(visits)
        if len(run) < FEWEST_BLOCKS:
            longest = max(self._lists, key=lambda path: len(self._lists[path]))
            told = f"{len(self._lists[longest])} blocks {type(self._lists[longest][0]).__name__}"
            why = _why_no_run([visit for visit in visits if visit.path == longest])
            raise NotAViTError(
                f"looked for {LOOKED_FOR}; found {told} in {type(self.encoder).__name__}, {why}"
            )
        members = self._lists[run[0].path]
        self.blocks = tuple(members[visit.index] for visit in run)
        self.depth = len(self.blocks)
        self._runs: Sequence[Callable[..., Any]] = self.blocks
        self._packed = [visit.packed for visit in run]
        self._calls: dict[int, list[_Call]] = {}
        two = run[0].shape
        one, call_of_one = self._reach(self._noise(1))
        self._find_layout(one.shape, two)
        alone, together, blank = (
            list(call.tensors()) for call in (call_of_one, run[0].call, self._reach(0 * self._noise(2))[1])
        )
        if not all(map(torch.equal, together, blank)):
            raise NotAViTError(
                "looked for blocks whose further arguments do not depend on the image; found "
                f"{self._described()}"
            )
        self._by_batch = [t.shape for t in alone] != [t.shape for t in together]
        if not self._by_batch:
            self._calls[0] = [visit.call for visit in run]
        width = two[1 if self._channels_first else -1]
        self._layers: dict[int, list[Layer]] = {}  # of each block, in the order of their last calls
        self._within: dict[nn.Module, nn.MultiheadAttention] = {}  # what applies a layer without calling it
        for index, visit in enumerate(run):
            called: dict[Layer, None] = {}
            for module, _ in layers[visit.begun : visit.ended]:
                if isinstance(module, nn.MultiheadAttention):
                    self._within[module.out_proj] = module
                layer = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
                if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == width:
                    called.pop(layer, None)
                    called[layer] = None
            self._layers[index] = list(called)
        inside = {module for block in self.blocks for module in block.modules()}
        after = [
            (layer, shape)
            for layer, shape in layers[run[-1].ended :]
            if layer not in inside and not isinstance(layer, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
        ]
        self._goes_on = any(visit.begun >= run[-1].ended for visit in visits) and bool(after)
        at_once = [layer for layer, shape in after if shape[-1] == width and not self._channels_first]
        self.norm: nn.Module = after[-1][0] if self._goes_on else at_once[0] if at_once else nn.Identity()

    def _visits(self, layers: list[tuple[nn.Module, torch.Size]]) -> list[_Visit]:
        """Every call of a block of any list while the tower runs on two images.

        layers: takes every call of a norm, linear layer, 1 x 1 convolution or multi-head attention, with the
            shape it was given.
        """
        visits: list[_Visit] = []
        returned: dict[str, tuple[int, Tensor]] = {}
        handles: list[RemovableHandle] = []

        def enter(path: str, index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                stream, call = _Call.of(args, kwargs)
                before, value = returned.pop(path, (-1, None))
                follows = (
                    isinstance(stream, Tensor)
                    and value is not None
                    and before == index - 1
                    and stream.shape == value.shape
                    and torch.allclose(stream, value, rtol=0, atol=0, equal_nan=True)
                )
                shape = stream.shape if isinstance(stream, Tensor) else torch.Size()
                visits.append(_Visit(path, index, call, shape, follows, len(layers)))

            return hook

        def leave(path: str, index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                visit = next(v for v in reversed(visits) if v.path == path and v.index == index)
                value = _hidden(output)
                visit.keeps = isinstance(value, Tensor) and value.shape == visit.shape and value.ndim >= 2
                if isinstance(output, tuple):
                    visit.packed = tuple(None if any(True for _ in _tensors(v)) else v for v in output[1:])
                visit.ended = len(layers)
                if visit.keeps:
                    returned[path] = (index, value)

            return hook

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                layers.append((module, args[0].shape))

        for path, blocks in self._lists.items():
            for index, block in enumerate(blocks):
                handles.append(block.register_forward_pre_hook(enter(path, index), with_kwargs=True))
                handles.append(block.register_forward_hook(leave(path, index)))
        for module in self.encoder.modules():
            if (
                isinstance(module, nn.Linear | nn.MultiheadAttention)
                or _is_pointwise(module)
                or _is_norm(module)
            ):
                handles.append(module.register_forward_pre_hook(note))
        with _removing(handles):
            try:
                feed(self.encoder, self._noise(2))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise NotAViTError(
                    f"{type(self.encoder).__name__} does not take {shape_of(self.image_size)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return visits

    def _find_layout(self, one: torch.Size, two: torch.Size) -> None:
        """How the residual stream lies, from its shapes for one image and for two."""
        grown = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
        axis = grown[0] if len(grown) == 1 else -1
        self._sequence_first = len(one) == 3 and axis == 1 and one[1] == 1
        packed = axis >= 0 and two[axis] == 2 * one[axis] and all(size == 1 for size in one[:axis])
        if not (self._sequence_first or packed):
            raise NotAViTError(
                f"looked for {LOOKED_FOR}; found {self._described()}, called with {tuple(one)} for one "
                f"image and {tuple(two)} for two"
            )
        widths = {p.numel() for p in self.blocks[0].parameters() if p.ndim == 1}
        square = self.image_size[0] == self.image_size[1]
        self._channels_first = len(one) == 4 and (
            one[3] not in widths or (one[1] in widths and square and one[1] != one[2])
        )
        self._batch_axis = axis
        self._shape = torch.Size((one[0], *one[2:], one[1])) if self._channels_first else one

    def _probe_stem(self) -> Tensor:
        """Block 0's input for two images, (2, N, D)."""
        return self.batch_first(self._reach(self._noise(2))[0], 2)

    def _count_prefix(self, tokens: Tensor) -> int:
        varies = (tokens[0] != tokens[1]).any(dim=1).tolist()
        if True not in varies:
            raise NotAViTError(
                f"no token that enters the blocks of {type(self.encoder).__name__} depends on the image"
            )
        return varies.index(True)


def _longest_run(visits: Sequence[_Visit]) -> list[_Visit]:
    """The longest sequence of blocks with one residual stream, of several the last."""
    often = {(visit.path, visit.index) for n, visit in enumerate(visits)} & {
        (visit.path, visit.index)
        for n, visit in enumerate(visits)
        if any((v.path, v.index) == (visit.path, visit.index) for v in visits[:n])
    }
    best: list[_Visit] = []
    for path in dict.fromkeys(visit.path for visit in visits):
        run: list[_Visit] = []
        for visit in (v for v in visits if v.path == path):
            if not visit.keeps or (path, visit.index) in often:
                run = []
                continue
            run = [*run, visit] if visit.follows and run else [visit]
            if len(run) >= len(best):
                best = run
    return best


def _why_no_run(visits: Sequence[_Visit]) -> str:
    """What keeps the blocks of a list from being a sequence on one residual stream."""
    order = [visit.index for visit in visits]
    if not order:
        return "which the forward pass does not call"
    if order != sorted(set(order)):
        return f"which are called as {order}, not once each, in order"
    changed = next((v for v in visits if not v.keeps), None)
    if changed is not None:
        return (
            f"of which block {changed.index} returns another shape than the {tuple(changed.shape)} it takes"
        )
    apart = next((v.index for v in visits[1:] if not v.follows), 0)
    return f"of which block {apart} does not take what the one before returned"


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def _is_norm(module: nn.Module) -> bool:
    """By its name; a norm and a linear layer in one module is none."""
    mixed = any(isinstance(child, nn.Linear | nn.Conv2d) for child in module.children())
    return "norm" in type(module).__name__.lower() and not mixed


def _norm_width(norm: nn.Module) -> int:
    """Channels that a norm works on."""
    return max((p.numel() for p in norm.parameters(recurse=False)), default=1)


def _channels_last(values: Tensor, norm: nn.Module) -> Tensor:
    """What a norm returned, with its channels last."""
    first = values.ndim == 4 and values.shape[1] == _norm_width(norm) != values.shape[-1]
    return values.movedim(1, -1) if first else values


def _path(encoder: nn.Module, block: nn.Module) -> list[nn.Module]:
    """The modules from the encoder down to what holds a block."""
    name = next(name for name, module in encoder.named_modules() if module is block)
    owners = [encoder]
    for part in name.split(".")[:-1]:
        owners.append(owners[-1].get_submodule(part))
    return owners


def non_finite_tensor(model: nn.Module) -> str | None:
    """Name of the first tensor in the model's state with a NaN or an infinity, or None."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            least, most = tensor.aminmax()  # NaN where there is one; needs no memory
            if not bool(torch.isfinite(least) & torch.isfinite(most)):
                return name
    return None


@contextmanager
def _removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _family(owners: Sequence[nn.Module]) -> str:
    for owner in reversed(owners):
        for base in type(owner).__mro__:
            package = base.__module__.partition(".")[0]
            if package in _FAMILY_NORMALISATION:
                return package
    return "structure"


def _normalisation(
    owners: Sequence[nn.Module], family: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean, std = first_fact(owners, _MEANS, _triple), first_fact(owners, _STDS, _triple)
    if mean is not None and std is not None:
        return mean, std
    if family == "transformers":
        model_type = first_fact(list(reversed(owners)), ("config.model_type",), str)
        for prefix, constants in _MODEL_TYPE_NORMALISATION.items():
            if model_type is not None and model_type.startswith(prefix):
                return constants
    return _FAMILY_NORMALISATION.get(family, _HALF)


def _token_count(value: Any) -> int | None:
    """Of a number of tokens, or of the tokens themselves, (..., tokens, width)."""
    return value.shape[-2] if isinstance(value, Tensor) and value.ndim >= 2 else whole(value)


def _triple(value: Any) -> tuple[float, float, float] | None:
    if not isinstance(value, tuple | list) or len(value) != 3:
        return None
    return float(value[0]), float(value[1]), float(value[2])


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return type(value).__name__
