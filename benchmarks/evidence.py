"""What a mark survives, what it costs, and what innocent models show: the table in the README.

    python benchmarks/evidence.py --vfm ../shared/vfm --data ../shared/data/cifar10.npz

`--vfm` is a folder of safetensors models which describe themselves; `--data` an archive of CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import activemark_fast
from activemark_fast.attacks import finetune, prune
from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints import architecture_of, build_model, load_model
from activemark_fast.datasets import Task, load_task
from activemark_fast.utility import features, probe_accuracy

OWNER, OTHER_OWNER = b"evidence: the owner's key, 1", b"evidence: another owner's key"
TUNING_IMAGES = 4_000
PROBE_IMAGES, TEST_IMAGES = 10_000, 4_000


def load(model: nn.Module, data: Path, train: int, classes: int = 10) -> Task:
    """CIFAR-10 as `model` takes it."""
    view = Backbone(model)
    return load_task(data, view.preprocess, train, TEST_IMAGES, classes)


def suspects(
    original: nn.Module, marked: nn.Module, other: nn.Module, fresh: nn.Module, data: Path
) -> Iterator[tuple[str, nn.Module]]:
    """Every suspect of the table, by name."""
    yield "marked", marked
    for share in (0.2, 0.4, 0.6):
        yield f"marked, {share:.0%} of weights pruned", prune(marked, None, 0, share)
    for classes in (2, 10):
        images = load(original, data, TUNING_IMAGES, classes).train
        for name, model in (("marked", marked), ("original", original)):
            tuned = finetune(model, images, classes)
            yield f"{name}, fine-tuned on {classes} classes", tuned
    yield "marked, fine-tuned on 10 classes at 3e-4", finetune(marked, images, 10, 3e-4)
    yield "original", original
    yield "original, 40% of weights pruned", prune(original, None, 0, 0.4)
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
        embedding = activemark_fast.embed(original, OWNER, codec=arguments.codec, progress=True)
        other = activemark_fast.embed(original, OTHER_OWNER, progress=True).model
        torch.manual_seed(0)
        fresh = build_model(architecture_of(path)).eval()

        task = load(original, arguments.data, PROBE_IMAGES)
        train, test = task.train, task.test
        before, after = features(original, test.images), features(embedding.model, test.images)
        cosine = torch.cosine_similarity(before, after, dim=-1).mean(0)
        accuracy = [
            probe_accuracy(features(model, train.images), train.labels, tested, test.labels)
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
        for name, suspect in suspects(original, embedding.model, other, fresh, arguments.data):
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
