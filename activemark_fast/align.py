"""Undoes what an attacker can do to a residual stream without changing the model's function.

Blocks only ever see the stream through layer norms and linear layers. So its channels can be permuted, or,
once the norms' weights and biases are folded into the layers behind them, rotated by any orthogonal map that
fixes the all-ones vector (which layer norm takes out), and all of it can be scaled: what is written into the
stream is changed one way, what reads it the other way. The function stays, the directions of a mark move. So
does it where the stream gets more channels and the map goes into a subspace of them: one that keeps lengths.

The map is found from clean activations of the suspect and of the original, on images made for nothing else.
It is a function of these and never sees the signs of the read-out P, so flipping a row of P still flips that
bit's scores and nothing else: the sign-flip p-value of the aligned reading is exact for a suspect that was
made without the key. But the original's activations come from the owner. Whoever chooses them chooses the
map, and with it directions that any model answers to: an aligned reading is evidence against a distrusted
owner only if the watermark was committed to before the suspect was published.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.key import Key
from activemark_fast.marking.suffix import Autocast, site_activations
from activemark_fast.normalisation import Preprocess
from activemark_fast.site import Site
from activemark_fast.synthetic import synthetic_images

MIN_IMAGES = 16
ROWS_PER_CHANNEL = 4
"""Tokens sampled for each channel of the stream: half fit the map, half tell how good it is."""
EXPLAINED_WELL = 0.5
"""Share of the suspect's variance from which a map is worth a reading."""
SIMPLER = 3.0
"""A simpler kind of map may leave this many times as much unexplained as the best one, and
`NEGLIGIBLE` more."""
NEGLIGIBLE = 1e-4
UNDECIDED = 1e-9
"""Directions that share less of the products than this are held to be the same in both."""
NEWTON_STEPS = 20

Kind = Literal["identity", "permutation", "rotation"]


@dataclass(frozen=True, eq=False)
class Alignment:
    """How a suspect's residual stream lies to the original's: theirs = scale * ours @ matrix.

    Attributes:
        kind: the simplest kind of map that explains the suspect about as well as any.
        matrix: (D, D') float32, from the original's channels to the suspect's; orthogonal where these are as
            many, else its rows are orthonormal, or its columns where the suspect has fewer.
        scale: median length of the suspect's tokens over the original's.
        explained: share of the suspect's variance which the map explains, on tokens it was not fitted to.
    """

    kind: Kind
    matrix: Tensor
    scale: float
    explained: float

    @property
    def worthwhile(self) -> bool:
        """Whether the map explains the suspect well and a reading without it would differ."""
        moved = self.kind != "identity" or not 0.5 < self.scale < 2  # other widths are never "identity"
        return moved and self.explained >= EXPLAINED_WELL


@torch.no_grad()
def site_sample(
    backbone: Backbone,
    key: Key,
    site: Site,
    preprocess: Preprocess,
    autocast: Autocast,
    images: Tensor | None = None,
) -> Tensor:
    """(n, D) float32 on the model's device: its clean activations at the site, some tokens of some images.

    The images are made from the key for this alone; whoever samples many models makes them once
    (`sample_images`), and may sample some of them. The same tokens are taken of every image, image by image,
    about 4 D of all images.
    """
    images = sample_images(key, site, preprocess) if images is None else images
    allowed = np.array(site.patch_tokens)
    per_image = math.ceil(ROWS_PER_CHANNEL * site.width / _image_count(site))
    chosen = key.stream("alignment/tokens").permutation(len(allowed))[:per_image]
    tokens = np.sort(allowed[chosen])
    output = site_activations(backbone, images, site.block, autocast).output
    return output[:, torch.from_numpy(tokens).to(output.device)].flatten(0, 1).float()


def sample_images(key: Key, site: Site, preprocess: Preprocess) -> Tensor:
    """(count, 3, H, W) float32, model input: what `site_sample` runs, at least 16 images."""
    count = _image_count(site)
    return preprocess(synthetic_images(key.stream("alignment/images"), count, preprocess.size))


def _image_count(site: Site) -> int:
    return max(MIN_IMAGES, math.ceil(ROWS_PER_CHANNEL * site.width / len(site.patch_tokens)))


