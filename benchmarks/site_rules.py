"""Which block should carry the mark? A mark at every block, what attacks leave of it, and what the rules say.

    python benchmarks/site_rules.py --vfm ../shared/vfm --data ../shared/data/cifar10.npz
    python benchmarks/site_rules.py --vfm 'timm:VisionTransformer?{…}@dinov2.safetensors' --tuning 128 \
        --blocks 1 4 7 --data ../shared/data/cifar10.npz

`--data` is a labelled archive (`activemark_fast.datasets`). The attacks are harder than those of
`evidence.py`, for blocks are to differ.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from models import add_models, made_by, models

import activemark_fast
from activemark_fast import Embedding
from activemark_fast.attacks import finetune, prune
from activemark_fast.attacks.suite import BATCH_SIZE
from activemark_fast.backbone import Backbone
from activemark_fast.block_choice import RULES
from activemark_fast.datasets import Labelled, load_task

KEY = b"site rules: the key of no owner"
EPOCHS, LEARNING_RATE = 2, 1e-3
PRUNED_SHARE = 0.7


def left(embedding: Embedding, images: Labelled) -> list[str]:
    """Mean wrong bits and p-value of a pruned, a fine-tuned, and a fine-tuned and pruned suspect."""
    tuned = finetune(embedding.model, images, 0, LEARNING_RATE, epochs=EPOCHS, batch_size=BATCH_SIZE)
    pruned, both = (prune(model, None, 0, PRUNED_SHARE) for model in (embedding.model, tuned))
    verdicts = [
        activemark_fast.verify(suspect, embedding.watermark, KEY, align=False, exhaustive=True)
        for suspect in (pruned, tuned, both)
    ]
    return [f"{verdict.bit_errors.mean():.2f}, {verdict.p_value:.1e}" for verdict in verdicts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_models(parser)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tuning", type=int, default=640, help="images to fine-tune on")
    parser.add_argument("--blocks", type=int, nargs="+", help="by default all that can carry a mark")
    arguments = parser.parse_args()
    print(made_by(arguments.device))
    for named in models(arguments.vfm):
        model = named.load(arguments.device)
        view = Backbone(model)
        images = load_task(arguments.data, view.preprocess, arguments.tuning, 1).train
        measured = activemark_fast.profile(model)
        print(f"\n### {named.name}\n")
        for rule in RULES:
            print(f"- {rule}: {measured.site(rule).reason}")
        print(
            "\nMean wrong bits of 32 of an image, and the p-value (of all bands, unpaid), after the attacks:"
        )
        print(f"{PRUNED_SHARE:.0%} pruned, fine-tuned at {LEARNING_RATE:g}.\n")
        print("| block | ratio | fidelity | margin | margin, natural | pruned | fine-tuned | both |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for block in arguments.blocks or range(view.depth - 2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # targets that were missed are in the table
                embedding = activemark_fast.embed(model, KEY, block=block)
            quality = embedding.quality
            cells = [f"{quality.fidelity:.4f}", f"{quality.margin:.2f}", f"{quality.natural_margin:.2f}"]
            cells = [f"{block}", f"{measured.ratio[block, 0]:.0f}", *cells, *left(embedding, images)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
