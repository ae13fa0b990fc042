"""Readings of a mark: what was sent, what came back, and the scores of each row.

A model answers along each row of the read-out to what is sent along all of them: *crosstalk*, on a real model
half again as large as all else that blurs a reading. It is much the same on every image, so the readings
themselves tell it, and it is taken out of them, as a decorrelating detector does (Lupas and Verdú 1989).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.codec import Codec
from activemark_fast.codec.codebooks import Codebook
from activemark_fast.marking.suffix import BATCH, Autocast, SiteActivations, read_mark
from activemark_fast.p_value import bit_scores
from activemark_fast.ranks import ALONE, Ranks
from activemark_fast.site import Site

CROSSTALK_RIDGE = 0.5
"""Identity term of the regression that tells the crosstalk, over the number of bits: about the variance of
what else is in a reading over that of all crosstalk."""


@dataclass(frozen=True, eq=False)
class Channel:
    """One codec and what is sent through it.

    Attributes:
        codec: on the backbone's device.
        sent: (n, reads, M) of 0 and 1, on the same device: what each image carries at each of its readings.
    """

    codec: Codec
    sent: Tensor

    def agreement(
        self,
        backbone: Backbone,
        activations: SiteActivations,
        start: int,
        block: int,
        autocast: Autocast,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """(taps, k, reads, M): the logits of k images from `start` on, above 0 where they read what was sent.

        activations: of these k images at the site.
        ranks: the processes that read it together.
        """
        images = len(activations)
        sent = self.sent[start : start + images].transpose(0, 1)

        def some(messages: Tensor) -> list[Tensor]:
            reads = len(messages)
            many = SiteActivations(*(part.repeat(reads, 1, 1) for part in vars(activations).values()))
            read = read_mark(backbone, self.codec, many, messages.flatten(0, 1), block, autocast)
            logits = torch.stack([at_tap.logits for at_tap in read.values()]).unflatten(1, (reads, images))
            return [logits * (2 * messages.to(logits.dtype) - 1)]

        at_once = max(1, BATCH // images) if ranks.count == 1 else 1  # as many tasks as there can be to share
        tasks = [partial(some, messages) for messages in sent.split(at_once)]
        return torch.cat([part for (part,) in ranks.each(tasks, backbone.device)], dim=1).transpose(1, 2)

    def cleared(self, agreement: Tensor) -> Tensor:
        """`agreement` of the first images less crosstalk, where the codec is a codebook; float64.

        agreement: (taps, k, reads, M), what `agreement` returned for the first k images and readings.
        """
        if not isinstance(self.codec, Codebook):
            return agreement
        _, images, reads, _ = agreement.shape
        return without_crosstalk(agreement, self.sent[:images, :reads])


@torch.no_grad()
def passive_pairs(
    backbone: Backbone, output: Tensor, site: Site, autocast: Autocast
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each block from the site to the last tap, with its input and output: (n, P, D) float32, patch tokens.

    output: (n, N, D), of the site's block for clean images.
    """
    patches = slice(site.prefix_tokens, None)
    for block in range(site.block + 1, site.taps[-1] + 1):
        with autocast(backbone.dtype):
            before, output = output, backbone.run(output, block, block + 1)
        yield block, before[:, patches].float(), output[:, patches].float()


def without_crosstalk(agreement: Tensor, sent: Tensor) -> Tensor:
    """Takes out of each reading what its row answers to the other bits.

    Row by row a ridge regression of its readings on all that was sent, for each reading without that one,
    says what the row answers to each bit. It sees the readings of one row at a time and is linear in them, so
    flipping the sign of a row of P flips what is left of its readings and changes no other: the sign-flip
    p-value stays exact.

    Args:
        agreement: (taps, n, reads, M), of `Channel.agreement`.
        sent: (n, reads, M) of 0 and 1.

    Returns:
        (taps, n, reads, M) float64.
    """
    signs = 2 * sent.flatten(0, 1).double() - 1  # (N, M)
    bits = signs.shape[1]
    read = agreement.double().flatten(1, 2) * signs  # (taps, N, M)
    ridge = CROSSTALK_RIDGE * bits * torch.eye(bits, dtype=torch.float64, device=signs.device)
    influence = torch.linalg.solve(signs.T @ signs + ridge, signs.T).T  # (N, M)
    answers = influence.T @ read  # (taps, M, M), to each bit of each row
    left = read - signs @ answers
    own = influence * signs
    leverage = own.sum(dim=1, keepdim=True)
    # To the other bits, less what the reading itself told of that (the Sherman-Morrison formula).
    crosstalk = read - left - signs * answers.diagonal(dim1=1, dim2=2)[:, None]
    crosstalk -= (leverage - own) * left / (1 - leverage)
    return ((read - crosstalk) * signs).view(agreement.shape)


def wrong_bits(agreement: Tensor) -> Tensor:
    """(taps, n, reads, M) → (taps, n): bits of an image's message that its readings together get wrong."""
    return (~(agreement.mean(dim=2) > 0)).sum(dim=-1)


def row_scores(agreements: Sequence[Tensor]) -> list[int]:
    """Of some channels: the scores of each row over images and readings (`bit_scores`)."""
    sent = torch.ones((), dtype=torch.int64)  # an agreement has the sign of what was sent in it already
    return [s for part in agreements for tap in part for s in bit_scores(tap.flatten(0, 1), sent)]
