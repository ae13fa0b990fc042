"""What the package's work costs, commit by commit, as ratios that machines and their load hardly move.

    python benchmarks/history.py measure     # benchmarks/history/NUMBER-COMMIT.json of the commit checked out
    python benchmarks/history.py plot        # docs/history.svg
    python benchmarks/history.py check       # names the commit that cost more than a tenth; exits with 1

A ratio is the CPU time of a piece of work over that of `UNIT` images that run through the same model, in its
weights' dtype and without a gradient; the least of several runs of each, the two by turns, in one process on
one thread.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import ROOT, commit, output
from matplotlib.figure import Figure

import activemark_fast
from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints import load_model
from activemark_fast.photographs import shipped_photographs

KEY = b"history: a key of no secrecy"
UNIT = 256
"""Images of the work that others are compared with."""
ROUNDS = 5
TOLERATED = 1.1
"""Of the last commit's ratio."""
FOLDER = Path(__file__).parent / "history"


def measure() -> dict[str, float]:
    """Each work's ratio, on the demo model."""
    torch.set_num_threads(1)
    model = load_model("demo")
    pixels = model_input(model)
    embedding = activemark_fast.embed(model, KEY)
    works: dict[str, Callable[[], object]] = {
        "embed": lambda: activemark_fast.embed(model, KEY),
        "verify, marked": lambda: activemark_fast.verify(embedding.model, embedding.watermark, KEY),
        "verify, innocent": lambda: activemark_fast.verify(model, embedding.watermark, KEY),
        "profile": lambda: activemark_fast.profile(model, pixels),
        "compare": lambda: activemark_fast.compare(embedding.model, model),
    }

    def unit() -> None:
        with torch.inference_mode():
            for part in pixels.split(64):
                model(part)

    ratios = {}
    for name, work in works.items():
        work(), unit()
        both = [(cpu_seconds(work), cpu_seconds(unit)) for _ in range(ROUNDS)]
        ratios[name] = round(min(a for a, _ in both) / min(b for _, b in both), 3)
        print(f"{name}: {ratios[name]}", flush=True)
    return ratios


def model_input(model: torch.nn.Module) -> torch.Tensor:
    preprocess = Backbone(model).preprocess
    return preprocess(shipped_photographs().images[:UNIT])


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def record() -> Path:
    """Measures the commit that is checked out; what was not committed is refused."""
    measured = commit()
    if measured == "-" or measured.endswith("-dirty"):
        sys.exit("wanted a clean working tree: a figure belongs to a commit")
    content = {
        "commit": measured,
        "number": int(output("git", "-C", str(ROOT), "rev-list", "--count", "HEAD")),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "ratios": measure(),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{content['number']:05d}-{content['commit']}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def history() -> list[dict[str, Any]]:
    """All that was measured, oldest commit first."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]


def dearer(commits: list[dict[str, Any]]) -> list[str]:
    """One sentence for each work that a commit made dearer than is tolerated."""
    found = []
    for before, after in itertools.pairwise(commits):
        for work, ratio in after["ratios"].items():
            earlier = before["ratios"].get(work)
            if earlier is not None and ratio > TOLERATED * earlier:
                found.append(
                    f"{after['commit']} (or one since {before['commit']}): {work} costs "
                    f"{ratio / earlier:.2f} times what it did, {ratio:g} after {earlier:g}"
                )
    return found


def draw(commits: list[dict[str, Any]]) -> Figure:
    """Every work's ratio, a line each."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    names = [f"{each['date']}\n{each['commit'][:7]}" for each in commits]
    for work in dict.fromkeys(work for each in commits for work in each["ratios"]):
        known = [(i, c["ratios"][work]) for i, c in enumerate(commits) if work in c["ratios"]]
        axes.plot(*zip(*known, strict=True), marker="o", markersize=4, label=work)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel(f"CPU time over that of {UNIT} images\nthrough the demo model")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=("measure", "plot", "check"))
    verb = parser.parse_args().verb
    if verb == "measure":
        print(record())
    elif verb == "plot":
        draw(history()).savefig(ROOT / "docs" / "history.svg")
    else:
        sys.exit("\n".join(dearer(history())) or 0)


if __name__ == "__main__":
    main()
