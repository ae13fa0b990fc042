"""What a thief can do to a mark for free, and what the verdict then says.

    python benchmarks/dispute.py --vfm ../shared/vfm
    python benchmarks/dispute.py --vfm 'timm:VisionTransformer?{…}@dinov2.safetensors' --only marked '*rot*'

Models are timm's.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch

from models import add_models, made_by, models
from torch import nn

import activemark_fast
from activemark_fast.attacks import cut, permute_inside, permute_residual, reinitialise, rotate_residual

OWNER = b"dispute: the owner's key"


def suspects(original: nn.Module, marked: nn.Module, only: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Every suspect of the table, by name."""
    made = {"marked": lambda: marked}
    for name, attack in (
        ("residual stream permuted", permute_residual),
        ("residual stream rotated", rotate_residual),
    ):
        made[f"marked, {name}"] = lambda attack=attack: attack(marked, None, 1, 1)
        made[f"original, {name}"] = lambda attack=attack: attack(original, None, 1, 1)
    made["marked, heads and MLP units permuted and scaled"] = lambda: permute_inside(marked, None, 1, 1)
    for count in (1, 2, 3):
        made[f"marked, last {count} blocks cut off"] = lambda count=count: cut(marked, None, 1, count)
        made[f"marked, last {count} blocks re-initialised"] = lambda count=count: reinitialise(
            marked, None, 1, count
        )
    made["original"] = lambda: original
    for name, make in made.items():
        if any(fnmatch(name, pattern) for pattern in only):
            yield name, make()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_models(parser)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of suspects")
    arguments = parser.parse_args()
    print(made_by(arguments.device))
    for model in models(arguments.vfm):
        original = model.load(arguments.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what the mark is worth is what the rows say
            embedding = activemark_fast.embed(original, OWNER)
        print(f"\n### {model.name}: {embedding.site_reason}, taps {embedding.watermark.site.taps}\n")
        print("| suspect | verdict | undone | R | p-value | paid |\n|---|---|---|---|---|---|", flush=True)
        for name, suspect in suspects(original, embedding.model, arguments.only):
            verdict = activemark_fast.verify(suspect, embedding.watermark, OWNER)
            p_values = (verdict.p_value, verdict.paid_p_value)
            print(
                f"| {name} | {verdict.decision} | {verdict.aligned or ''} | {verdict.detection_rate:.3f} | "
                f"{' | '.join('none' if p is None else f'{p:.2g}' for p in p_values)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
