"""Utility: what a model is still good for. Accuracy of its features, and how far they are from another's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize, one_hot
from torch.nn.utils import skip_init

from activemark_fast.backbone import Backbone, evaluating
from activemark_fast.datasets import Task

BATCH = 128
NEIGHBOURS = 20
TEMPERATURE = 0.07
PENALTY = 1e-3
"""Weight of the probe's squared weights beside the mean cross-entropy."""


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """(n, F, D) float32 final features of `images` (n, 3, H, W), on the CPU: class token, mean patch."""
    backbone = Backbone(model)
    return torch.cat([backbone.features(part).float().cpu() for part in _last_tokens(backbone, images)])


@torch.no_grad()
def patch_features(model: nn.Module, images: Tensor) -> Tensor:
    """(n, P, D) float32 patch tokens after the final norm, on the CPU."""
    backbone = Backbone(model)
    return torch.cat(
        [
            backbone.final_tokens(part)[:, backbone.prefix_tokens :].float().cpu()
            for part in _last_tokens(backbone, images)
        ]
    )


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of the 20 nearest neighbours, weighted by exp(cosine / 0.07) (Wu et al. 2018).

    Args:
        train: (n, F, D) features of labelled images.
        train_labels: (n,) int64, their classes.
        test: (m, F, D) features of the images to classify.
        test_labels: (m,) int64, their classes.
    """
    near = normalize(test.flatten(1), dim=1) @ normalize(train.flatten(1), dim=1).T
    cosine, index = near.topk(min(NEIGHBOURS, len(train)), dim=1)
    votes = (
        one_hot(train_labels[index], int(train_labels.max()) + 1) * (cosine / TEMPERATURE).exp()[..., None]
    )
    return float((votes.sum(dim=1).argmax(dim=1) == test_labels).double().mean())


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a linear probe; arguments as for `knn_accuracy`."""
    probe = linear_probe(train.flatten(1), train_labels)
    return float((probe(test.flatten(1)).argmax(dim=1) == test_labels).double().mean())


def linear_probe(found: Tensor, labels: Tensor) -> nn.Linear:
    """A linear classifier: logistic regression on standardised features (Alain and Bengio 2016).

    Fitted with L-BFGS from 0, so that no seed is needed.

    Args:
        found: (n, D) float32 features.
        labels: (n,) int64, their classes, from 0, on the same device.

    Returns:
        D → classes, without gradients; the standardisation is in its weights.
    """
    mean, std = found.mean(dim=0), found.std(dim=0, correction=0).clamp_min(1e-6)
    standard = (found - mean) / std
    probe = skip_init(nn.Linear, found.shape[1], int(labels.max()) + 1, device=found.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(probe(standard), labels) + PENALTY * probe.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    probe.requires_grad_(False).zero_grad()
    probe.weight.div_(std)
    probe.bias.sub_(probe.weight @ mean)
    return probe


def segmentation_iou(model: nn.Module, task: Task) -> float:
    """Mean intersection over union of a linear probe on patch tokens, over the classes in the test masks.

    The probe learns the commonest class within each patch; its scores are scaled up to the masks.
    """
    backbone = Backbone(model)
    rows, columns = patch_grid(backbone)
    height, width = task.train.labels.shape[1:]
    classes = task.train.classes
    shares = one_hot(task.train.labels, classes).permute(0, 3, 1, 2).float()
    per_patch = nn.functional.adaptive_avg_pool2d(shares, (rows, columns)).argmax(dim=1)
    probe = linear_probe(patch_features(model, task.train.images).flatten(0, 1), per_patch.flatten())
    found = patch_features(model, task.test.images)
    scores = probe(found.flatten(0, 1)).reshape(len(found), rows, columns, classes).permute(0, 3, 1, 2)
    masks = interpolate(scores, (height, width), mode="bilinear").argmax(dim=1)
    return mean_iou(masks, task.test.labels)


def mean_iou(found: Tensor, wanted: Tensor) -> float:
    """Mean over the classes in `wanted` of intersection over union; both (n, H, W) int64."""
    shares = []
    for label in wanted.unique():
        ours, theirs = found == label, wanted == label
        shares.append(float((ours & theirs).sum()) / float((ours | theirs).sum()))
    return sum(shares) / len(shares)


def patch_grid(backbone: Backbone) -> tuple[int, int]:
    """Rows and columns of the patches.

    Raises:
        ValueError: the patches do not form a grid of the image's shape.
    """
    patches = backbone.num_tokens - backbone.prefix_tokens
    height, width = backbone.image_size
    rows = round((patches * height / width) ** 0.5)
    if rows == 0 or patches % rows:
        raise ValueError(f"model: wanted patches in a grid shaped as {height} x {width}, got {patches}")
    return rows, patches // rows


def _last_tokens(backbone: Backbone, images: Tensor) -> list[Tensor]:
    with evaluating(backbone.encoder):
        return [
            backbone.run(backbone.stem(part.to(backbone.device, backbone.dtype)), 0, backbone.depth)
            for part in images.split(BATCH)
        ]
