"""What a thief can do to a mark for free, and what the verdict then says: the table in the README.

    python benchmarks/dispute.py --vfm ../shared/vfm

`--vfm` is a folder of safetensors models which describe themselves (timm ViTs).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from torch import nn

import activemark_fast
from activemark_fast.attacks import cut, permute_inside, permute_residual, reinitialise, rotate_residual
from activemark_fast.checkpoints import load_model

OWNER = b"dispute: the owner's key"


def suspects(original: nn.Module, marked: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every suspect of the table, by name."""
    yield "marked", marked
    for name, attack in (
        ("residual stream permuted", permute_residual),
        ("residual stream rotated", rotate_residual),
    ):
        yield f"marked, {name}", attack(marked, None, 1, 1)
        yield f"original, {name}", attack(original, None, 1, 1)
    yield "marked, heads and MLP units permuted and scaled", permute_inside(marked, None, 1, 1)
    for count in (1, 2, 3):
        yield f"marked, last {count} blocks cut off", cut(marked, None, 1, count)
        yield f"marked, last {count} blocks re-initialised", reinitialise(marked, None, 1, count)
    yield "original", original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vfm", type=Path, required=True)
    arguments = parser.parse_args()
    for path in sorted(arguments.vfm.glob("*.safetensors")):
        original = load_model(path)
        embedding = activemark_fast.embed(original, OWNER)
        print(f"\n### {path.stem}: {embedding.site_reason}, taps {embedding.watermark.site.taps}\n")
        print("| suspect | verdict | undone | R | p-value |\n|---|---|---|---|---|", flush=True)
        for name, suspect in suspects(original, embedding.model):
            verdict = activemark_fast.verify(suspect, embedding.watermark, OWNER)
            print(
                f"| {name} | {verdict.decision} | {verdict.aligned or ''} | {verdict.detection_rate:.3f} | "
                f"{verdict.p_value:.2g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
