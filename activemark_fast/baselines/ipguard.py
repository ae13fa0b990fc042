"""IPGuard (Cao, Jia, Gong, AsiaCCS 2021): fingerprints are points near a classifier's decision boundary.

A suspect that gives most of the points the labels the owner's classifier gives them is taken for a copy.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from activemark_fast.baselines.common import Classifier, Cost, Finding, predicted, share_of
from activemark_fast.key import Key
from activemark_fast.progress import Progress

POINTS = 100
MARGIN = 10.0
"""How much more the target's logit should be than the first label's: k in the paper."""
ITERATIONS = 1000
LEARNING_RATE = 1e-3
BATCH = 50


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Points near the decision boundary.

    Attributes:
        points: (n, 3, H, W) float32 in [0, 1].
        labels: (n,) int64, what the owner's classifier says of them.
        cost: what it took to find them.
    """

    points: Tensor
    labels: Tensor
    cost: Cost


def generate(
    model: Classifier,
    key: Key | bytes | str | os.PathLike[str],
    images: object = None,
    *,
    points: int = POINTS,
    margin: float = MARGIN,
    iterations: int = ITERATIONS,
    fraction: float = 1.0,
    progress: bool = False,
) -> Fingerprint:
    """Finds points near the decision boundary of `model` (section 4 of the paper).

    From each image, with i the label it has and j another one drawn at random, Adam minimises
    ReLU(Z_i - Z_j + k) + ReLU(max over t ≠ i, j of Z_t - Z_i) over the pixels, Z being the logits, until it
    is 0 or the iterations are over. Points that are done leave the batch.

    Args:
        model: the owner's classifier.
        key: the owner's secret, as in `embed`: draws the labels j, and the images where there are none.
        images: start images, in any form `embed` takes.
        points: number of points.
        margin: k.
        iterations: most steps of Adam.
        fraction: make only this share of the points.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: `fraction` is not in (0, 1], or there are too few images.
    """
    started = time.perf_counter()
    secret = Key.of(key)
    start = model.base_images(images, secret, points)[: share_of(points, fraction)]
    first = predicted(model, start).to(start.device)
    jumps = torch.from_numpy(secret.stream("ipguard").integers(1, model.classes, len(start)))
    second = (first + jumps.to(start.device)) % model.classes
    with Progress(progress) as bar:
        bar.stage("IPGuard", len(start))
        found = []
        for part in torch.arange(len(start), device=start.device).split(BATCH):
            found.append(_descend(model, start[part], first[part], second[part], margin, iterations))
            bar.advance(len(part))
    moved = torch.cat(found)
    labels = predicted(model, moved)
    cost = Cost(time.perf_counter() - started, len(start) / points)
    return Fingerprint(moved.cpu(), labels, cost)


def verify(suspect: Classifier, fingerprint: Fingerprint) -> Finding:
    """The matching rate: share of the points that `suspect` gives the owner's labels."""
    labels = predicted(suspect, fingerprint.points.to(suspect.device))
    return Finding(float((labels == fingerprint.labels).double().mean()))


def _descend(
    model: Classifier, start: Tensor, first: Tensor, second: Tensor, margin: float, iterations: int
) -> Tensor:
    points = start.clone()
    mean, square = torch.zeros_like(points), torch.zeros_like(points)
    active = torch.arange(len(points), device=points.device)
    for step in range(1, iterations + 1):
        x = points[active].requires_grad_()
        logits = model(x)
        i, j = first[active], second[active]
        z_i, z_j = logits.gather(1, i[:, None])[:, 0], logits.gather(1, j[:, None])[:, 0]
        mine = one_hot(i, model.classes) + one_hot(j, model.classes)
        losses = (z_i - z_j + margin).relu()
        if model.classes > 2:
            losses = losses + (logits.masked_fill(mine > 0, -torch.inf).amax(dim=1) - z_i).relu()
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        left = losses.detach() > 0
        active, gradient = active[left], gradient[left]
        if len(active) == 0:
            break
        # Adam, written out: PyTorch's would go on moving the points which are done.
        mean[active] = 0.9 * mean[active] + 0.1 * gradient
        square[active] = 0.999 * square[active] + 0.001 * gradient.square()
        change = (mean[active] / (1 - 0.9**step)) / ((square[active] / (1 - 0.999**step)).sqrt() + 1e-8)
        points[active] = (points[active] - LEARNING_RATE * change).clamp(0, 1)
    return points
