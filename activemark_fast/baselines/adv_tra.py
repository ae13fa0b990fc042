"""ADV-TRA (Xu et al., NeurIPS 2024): fingerprints are trajectories of ever more adversarial images.

A trajectory leads from an image through several classes, a few points to each boundary. It still speaks for
the owner when a boundary has moved and some of its points have changed their labels.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from activemark_fast.baselines.common import Classifier, Cost, Finding, predicted, share_of
from activemark_fast.key import Key
from activemark_fast.progress import Progress

TRAJECTORIES = 100
LENGTH = 4
STEP = 0.05
LENGTH_FACTOR = 0.9
DECAY = 0.95
ITERATIONS = 300
MUTATION_THRESHOLD = 0.5
"""Mutation rate below which a trajectory counts as recognised."""
MAX_CLASSES = 10
SPARE = 2
"""Images for each trajectory that is wanted: from some images there is none."""
BATCH = 50


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Trajectories through several classes.

    Attributes:
        points: (n, L, 3, H, W) float32 in [0, 1], on the CPU.
        labels: (n, L) int64, what the owner's classifier says of them.
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
    trajectories: int = TRAJECTORIES,
    length: int = LENGTH,
    iterations: int = ITERATIONS,
    fraction: float = 1.0,
    progress: bool = False,
) -> Fingerprint:
    """Finds surface trajectories of `model` (section 4 of the paper).

    From each image a trajectory goes on to up to 9 other classes in random order. On the way to a class it
    takes `length` steps of signed gradient descent on the cross-entropy of that class. The sizes of the first
    half, which decay by 0.95 from one to the next, are found by trial, starting at 0.05: divided by 0.9 if
    the half's last point has not crossed the boundary, times 0.9 if an earlier one has, ever more gently as
    the iterations pass. As in the authors' release a trial does not end before a quarter of its iterations
    are over. The second half takes the same steps in reverse order. An image that reaches some class in no
    such way gives no trajectory and the next one takes its place. Unlike the release, which handles one image
    at a time, this handles 50 together.

    Args:
        model: the owner's classifier.
        key: the owner's secret, as in `embed`: draws the order of classes, and the images if there are none.
        images: start images, in any form `embed` takes; up to twice as many as trajectories are used.
        trajectories: how many are wanted.
        length: steps to each class, an even number.
        iterations: most trials of step sizes for each class.
        fraction: make only this share of the trajectories.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: `length` is odd or below 2, `fraction` is not in (0, 1], there are too few images, or no
            image gives a trajectory.
    """
    if length < 2 or length % 2:
        raise ValueError(f"length: wanted an even number from 2 on, got {length}")
    started = time.perf_counter()
    secret = Key.of(key)
    wanted = share_of(trajectories, fraction)
    start = model.base_images(images, secret, SPARE * trajectories)
    first = predicted(model, start).to(start.device)
    stream = secret.stream("adv-tra")
    hops = min(MAX_CLASSES, model.classes) - 1
    jumps = torch.stack([torch.from_numpy(stream.permutation(model.classes - 1)) for _ in start])
    targets = (first[:, None] + 1 + jumps[:, :hops].to(start.device)) % model.classes
    made: list[Tensor] = []
    done = 0
    with Progress(progress) as bar:
        bar.stage("ADV-TRA", wanted)
        while done < wanted and len(start):
            part = min(BATCH, wanted - done)
            found = _surface(model, start[:part], targets[:part], length, iterations)
            start, targets = start[part:], targets[part:]
            if len(found):
                made.append(found.cpu())
            done += len(found)
            bar.advance(len(found))
    if done == 0:
        raise ValueError("images: wanted images from which trajectories cross all boundaries, found none")
    points = torch.cat(made)
    labels = predicted(model, points.flatten(0, 1).to(model.device)).view(points.shape[:2])
    cost = Cost(time.perf_counter() - started, wanted / trajectories)
    return Fingerprint(points, labels, cost)


def verify(suspect: Classifier, fingerprint: Fingerprint) -> Finding:
    """The detection rate: share of the trajectories whose mutation rate is below one half.

    The mutation rate is the share of a trajectory's points whose label is not the owner's.
    """
    labels = predicted(suspect, fingerprint.points.flatten(0, 1).to(suspect.device))
    mutation = (labels.view_as(fingerprint.labels) != fingerprint.labels).double().mean(dim=1)
    return Finding(float((mutation < MUTATION_THRESHOLD).double().mean()))


def _surface(model: Classifier, start: Tensor, targets: Tensor, length: int, iterations: int) -> Tensor:
    """(m, hops * length + 1, 3, H, W), m <= n: the trajectories from `start` (n, 3, H, W) that succeed."""
    points = start[:, None]
    for hop in range(targets.shape[1]):
        sizes = _step_sizes(model, points[:, -1], targets[:, hop], length // 2, iterations)
        reached = torch.isfinite(sizes)
        points, targets, sizes = points[reached], targets[reached], sizes[reached]
        if len(points) == 0:
            break
        half = DECAY ** torch.arange(length // 2, device=start.device)
        x = points[:, -1]
        for scale in torch.cat([half, half.flip(0)]):
            x = _step(model, x, targets[:, hop], scale * sizes)[0]
            points = torch.cat([points, x[:, None]], dim=1)
    return points


def _step_sizes(model: Classifier, start: Tensor, target: Tensor, half: int, iterations: int) -> Tensor:
    """(n,) size of the first of `half` steps with which just the last one crosses; NaN if none is found."""
    found = torch.full((len(start),), torch.nan, device=start.device)
    sizes = torch.full_like(found, STEP)
    active = torch.arange(len(start), device=start.device)
    for iteration in range(iterations):
        x, goal = start[active], target[active]
        early = torch.zeros(len(active), dtype=torch.bool, device=start.device)
        for index in range(half):
            x, label = _step(model, x, goal, DECAY**index * sizes[active])
            if index > 0:
                early |= label == goal
        with torch.no_grad():
            late = model(x).argmax(dim=1) != goal
        factor = LENGTH_FACTOR ** (1 - iteration / (2 * iterations))
        fits = ~early & ~late & (4 * iteration > iterations)
        found[active[fits]] = sizes[active[fits]]
        change = torch.where(early, factor, torch.where(late, 1 / factor, 1.0))
        sizes[active] = (sizes[active] * change).clamp(max=1.0)
        active = active[~fits]
        if len(active) == 0:
            break
    return found


def _step(model: Classifier, images: Tensor, target: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The images one signed gradient step of (n,) `sizes` nearer to their target, and their labels before."""
    x = images.detach().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, target, reduction="sum"), x)
    moved = (images - sizes[:, None, None, None] * gradient.sign()).clamp(0, 1)
    return moved, logits.detach().argmax(dim=1)
