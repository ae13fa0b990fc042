"""How far a mark hangs on the key: one model, marked and verified with several.

    python benchmarks/keys.py --model ../shared/dinov2/dinov2_vits14_saliency.safetensors --keys 6

Prints a line for each key, as a table in Markdown, and at the end the worst of each column: what `embed` says
of the mark on images that it was not fitted to; what all 128 trigger images show; after how many of them
`verify` settles the marked model and the original, and how many times the CPU time of these verifications all
images of the marked model take.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

from torch import nn

from activemark_fast import Verdict, embed, load_model, verify

COLUMNS: dict[str, Callable[[list[float]], float]] = {
    "R": min,
    "margin": min,
    "margin, natural": min,
    "fidelity": min,
    "R, all images": min,
    "wrong bits": max,
    "p, loud": max,
    "p, natural": max,
    "p, passive": max,
    "images, marked": max,
    "images, original": max,
    "p, original": min,
    "times, marked": min,
    "times, original": min,
}
"""What is printed, and which of several is the worst."""


def row(model: nn.Module, key: bytes) -> dict[str, float]:
    """One key's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what the mark is worth is what the row says
        made = embed(model, key)

    def timed(suspect: nn.Module, decision: str, exhaustive: bool = False) -> tuple[Verdict, float]:
        started = time.process_time()
        verdict = verify(suspect, made.watermark, key, exhaustive=exhaustive)
        if verdict.decision != decision:
            print(f"WRONG: {verdict}", flush=True)
        return verdict, time.process_time() - started

    whole, seconds = timed(made.model, "match", exhaustive=True)
    marked, of_marked = timed(made.model, "match")
    original, of_original = timed(model, "no match")
    quality = made.quality
    return {
        "R": quality.detection_rate,
        "margin": quality.margin,
        "margin, natural": quality.natural_margin,
        "fidelity": quality.fidelity,
        "R, all images": whole.detection_rate,
        "wrong bits": float(whole.bit_errors.mean()),
        **{f"p, {band}": p_value for band, p_value in whole.bands.items()},
        "images, marked": marked.images,
        "images, original": original.images,
        "p, original": original.p_value,
        "times, marked": seconds / of_marked,
        "times, original": seconds / of_original,
    }


def _told(name: str, value: float) -> str:
    if name.startswith("p, ") and value < 0.001:
        return f"{value:.1e}"
    if name.startswith("times, "):
        return f"{value:.1f}"
    return str(value) if isinstance(value, int) else f"{value:.4f}" if name == "fidelity" else f"{value:.3f}"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--keys", type=int, default=6)
    parser.add_argument("--first", type=int, default=0, help="number of the first key")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    print(f"| key | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}", flush=True)
    rows = []
    for number in range(arguments.first, arguments.first + arguments.keys):
        rows.append(row(model, f"activemark_fast benchmark key {number}".encode()))
        print(f"| {number} | {' | '.join(_told(*cell) for cell in rows[-1].items())} |", flush=True)
    worst = {name: of([row[name] for row in rows]) for name, of in COLUMNS.items()}
    print(f"| the worst | {' | '.join(_told(*cell) for cell in worst.items())} |")


if __name__ == "__main__":
    main()