def best_explained(original: Tensor, suspect: Tensor) -> float:
    """The share of the suspect's variance that the best of all orthogonal maps and scales explains.

    It is fitted and judged on the same tokens: a map that is found on more of them explains less. The Q with
    the largest <ours Q, theirs> reaches the sum of the singular values of ours^T theirs (Schönemann 1966),
    which it takes no Q to compute. NaN where the suspect's sample is not finite.

    Args:
        original: (n, D), what `site_sample` took from the original.
        suspect: (n, D'), what it takes from the suspect, on the same device.
    """
    ours, theirs = _without_mean(original), _without_mean(suspect)
    products = ours.T @ theirs
    if not bool(torch.isfinite(products).all()):
        return math.nan
    squares = torch.linalg.eigvalsh(products.T @ products).clamp(min=0)  # faster than singular values
    reached = squares.sqrt().sum() ** 2 / ours.square().sum()
    return 1 - float((theirs.square().sum() - reached) / (theirs - theirs.mean(dim=0)).square().sum())


def find_alignment(original: Tensor, suspect: Tensor) -> Alignment | None:
    """The map between two samples of the same tokens; None where the suspect's is constant or not finite.

    An assignment of channels (least squares over permutations) and an orthogonal map (Procrustes) are fitted
    to the first half of the tokens and judged, beside no map at all, by the second half.

    Args:
        original: (n, D), what `site_sample` took from the original.
        suspect: (n, D'), what it takes from the suspect, on the same device.
    """
    ours, theirs = _without_mean(original), _without_mean(suspect)
    half = len(ours) // 2
    variance = float((theirs - theirs.mean(dim=0))[half:].square().sum())
    length = float(theirs.norm(dim=1).median())
    if not (math.isfinite(variance) and variance > 0 and length > 0):
        return None
    scale = length / float(ours.norm(dim=1).median())
    identity, same_width = torch.eye(ours.shape[1]).to(ours), ours.shape == theirs.shape
    fits: dict[Kind, Callable[[Tensor], Tensor]] = {"identity": lambda _: identity} if same_width else {}
    fits |= {"permutation": _assignment, "rotation": _procrustes}
    first = ours[:half].T @ theirs[:half]
    unexplained = {
        kind: float((theirs[half:] - scale * ours[half:] @ fit(first)).square().sum()) / variance
        for kind, fit in fits.items()
    }
    enough = SIMPLER * min(unexplained.values()) + NEGLIGIBLE
    kind = next(kind for kind, left in unexplained.items() if left <= enough)
    return Alignment(kind, fits[kind](ours.T @ theirs).float(), scale, 1 - unexplained[kind])


def _without_mean(sample: Tensor) -> Tensor:
    """float64, each token less its mean over the channels, which no layer behind a layer norm sees."""
    rows = sample.double()
    return rows - rows.mean(dim=1, keepdim=True)


def _assignment(products: Tensor) -> Tensor:
    """The permutation matrix Q with the largest <ours Q, theirs>, from products = ours^T theirs (D, D').

    Of other widths, every channel of the fewer has one of the others.
    """
    from scipy.optimize import linear_sum_assignment  # scipy takes longer to import than all the rest

    rows, columns = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    matrix = torch.zeros_like(products)
    matrix[torch.from_numpy(rows), torch.from_numpy(columns)] = 1
    return matrix


def _procrustes(products: Tensor) -> Tensor:
    """The orthogonal matrix Q with the largest <ours Q, theirs> (Schönemann 1966), from ours^T theirs.

    It is the orthogonal factor of the polar decomposition, by Newton's method with scaling (Higham,
    Functions of Matrices, 2008, algorithm 8.20), which on a GPU takes less time than a singular value
    decomposition. What the tokens leave open, such as the all-ones vector, stays as it is. Of products that
    are not square it is taken by a singular value decomposition.
    """
    if products.shape[0] != products.shape[1]:
        left, _, right = torch.linalg.svd(products, full_matrices=False)
        return left @ right
    matrix = products + UNDECIDED * products.norm() * torch.eye(len(products)).to(products)
    for _ in range(NEWTON_STEPS):
        inverse = torch.linalg.inv(matrix).T
        balance = (inverse.norm() / matrix.norm()).sqrt()
        last, matrix = matrix, (balance * matrix + inverse / balance) / 2
        if bool((matrix - last).norm() <= 1e-8 * matrix.norm()):
            break
    return matrix
