"""One view of every plain vision transformer: stem, blocks, final norm.

Nothing here imports timm, open_clip, transformers or torchvision. The blocks are found by structure; how they
are called (layout of the tokens, further arguments, final norm, last linear layer) is found by running the
model on a few random images.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activemark_fast.triggers import Preprocess

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# What images are normalised with where the model itself does not say.
_FAMILY_NORMALISATION = {"timm": _HALF, "open_clip": _CLIP, "transformers": _HALF, "torchvision": _IMAGENET}
_MODEL_TYPE_NORMALISATION = {"clip": _CLIP, "dino": _IMAGENET, "deit": _IMAGENET}

_IMAGE_TOWERS = ("visual", "vision_model")
_IMAGE_SIZES = (
    "patch_embed.img_size",
    "img_size",
    "image_size",
    "input_resolution",
    "config.image_size",
    "pretrained_cfg.input_size",
)
_REGISTERS = (
    "num_reg_tokens",
    "num_register_tokens",
    "config.num_register_tokens",
    "reg_token",
    "register_tokens",
)
_MEANS = ("image_mean", "pretrained_cfg.mean")
_STDS = ("image_std", "pretrained_cfg.std")
_FEWEST_BLOCKS = 3
_LOOKED_FOR = "a list of at least 3 blocks of one class that take and return (batch, tokens, width)"


class NotAViTError(ValueError):
    """The model is not a plain ViT; the message says what was looked for and what was found."""


class _StemDone(Exception):
    """Carries what block 0 was called with out of the encoder's forward pass."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_of_block = args
        self.kwargs_of_block = kwargs


