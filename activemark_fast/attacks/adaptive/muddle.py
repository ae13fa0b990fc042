"""Muddling: what blocks answer to their input is changed at random, where clean images show it least."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from activemark_fast.attacks.adaptive.parts import BATCH, clean_images, victim
from activemark_fast.backbone import evaluating
from activemark_fast.codec.passive import Moments, inputs_and_answers
from activemark_fast.datasets import Labelled

RIDGE = 0.01
"""Identity term of the solve, over the mean diagonal of its matrix."""


@torch.no_grad()
def muddle(
    model: nn.Module,
    data: Labelled | Tensor,
    seed: int,
    strength: float,
    *,
    images: int | None = None,
    first_block: int | None = None,
) -> nn.Module:
    """A copy of `model` whose blocks each answer a random linear map of their input, too.

    That is what the passive band reads (`codec.passive`), done to all pairs of directions at once, as the
    edit would do it: L_y^-T E L_x^-1 with E of Gaussian entries, written into the MLP's last layer by ridge
    regression. Of what moves readings by so much it changes the block's output least.

    Args:
        model: a plain ViT.
        data: clean images.
        seed: of E.
        strength: how much a reading moves, over the root mean square of readings without a mark.
        images: most images to use; by default all.
        first_block: by default a quarter of the depth.

    Raises:
        ValueError: `strength` is not above 0, there is no such block, or no image.
    """
    if not strength > 0:
        raise ValueError(f"strength: wanted more than 0, got {strength}")
    pixels = clean_images(data, images)
    attacked, backbone, first = victim(model, first_block)
    generator = torch.Generator().manual_seed(seed)
    width, patches = backbone.width, slice(backbone.prefix_tokens, None)
    with evaluating(attacked):
        batches = pixels.split(BATCH)
        streams = [backbone.stem(part.to(backbone.device, backbone.dtype)) for part in batches]
        streams = [backbone.run(stream, 0, first) for stream in streams]
        for block in range(first, backbone.depth):
            layer = backbone.carrier(block)
            size = backbone.mlp_matrix(block).shape[1]
            moments = Moments(width, size, backbone.device)
            gram = torch.zeros(size, size, device=backbone.device)
            with backbone.inputs_of(layer) as seen:
                for stream in streams:
                    seen.clear()
                    after = backbone.run(stream, block, block + 1)
                    hidden = backbone.hidden(layer, seen.pop(), len(stream))
                    hidden = hidden.reshape(*stream.shape[:2], -1)[:, patches].flatten(0, 1).float()
                    pair = (part[:, patches].flatten(0, 1) for part in (stream, after))
                    moments.add(*inputs_and_answers(*pair), hidden)
                    gram.addmm_(hidden.T, hidden)
            of_x, of_y = moments.factors
            drawn = torch.randn(width, width, generator=generator, dtype=torch.float64).to(backbone.device)
            inverse = torch.linalg.inv(of_y)
            gain = strength * moments.size * width**0.5 / (inverse @ inverse.T).norm()
            change = gain * inverse.T @ torch.linalg.solve_triangular(of_x, drawn, upper=False, left=False)
            matrix = gram.double() / moments.count
            matrix.diagonal().add_(RIDGE * matrix.diagonal().mean())
            written = (
                torch.linalg.solve(matrix, moments.hidden @ change.T) / backbone.mlp_gain(block).double()
            )
            layer.weight += written.T.view_as(layer.weight).to(layer.weight.dtype)
            streams = [backbone.run(stream, block, block + 1) for stream in streams]
    return attacked
