"""Which layers of a tower's blocks write to its residual stream, and what a unit of their output adds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from activemark_fast.backbone.calls import hidden_of, removing
from activemark_fast.backbone.probe import Layer
from activemark_fast.backbone.sequence import BlockSequence
from activemark_fast.dress import copied
from activemark_fast.following import placed
from activemark_fast.towers import Stop, evaluating


class Backbone(BlockSequence):
    """A tower's blocks, and the layers by which each of them writes to the residual stream."""

    def of_copy(self, device: torch.device, shared: bool = False) -> Backbone:
        """A view of a copy of the tower, in eval mode and on `device`.

        shared: with the same parameters and buffers.
        """
        kept = (*self.encoder.parameters(), *self.encoder.buffers()) if shared else ()
        tower = copied(self.encoder, {id(tensor): tensor for tensor in kept}).eval()
        return Backbone(placed(tower, device), image_size=self.image_size, tower="")

    def compiled(self) -> Backbone:
        """A view of the same model whose `run` compiles blocks, alike ones once, when they are first run."""
        view = copy.copy(self)
        view._runs = [torch.compile(block) for block in self.blocks]
        return view

    def hidden(self, layer: Layer, values: Tensor, batch: int) -> Tensor:
        """(B, N, C) of what `layer`, a `carrier` or `attention_out`, takes or makes for `batch` images."""
        return self._layout.rows(values, batch, isinstance(layer, nn.Conv2d))

    def carrier(self, index: int) -> Layer:
        """The live linear layer, or 1 x 1 convolution, of block `index` that adds to the residual stream.

        It is the one with the most inputs, of several the last: not that of attention or of an adapter.

        Raises:
            ValueError: there is no such block, or no linear layer of it maps to `width`.
        """
        if not 0 <= index < self.depth:
            raise ValueError(f"index: wanted 0 <= index < {self.depth}, got {index}")
        called = [layer for layer in self._probe.layers[index] if layer not in self._probe.within]
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
        layers = self._probe.layers[index]
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
        attention = self._probe.within.get(layer)

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
            with removing(hooks):
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
            written.append(hidden_of(output).detach().requires_grad_())
            made = written[-1].clone()  # a LayerScale may work in place, which a leaf forbids
            return (made, *output[1:]) if isinstance(output, tuple) else made

        block = self.blocks[index]
        hooks = [self._probe.within.get(layer, layer).register_forward_hook(cut)]
        if silent is not None:
            hooks.append(
                silent.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
            )
        with evaluating(block), removing(hooks), torch.enable_grad():
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