class Backbone:
    """One view of a plain ViT: stem, blocks, final norm. Refers to the live modules, copies nothing.

    Building one runs the model on a few random images, in eval mode and without gradients, on the model's
    device and in its dtype; the training flags are restored. Masks and the like which the model hands to its
    blocks are kept from that run: build a new view after moving the model to another device or dtype.

    Args:
        model: any module whose forward takes images (B, 3, H, W), or which holds such a module as `visual` or
            `vision_model`.
        image_size: (height, width) in pixels; by default what the model says of itself.

    Attributes:
        model: what was given.
        encoder: the module whose forward takes images.
        family: "timm", "open_clip", "transformers", "torchvision" or "structure".
        blocks: the live blocks, in order.
        norm: the live final norm; `nn.Identity` where the model has none.
        depth, width, num_tokens: number of blocks, of channels, of tokens for `image_size`.
        prefix_tokens: how many tokens before the patches do not depend on the image (class, registers).
        has_class_token: whether token 0 is a class token.
        image_size: (height, width) in pixels.
        mean, std: what the channels of the model's images, in [0, 1], are normalised with.

    Raises:
        TypeError: `model` is not a module, or `image_size` not a pair of integers.
        NotAViTError: the model is not a plain ViT, or its image size is not known.
    """

    def __init__(self, model: nn.Module, *, image_size: tuple[int, int] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
        if image_size is not None and _pair(image_size) != image_size:
            raise TypeError(
                f"image_size: wanted a pair (height, width) of positive integers, got {image_size!r}"
            )
        self.model = model
        self.encoder = _image_tower(model)
        owners, self.blocks = _find_blocks(self.encoder)
        self._runs: Sequence[Callable[..., Any]] = self.blocks
        self.depth = len(self.blocks)
        self.family = _family(owners)
        self.image_size: tuple[int, int] = image_size or self._own_image_size(owners)
        self.mean, self.std = _normalisation(owners, self.family)
        self._sequence_first = False
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._linears: dict[int, list[nn.Linear]] = {}  # of each block, in the order they are called
        self._within: dict[nn.Linear, nn.MultiheadAttention] = {}  # what applies a layer without calling it
        self.norm: nn.Module = nn.Identity()
        with evaluating(self.encoder), torch.no_grad():
            tokens = self._probe_stem()
            self.num_tokens: int = tokens.shape[1]
            self.width: int = tokens.shape[2]
            self.prefix_tokens = self._count_prefix(tokens)
            self._probe_blocks()
        registers = _first_fact(reversed(owners), _REGISTERS, _token_count) or 0
        self.has_class_token: bool = self.prefix_tokens > registers

    def __repr__(self) -> str:
        return (
            f"Backbone({self.family}, depth={self.depth}, width={self.width}, num_tokens={self.num_tokens}, "
            f"prefix_tokens={self.prefix_tokens}, image_size={self.image_size})"
        )

    def renew(self) -> None:
        """Looks again at what may change with the model's weights; call it after loading others in place.

        Raises:
            NotAViTError: the model is no longer a plain ViT; no token depends on the image, for example.
        """
        with evaluating(self.encoder), torch.no_grad():
            self.prefix_tokens = self._count_prefix(self._probe_stem())
            if any(True for _ in _tensors(self._calls)):  # what blocks are called with may be made of weights
                self._calls.clear()
                self._probe_blocks()

    @property
    def device(self) -> torch.device:
        """Where the first block's parameters are."""
        return self._first_matrix().device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first block's matrices (norms may be kept wider)."""
        return self._first_matrix().dtype

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
        tokens, _, _ = self._reach_block_0(images)
        return self.batch_first(tokens)

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
        tokens = self.batch_first(tokens)
        for run, (args, kwargs) in zip(self._runs[start:stop], self._calls[start:stop], strict=True):
            tokens = _hidden(run(tokens, *args, **kwargs))
        return self.batch_first(tokens)

    def compiled(self) -> Backbone:
        """A view of the same model whose `run` compiles blocks, alike ones once, when they are first run."""
        view = copy.copy(self)
        view._runs = [torch.compile(block) for block in self.blocks]
        return view

    def features(self, tokens: Tensor) -> Tensor:
        """The model's final features: each token through the final norm, then pooled. Differentiable.

        Args:
            tokens: (B, N, width), what leaves the last block.

        Returns:
            (B, F, width): the class token, if there is one, and the mean of the patch tokens; F is 2 or 1.

        Raises:
            ValueError: `tokens` has another shape.
        """
        self._check_tokens(tokens)
        tokens = self.norm(tokens)
        pooled = tokens[:, self.prefix_tokens :].mean(dim=1)
        return torch.stack([tokens[:, 0], pooled] if self.has_class_token else [pooled], dim=1)

    def batch_first(self, tokens: Tensor) -> Tensor:
        """Swaps batch and tokens of what a block takes or makes, where the blocks take (N, B, width).

        Its own inverse: (N, B, ...) → (B, N, ...) and back; for other models it changes nothing.
        """
        return tokens.transpose(0, 1).contiguous() if self._sequence_first else tokens

    def mlp_out(self, index: int) -> nn.Linear:
        """The live linear layer of block `index` whose output is added to the residual stream last.

        Raises:
            ValueError: there is no such block, or no linear layer of it maps to `width`.
        """
        if not 0 <= index < self.depth:
            raise ValueError(f"index: wanted 0 <= index < {self.depth}, got {index}")
        called = self._linears.get(index, [])
        if not called or called[-1] in self._within:
            raise ValueError(f"block {index} called no torch.nn.Linear that maps to its width, {self.width}")
        return called[-1]

    def attention_out(self, index: int) -> tuple[nn.Linear, Tensor] | None:
        """The live linear layer by which block `index` writes to the residual stream before `mlp_out` does.

        Found by structure: the last linear layer of the block to `width` whose output, while `mlp_out` is
        silenced, adds to the block's output channel by channel.

        Returns:
            The layer, and what one unit of its output adds, (width,) as of `mlp_gain`; None where there is
            none.

        Raises:
            ValueError: there is no such block, or it has no `mlp_out`.
        """
        last = self.mlp_out(index)
        for linear in reversed(self._linears[index][:-1]):
            gain = self._gain(index, linear, silent=last)
            if gain is not None and bool(gain.any()):
                return linear, gain
        return None

    @contextmanager
    def inputs_of(self, linear: nn.Linear) -> Iterator[list[Tensor]]:
        """A list to which each run of the block adds what `linear` takes, (..., in_features).

        linear: as `mlp_out` or `attention_out` gives it. That of a torch.nn.MultiheadAttention is applied
        without a call; while the list is there it is the identity inside, and is applied to what comes out.
        """
        seen: list[Tensor] = []
        attention = self._within.get(linear)
        if attention is None:
            hooks = [linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))]
        else:
            weight, bias = linear.weight, linear.bias
            same = nn.Parameter(torch.eye(*weight.shape, out=torch.empty_like(weight)), requires_grad=False)
            zero = None if bias is None else nn.Parameter(torch.zeros_like(bias), requires_grad=False)

            def before(_module: nn.Module, _args: Any) -> None:
                linear.weight, linear.bias = same, zero

            def after(_module: nn.Module, _args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
                linear.weight, linear.bias = weight, bias
                seen.append(output[0])
                return linear(output[0]), output[1]

            hooks = [attention.register_forward_pre_hook(before)]
            hooks.append(attention.register_forward_hook(after))
        try:
            with _removing(hooks):
                yield seen
        finally:
            if attention is not None:  # a run may have failed half way
                linear.weight, linear.bias = weight, bias

    def mlp_gain(self, index: int) -> Tensor:
        """What one unit of `mlp_out(index)`'s output adds to the block's output, for each channel.

        It is the LayerScale, or ones. Read off as the derivative of the block's output, which no cancellation
        blurs; a second, random cotangent checks that the block adds that layer channel by channel.

        Returns:
            (width,), float32 or wider, on the model's device.

        Raises:
            ValueError: there is no such block, or it is not pre-norm residual.
        """
        gain = self._gain(index, self.mlp_out(index))
        if gain is None:
            raise ValueError(
                f"block {index} is not pre-norm residual: its output is not the residual stream plus a "
                f"per-channel multiple of its last linear layer"
            )
        return gain

    def _gain(self, index: int, linear: nn.Linear, silent: nn.Linear | None = None) -> Tensor | None:
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
        hooks = [self._within.get(linear, linear).register_forward_hook(cut)]
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
        plain, signed = plain.reshape(-1, self.width).to(wide), signed.reshape(-1, self.width).to(wide)
        gain = plain[0]
        tolerance = torch.finfo(written[0].dtype).eps ** 0.5
        expected = signs.reshape(-1, self.width) * gain
        if not (
            torch.allclose(plain, gain.expand_as(plain), rtol=tolerance, atol=0)
            and torch.allclose(signed, expected, rtol=tolerance, atol=0)
        ):
            return None
        return gain.clone()

    def _first_matrix(self) -> Tensor:
        parameters = [p for p in self.blocks[0].parameters() if p.is_floating_point()]
        return max(parameters, key=lambda p: p.ndim)

    def _check_tokens(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[2] != self.width:
            raise ValueError(f"tokens: wanted a tensor of shape (B, N, {self.width}), got {_kind(tokens)}")

    def _own_image_size(self, owners: Sequence[nn.Module]) -> tuple[int, int]:
        size = _first_fact(reversed(owners), _IMAGE_SIZES, _pair)
        if size is None:
            raise NotAViTError(
                f"image_size: not given, and {self._described()} has none of {', '.join(_IMAGE_SIZES)}"
            )
        return size

    def _reach_block_0(self, images: Tensor) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _StemDone(args, kwargs)

        with _removing([self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)]):
            try:
                self.encoder(images)
            except _StemDone as done:
                return self._split_call(done.args_of_block, done.kwargs_of_block)
        raise NotAViTError(
            f"looked for {_LOOKED_FOR}; found {self._described()}, which the forward pass does not call"
        )

    def _split_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            found = _kind(args[0]) if args else "no positional argument"
            raise NotAViTError(f"looked for {_LOOKED_FOR}; found {self._described()}, called with {found}")
        return args[0], args[1:], kwargs

    def _described(self) -> str:
        return f"{self.depth} blocks {type(self.blocks[0]).__name__} in {type(self.encoder).__name__}"

    def _probe_images(self, batch: int) -> Tensor:
        images = torch.randn(batch, 3, *self.image_size, generator=torch.Generator().manual_seed(batch))
        return images.to(self.device, self.dtype)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (NotAViTError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise NotAViTError(
                f"{type(self.encoder).__name__} does not take images of shape (B, 3, {self.image_size[0]}, "
                f"{self.image_size[1]}): {type(error).__name__}: {error}"
            ) from error

    def _probe_stem(self) -> Tensor:
        """Find the layout and return block 0's input for two images, (2, N, D)."""
        one, args_one, kwargs_one = self._guarded(lambda: self._reach_block_0(self._probe_images(1)))
        two, args_two, kwargs_two = self._guarded(lambda: self._reach_block_0(self._probe_images(2)))
        grown = [axis for axis in range(3) if one.shape[axis] != two.shape[axis]]
        if grown not in ([0], [1]):
            raise NotAViTError(
                f"looked for {_LOOKED_FOR}; found {self._described()}, called with {_kind(one)} for one "
                f"image and {_kind(two)} for two"
            )
        extras_one, extras_two = (
            list(_tensors((args_one, kwargs_one))),
            list(_tensors((args_two, kwargs_two))),
        )
        if [t.shape for t in extras_one] != [t.shape for t in extras_two]:
            raise NotAViTError(
                f"looked for blocks whose further arguments do not depend on the batch; found "
                f"{self._described()}, called with {', '.join(_kind(t) for t in extras_two)} for two images"
            )
        self._sequence_first = grown == [1]
        return self.batch_first(two)

    def _count_prefix(self, tokens: Tensor) -> int:
        varies = (tokens[0] != tokens[1]).any(dim=1).tolist()
        if True not in varies:
            raise NotAViTError(
                f"no token that enters the blocks of {type(self.encoder).__name__} depends on the image"
            )
        return varies.index(True)

    def _probe_blocks(self) -> None:
        """Run the whole encoder once and note how it calls its blocks, and what it calls after them."""
        order: list[int] = []
        outputs: list[Tensor] = []
        norms: list[nn.Module] = []

        def enter(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                tokens, more, named = self._split_call(args, kwargs)
                if outputs and not torch.allclose(outputs[-1], tokens, rtol=0, atol=0, equal_nan=True):
                    raise NotAViTError(
                        f"looked for blocks each of which takes what the one before returned; found "
                        f"{self._described()}, of which block {index} does not"
                    )
                order.append(index)
                self._calls.append((more, named))

            return hook

        def leave(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                tokens = _hidden(output)
                if not isinstance(tokens, Tensor) or tokens.shape != args[0].shape:
                    raise NotAViTError(
                        f"looked for {_LOOKED_FOR}; found {self._described()}, of which block {index} turns "
                        f"{_kind(args[0])} into {_kind(tokens)}"
                    )
                outputs[:] = [tokens]

            return hook

        def note_linear(index: int) -> Callable[..., None]:
            def hook(module: nn.Linear | nn.MultiheadAttention, _args: Any) -> None:
                called = self._linears.setdefault(index, [])
                if isinstance(module, nn.MultiheadAttention):
                    linear: nn.Linear = module.out_proj
                    self._within[linear] = module
                else:
                    linear = module
                if linear in called:
                    called.remove(linear)
                called.append(linear)

            return hook

        def note_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
            tokens = args[0] if args else None
            if len(order) == self.depth and isinstance(tokens, Tensor) and tokens.shape[-1] == self.width:
                norms.append(module)

        handles: list[RemovableHandle] = []
        inside: set[nn.Module] = set()
        for index, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
            handles.append(block.register_forward_hook(leave(index)))
            for module in block.modules():
                inside.add(module)
                last = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
                if isinstance(last, nn.Linear) and last.out_features == self.width:
                    handles.append(module.register_forward_pre_hook(note_linear(index)))
        for module in self.encoder.modules():
            if module not in inside and "norm" in type(module).__name__.lower():
                handles.append(module.register_forward_pre_hook(note_norm))
        with _removing(handles):
            self._guarded(lambda: self.encoder(self._probe_images(2)))
        if order != list(range(self.depth)):
            raise NotAViTError(
                f"looked for blocks called once each, in order; found {self._described()}, called as {order}"
            )
        if norms:
            self.norm = norms[0]


def non_finite_tensor(model: nn.Module) -> str | None:
    """Name of the first tensor in the model's state with a NaN or an infinity, or None."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every submodule's training flag is put back."""
    training = [m for m in module.modules() if m.training]  # few or none: setting a flag is slow
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _image_tower(model: nn.Module) -> nn.Module:
    for name in _IMAGE_TOWERS:
        tower = getattr(model, name, None)
        if isinstance(tower, nn.Module):
            return _image_tower(tower)
    return model


def _find_blocks(encoder: nn.Module) -> tuple[list[nn.Module], tuple[nn.Module, ...]]:
    """The modules from the encoder down to the longest list of blocks, and the blocks."""
    found: dict[str, tuple[nn.Module, ...]] = {}
    for name, module in encoder.named_modules():
        nested = any(name.startswith(f"{outer}." if outer else "") for outer in found)
        if nested or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = [c for c in module if type(c) not in (nn.Sequential, nn.ModuleList)]
        common = Counter(type(c) for c in children).most_common(1)
        if common and common[0][1] >= _FEWEST_BLOCKS:
            blocks = tuple(c for c in children if type(c) is common[0][0])
            if any(p.is_floating_point() for p in blocks[0].parameters()):
                found[name] = blocks
    longest = max((len(blocks) for blocks in found.values()), default=0)
    names = [name for name, blocks in found.items() if len(blocks) == longest]
    if len(names) != 1:
        lists = f"{len(names)} such lists of {longest} ({', '.join(names)})" if names else "none"
        raise NotAViTError(f"looked for {_LOOKED_FOR}; found {lists} in {type(encoder).__name__}")
    owners = [encoder]
    for part in names[0].split(".") if names[0] else []:
        owners.append(owners[-1].get_submodule(part))
    return owners, found[names[0]]


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
    mean, std = _first_fact(owners, _MEANS, _triple), _first_fact(owners, _STDS, _triple)
    if mean is not None and std is not None:
        return mean, std
    if family == "transformers":
        model_type = _first_fact(owners, ("config.model_type",), str)
        for prefix, constants in _MODEL_TYPE_NORMALISATION.items():
            if model_type is not None and model_type.startswith(prefix):
                return constants
    return _FAMILY_NORMALISATION.get(family, _HALF)


def _first_fact(
    owners: Iterator[nn.Module] | Sequence[nn.Module], paths: Sequence[str], read: Callable[[Any], Any]
) -> Any:
    """The first of the attributes `paths` of the first of the owners that `read` understands, or None."""
    for owner in owners:
        for path in paths:
            value: Any = owner
            for part in path.split("."):
                value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
            fact = None if value is None else read(value)
            if fact is not None:
                return fact
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _token_count(value: Any) -> int | None:
    """Of a number of tokens, or of the tokens themselves, (..., tokens, width)."""
    return value.shape[-2] if isinstance(value, Tensor) and value.ndim >= 2 else _whole(value)


def _pair(value: Any) -> tuple[int, int] | None:
    """A size in pixels as (height, width), from one number, (height, width) or (channels, height, width)."""
    sizes = (
        [value, value]
        if isinstance(value, int)
        else list(value)[-2:]
        if isinstance(value, tuple | list)
        else []
    )
    if len(sizes) != 2 or not all(_whole(s) for s in sizes):
        return None
    return sizes[0], sizes[1]


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
