"""Which block should carry the mark? A mark at every block, what attacks leave of it, and what the rules say.

    python benchmarks/site_rules.py --vfm ../shared/vfm --data ../shared/data/cifar10.npz

`--vfm` is a folder of safetensors models which describe themselves; `--data` a labelled archive
(`activemark_fast.datasets`). Every mark is placed by the edit alone. The attacks are harder than those of
`evidence.py`, for blocks are to differ.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
from torch import Tensor, nn

import activemark_fast
from activemark_fast import Embedding, load_model
from activemark_fast.attacks import finetune, prune
from activemark_fast.backbone import Backbone
from activemark_fast.datasets import Labelled, load_task
from activemark_fast.profile import RULES
from activemark_fast.triggers import public_images

KEY = b"site rules: the key of no owner"
HOLDOUT_IMAGES = 64  # fewer than usual: the experiment marks each model at every block
TUNING_IMAGES, EPOCHS, LEARNING_RATE = 640, 2, 1e-3
PRUNED_SHARE = 0.7


def wrong_bits(embedding: Embedding, holdout: Tensor, images: Labelled) -> tuple[float, float, float]:
    """Mean wrong bits of the mark in a pruned, in a fine-tuned, and in a fine-tuned and pruned suspect."""

    def read(suspect: nn.Module) -> float:
        return float(activemark_fast.verify(suspect, embedding.watermark, KEY, holdout).bit_errors.mean())

    tuned = finetune(embedding.model, images, 0, LEARNING_RATE, epochs=EPOCHS)
    pruned, both = (prune(model, None, 0, PRUNED_SHARE) for model in (embedding.model, tuned))
    return read(pruned), read(tuned), read(both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vfm", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    for path in sorted(arguments.vfm.glob("*.safetensors")):
        model = load_model(path)
        view = Backbone(model)
        preprocess = view.preprocess
        images = load_task(arguments.data, preprocess, TUNING_IMAGES, 1).train
        holdout = public_images(None, preprocess, HOLDOUT_IMAGES)
        measured = activemark_fast.profile(model)
        print(f"\n### {path.stem}\n")
        for rule in RULES:
            print(f"- {rule}: {measured.site(rule).reason}")
        print(f"\nWrong bits of 32; {PRUNED_SHARE:.0%} pruned, fine-tuned at {LEARNING_RATE:g}.\n")
        print("| block | ratio | fidelity | margin | pruned | fine-tuned | both | mean |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for block in range(view.depth - 2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # targets that were missed are in the table
                embedding = activemark_fast.embed(model, KEY, holdout, block=block)
            errors = wrong_bits(embedding, holdout, images)
            quality = f"{embedding.fidelity:.4f} | {embedding.quality.margin:.2f}"
            cells = " | ".join(f"{value:.2f}" for value in (*errors, np.mean(errors)))
            print(f"| {block} | {measured.ratio[block, 0]:.0f} | {quality} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
