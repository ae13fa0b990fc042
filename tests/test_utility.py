from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from tiny import vit
from torch import Tensor

from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled, Task
from activemark_fast.utility import (
    PENALTY,
    TEMPERATURE,
    features,
    knn_accuracy,
    mean_iou,
    patch_grid,
    probe_accuracy,
    segmentation_iou,
)


def clusters(count: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 2, 8) features around 3 centres, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    return centres[labels] + spread * torch.randn(count, 2, 8, generator=generator), labels


def test_the_probe_is_logistic_regression() -> None:
    (train, labels), (test, wanted) = clusters(120, 1.5, 1), clusters(90, 1.5, 2)
    mean, std = train.flatten(1).mean(0), train.flatten(1).std(0)
    reference = LogisticRegression(C=1 / (2 * PENALTY * len(train)), max_iter=2000, tol=1e-8)
    reference.fit((train.flatten(1) - mean) / std, labels)
    expected = reference.score((test.flatten(1) - mean) / std, wanted)
    assert 0.5 < expected < 1
    assert probe_accuracy(train, labels, test, wanted) == pytest.approx(expected, abs=1.5 / 90)


def test_knn_is_a_weighted_vote_of_cosines() -> None:
    (train, labels), (test, wanted) = clusters(120, 1.5, 1), clusters(90, 1.5, 2)
    reference = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    )
    reference.fit(train.flatten(1), labels)
    expected = reference.score(test.flatten(1), wanted)
    assert 0.5 < expected < 1
    assert knn_accuracy(train, labels, test, wanted) == pytest.approx(expected, abs=1.5 / 90)
    few = knn_accuracy(train[:7], labels[:7], test, wanted)
    assert 0 <= few <= 1


@given(st.integers(0, 2**31))
@settings(max_examples=20)
def test_mean_iou_is_the_mean_jaccard_index(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found, wanted = torch.randint(0, 4, (2, 3, 5, 7), generator=generator)
    labels = wanted.unique().tolist()
    expected = jaccard_score(
        wanted.flatten(), found.flatten(), labels=labels, average="macro", zero_division=0
    )
    assert mean_iou(found, wanted) == pytest.approx(expected)


def test_features_are_those_of_the_backbone_in_eval_mode() -> None:
    model = vit(drop_rate=0.5).train()
    images = torch.randn(130, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = features(model, images)
    assert model.training
    view = Backbone(model.eval())
    torch.testing.assert_close(found, view.features(view.run(view.stem(images), 0, view.depth)).detach())
    assert found.shape == (130, 2, 128)


def test_a_probe_on_patches_finds_what_a_patch_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 2, (24, 4, 4), generator=generator)
    masks = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = (2.0 * masks - 1)[:, None].repeat(1, 3, 1, 1)
    images += 0.1 * torch.randn(images.shape, generator=generator)
    task = Task(Labelled(images[:16], masks[:16]), Labelled(images[16:], masks[16:]))
    model = vit()
    assert patch_grid(Backbone(model)) == (4, 4)
    assert segmentation_iou(model, task) > 0.6
    wrong = Task(task.train, Labelled(task.test.images, 1 - task.test.labels))
    assert segmentation_iou(model, wrong) < 0.3
