"""What a mark survives, what it costs, and what innocent models show: the table in the README.

    python benchmarks/evidence.py --vfm ../shared/vfm --data ../shared/data/cifar10.npz

`--vfm` is a folder of safetensors models which describe themselves; `--data` a CIFAR-10 archive (`datasets`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import cifar10
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

import activemark_fast
from activemark_fast.attacks import finetune, prune
from activemark_fast.backbone import Backbone
from activemark_fast.checkpoint import architecture_of, build_model, load_model
from activemark_fast.triggers import Preprocess

OWNER, OTHER_OWNER = b"evidence: the owner's key, 1", b"evidence: another owner's key"
TUNING_IMAGES = 4_000
PROBE_IMAGES, TEST_IMAGES = 10_000, 4_000


class Task:
    """CIFAR-10 as one model wants it."""

    def __init__(self, model: nn.Module, data: Path) -> None:
        view = Backbone(model)
        self.prepare = Preprocess(view.image_size, view.mean, view.std)
        self.data = data

    def load(self, split: str, count: int, classes: int = 10) -> tuple[Tensor, Tensor]:
        images, labels = cifar10(self.data, split, count, classes)
        return self.prepare(images), labels


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """(n, F, D) final features."""
    view = Backbone(model)
    batches = images.split(500)
    return torch.cat([view.features(view.run(view.stem(batch), 0, view.depth)) for batch in batches])


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of logistic regression on class token and mean patch."""
    scaler = StandardScaler().fit(train.flatten(1))
    probe = LogisticRegression(C=0.1, max_iter=500).fit(scaler.transform(train.flatten(1)), train_labels)
    return probe.score(scaler.transform(test.flatten(1)), test_labels)


def suspects(
    original: nn.Module, marked: nn.Module, other: nn.Module, fresh: nn.Module, task: Task
) -> Iterator[tuple[str, nn.Module]]:
    """Every suspect of the table, by name."""
    yield "marked", marked
    for share in (0.2, 0.4, 0.6):
        yield f"marked, {share:.0%} of weights pruned", prune(marked, share)
    for classes in (2, 10):
        images, labels = task.load("train", TUNING_IMAGES, classes)
        for name, model in (("marked", marked), ("original", original)):
            tuned = finetune(model, images, labels, seed=classes)
            yield f"{name}, fine-tuned on {classes} classes", tuned
    yield "marked, fine-tuned on 10 classes at 3e-4", finetune(marked, images, labels, seed=10, lr=3e-4)
    yield "original", original
    yield "original, 40% of weights pruned", prune(original, 0.4)
    yield "original marked under another key (keyed)", other
    yield "independently initialised", fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vfm", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--codec", choices=["keyed", "learned"], default="keyed")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = []
    for path in sorted(arguments.vfm.glob("*.safetensors")):
        original = load_model(path)
        task = Task(original, arguments.data)
        embedding = activemark_fast.embed(original, OWNER, codec=arguments.codec, progress=True)
        other = activemark_fast.embed(original, OTHER_OWNER, progress=True).model
        torch.manual_seed(0)
        fresh = build_model(architecture_of(path)).eval()

        test, test_labels = task.load("test", TEST_IMAGES)
        train, train_labels = task.load("train", PROBE_IMAGES)
        before, after = features(original, test), features(embedding.model, test)
        cosine = torch.cosine_similarity(before, after, dim=-1).mean(0)
        accuracy = [
            probe_accuracy(features(model, train), train_labels, tested, test_labels)
            for model, tested in ((original, before), (embedding.model, after))
        ]
        print(f"\n### {path.stem}, {arguments.codec} codec\n")
        effort = f"{embedding.seconds:.1f} s, {embedding.steps} gradient steps"
        print(f"Embedding: {effort}, {embedding.site_reason}.")
        print(
            f"Features on {TEST_IMAGES} unseen images: cosine {', '.join(f'{c:.4f}' for c in cosine)} "
            f"(class token, mean patch); linear probe {accuracy[0]:.4f} before, {accuracy[1]:.4f} after.\n"
        )
        print("| suspect | verdict | R | mean bit errors | p-value |\n|---|---|---|---|---|", flush=True)
        for name, suspect in suspects(original, embedding.model, other, fresh, task):
            verdict = activemark_fast.verify(suspect, embedding.watermark, OWNER)
            p_value = "none" if verdict.p_value is None else f"{verdict.p_value:.2g}"
            tqdm.write(
                f"| {name} | {verdict.decision} | {verdict.detection_rate:.3f} | "
                f"{verdict.bit_errors.mean():.2f} | {p_value} |"
            )
            summary = {k: v for k, v in verdict.to_dict().items() if k != "bit_errors"}
            rows.append(
                {"model": path.stem, "suspect": name, "bit_error": verdict.bit_errors.mean(), **summary}
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
