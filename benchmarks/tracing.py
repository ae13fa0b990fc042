"""Marks a model for many recipients and traces what leaks, alone and by collusion; writes docs/tracing.md.

    python benchmarks/tracing.py --data ../shared/data/cifar10.npz --out /tmp/tracing --page docs/tracing.md
    python benchmarks/tracing.py --model ../shared/dinov2/dinov2_vits14_saliency.safetensors \\
        --data ../shared/data/cifar10.npz --out /tmp/dinov2 --page /tmp/dinov2/tracing.md

`--out` keeps the marked model, the watermark, the register and the rows measured so far; a run goes on from
what is there. Each row also says what is left of the owner's mark, of as many images as a sweep reads.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import made_by
from torch import Tensor, nn

import activemark_fast
from activemark_fast.attacks.suite import adaptive_attacks, suite
from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints import architecture_of, load_model, save_model
from activemark_fast.codec.codebooks import TRACED
from activemark_fast.datasets import load_task
from activemark_fast.key import Key
from activemark_fast.tracing import Change, Register, changed, promise
from activemark_fast.tracing.codewords import AccusationTest, draw_biases, draw_codewords
from activemark_fast.utility import features
from activemark_fast.verifier import Verifier
from activemark_fast.watermark import Watermark

OWNER = Key(b"tracing: the owner's key")
ALPHA = 1e-6
COLLUDERS = (2, 3, 4, 8)
SUITE = (
    "40% of weights",
    "60% of weights",
    "int8 weights and activations",
    "weights + 30% noise",
    "all, 1e-5",
    "all, 3e-5",
    "all, 1e-4",
    "LoRA, 1e-3",
)
ADAPTIVE = ("loudest of fc2, 32", "loudest of fc2, 64", "ridge refit of fc2, 0.5", "replaced MLPs, 100 steps")
INNOCENTS = 1_000_000
LEVELS = (1e-3, 1e-4, 1e-5, 1e-6)

Merge = Callable[[Tensor, torch.Generator], Tensor]
"""(c, ...) copies of one tensor → the tensor that the colluders make."""


def choice(copies: Tensor, generator: torch.Generator) -> Tensor:
    """Each weight from a copy that chance picks."""
    picked = torch.randint(len(copies), copies[:1].shape, generator=generator)
    return torch.gather(copies, 0, picked.to(copies.device))[0]


def either_end(copies: Tensor, generator: torch.Generator) -> Tensor:
    """Each weight the least or the greatest of all copies', as chance has it."""
    low = torch.rand(copies.shape[1:], generator=generator) < 0.5
    return torch.where(low.to(copies.device), copies.amin(dim=0), copies.amax(dim=0))


def beyond(copies: Tensor, generator: torch.Generator) -> Tensor:
    """The first copy, moved away from the mean of the others by as far as they differ."""
    return 2 * copies[0] - copies[1:].mean(dim=0)


def without_differences(copies: Tensor, generator: torch.Generator) -> Tensor:
    """The mean, with nothing left along inputs that the copies differ in: a reader of the source tries it."""
    mean = copies.mean(dim=0)
    if mean.ndim != 2 or bool((copies == copies[0]).all()):
        return mean
    _, sizes, inputs = torch.linalg.svd((copies - mean).flatten(0, 1), full_matrices=False)
    inputs = inputs[sizes > 1e-3 * sizes[0]]
    return mean - (mean @ inputs.T) @ inputs


MERGES: dict[str, Merge] = {
    "mean": lambda copies, _: copies.mean(dim=0),
    "choice": choice,
    "median": lambda copies, _: copies.quantile(0.5, dim=0),
    "least": lambda copies, _: copies.amin(dim=0),
    "least or greatest": either_end,
    "beyond the mean of the others": beyond,
    "mean, without the inputs of the differences": without_differences,
}


def merged(models: list[nn.Module], merge: Merge, seed: int = 0) -> nn.Module:
    """A model made of several, weight by weight."""
    made, generator = copy.deepcopy(models[0]), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for target, *copies in zip(made.parameters(), *(m.parameters() for m in models), strict=True):
            target.copy_(merge(torch.stack(copies), generator))
    return made


def interleaved(models: list[nn.Module]) -> nn.Module:
    """A model whose blocks come from several, in turn."""
    made = copy.deepcopy(models[0])
    blocks = Backbone(made).blocks
    for index, block in enumerate(blocks):
        block.load_state_dict(Backbone(models[index % len(models)]).blocks[index].state_dict())
    return made


class Bench:
    """A model marked for recipients, and the rows that have been measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device: str = arguments.device
        self.original = load_model(arguments.model, device=self.device)
        self.task = load_task(arguments.data, Backbone(self.original).preprocess, arguments.images, 128)
        paths = [self.folder / name for name in ("marked.safetensors", "watermark.safetensors", "register")]
        if not paths[2].exists():
            names = [f"recipient {i}" for i in range(1, arguments.recipients + 1)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # what it is worth is what the rows say
                embedding = activemark_fast.embed(self.original, OWNER, recipients=names)
            save_model(embedding.model, paths[0], architecture_of(arguments.model))
            embedding.watermark.save(paths[1])
            assert embedding.register is not None
            embedding.register.save(paths[2], OWNER)
        self.marked = load_model(paths[0], device=self.device)
        self.watermark = Watermark.load(paths[1])
        self.register = Register.load(paths[2], OWNER)
        self.verifier = Verifier(
            self.watermark,
            OWNER,
            register=self.register,
            alpha=ALPHA,
            power=0.999,
            align=False,
            device=self.device,
        )
        self.quick: bool = arguments.quick
        self.only: list[str] = arguments.only
        self.data: str = arguments.data.name
        self.features: Tensor | None = None
        file = self.folder / "tracing.json"
        self.rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
        self.file = file

    def copies(self, count: int) -> list[nn.Module]:
        """The copies of the first recipients."""
        return [self.register.copy(OWNER, self.marked, name) for name in self.register.names[:count]]

    def suspects(self) -> Iterator[tuple[str, str, int, Callable[[], nn.Module]]]:
        """Section, name, how many of the first recipients had a part, and what makes the suspect."""
        one = partial(self.copies, 1)
        yield "innocent", "the original, unmarked", 0, lambda: self.original
        yield "innocent", "the marked model, nobody's copy", 0, lambda: self.marked
        yield "alone", "as it is", 1, lambda: one()[0]
        yield "alone", "mean with the original", 1, lambda: merged([*one(), self.original], MERGES["mean"])
        attacks = [a for a in suite("full", self.verifier.watermark.site.depth) if a.name in SUITE]
        for attack in [*attacks, *(a for a in adaptive_attacks() if a.name in ADAPTIVE)]:
            if self.quick and attack.steps != 0 and attack.family not in ("pruning", "quantisation", "noise"):
                continue
            yield "alone", attack.name, 1, partial(self.attacked, attack, one)
        for count in COLLUDERS:
            for name, merge in MERGES.items():
                yield "together", name, count, lambda c=count, m=merge: merged(self.copies(c), m)
            yield "together", "blocks in turn", count, lambda c=count: interleaved(self.copies(c))
        prune = next(a for a in attacks if a.name == "40% of weights")
        tune = next(a for a in attacks if a.name == "all, 1e-4")
        for count in (2, 3, 4):

            def mean(c: int = count) -> list[nn.Module]:
                return [merged(self.copies(c), MERGES["mean"])]

            yield "together", "mean, then 40% of weights pruned", count, partial(self.attacked, prune, mean)
            if self.quick:
                continue
            yield "together", "mean, then fine-tuned", count, partial(self.attacked, tune, mean)

            def one_tuned(c: int = count) -> nn.Module:
                first, *others = self.copies(c)
                return merged([self.attacked(tune, lambda: [first]), *others], MERGES["mean"])

            yield "together", "one fine-tuned, then mean", count, one_tuned

    def attacked(self, attack: Any, models: Callable[[], list[nn.Module]]) -> nn.Module:
        made: nn.Module = attack.run(models()[0], self.task.train, 0, attack.strength, **attack.settings)
        return made

    def measure(self) -> None:
        """All rows, as far as they are not there yet; each is written as soon as it is there."""
        done = {(row["section"], row["suspect"], row["colluders"]) for row in self.rows}
        for section, name, count, make in self.suspects():
            if (section, name, count) in done or not any(fnmatch(name, pattern) for pattern in self.only):
                continue
            model = make()
            verdict = self.verifier.judge(model)
            trace = verdict.trace
            assert trace is not None
            accused = [who for who, _ in trace.accused]
            guilty = self.register.names[:count]
            self.rows.append(
                {
                    "section": section,
                    "suspect": name,
                    "colluders": count,
                    "named": sum(who in guilty for who in accused),
                    "innocents accused": sum(who not in guilty for who in accused),
                    "p, surest": float(trace.p_values[:count].min()) if count else None,
                    "p, least innocent": float(trace.p_values[count:].min()),
                    "owner's p": verdict.p_value,
                    "R": verdict.detection_rate,
                    "cosine": self.cosine(model),
                }
            )
            self.file.write_text(json.dumps(self.rows, indent=1))
            print(*(f"{k} {v}" for k, v in self.rows[-1].items()), sep=", ", flush=True)

    def cosine(self, model: nn.Module) -> float:
        """Of features with the original's, on test images: the lower mean of class token and mean patch."""
        if self.features is None:
            self.features = features(self.original, self.task.test.images)
        found = features(model, self.task.test.images)
        return float(torch.cosine_similarity(found, self.features, dim=-1).mean(dim=0).min())

    def innocents(self) -> list[tuple[float, int]]:
        """Of `INNOCENTS` codewords drawn for nobody, how many reach each level on what four made."""
        biases = draw_biases(OWNER, self.register.positions)
        words = draw_codewords(OWNER, self.register.names[:4], biases)
        answers = (2.0 * words - 1).mean(axis=0)
        answers += 0.5 * np.random.default_rng(0).normal(size=len(answers))
        taps = len(self.register.reference)
        test = AccusationTest.of(answers.reshape(taps, -1), np.zeros((taps, len(answers) // taps)), biases)
        found = np.zeros(len(LEVELS), dtype=int)
        generator = np.random.default_rng(1)
        for _ in range(INNOCENTS // 10_000):
            drawn = generator.random((10_000, len(biases)), dtype=np.float32) < biases
            p_values = test.p_values(test.scores(drawn))
            found += [(p_values <= level).sum() for level in LEVELS]
        return list(zip(LEVELS, found.tolist(), strict=True))

    def fidelity(self, count: int = 5) -> list[tuple[str, float]]:
        """The cosine of the marked model, and of some copies."""
        models = {"nobody's": self.marked} | dict(zip(self.register.names, self.copies(count), strict=False))
        return [(name, self.cosine(model)) for name, model in models.items()]

    def seconds(self) -> dict[str, float]:
        """What copies and traces take."""
        started = time.perf_counter()
        self.register.weights(OWNER, self.marked, self.register.names[0])
        weights = time.perf_counter() - started
        biases = draw_biases(OWNER, self.register.positions)
        test = AccusationTest.of(
            np.random.default_rng(0).normal(size=(1, len(biases))), np.zeros((1, len(biases))), biases
        )
        started = time.perf_counter()
        for start in range(0, 100_000, 10_000):
            names = [f"anybody {i}" for i in range(start, start + 10_000)]
            test.p_values(test.scores(draw_codewords(OWNER, names, biases)))
        scored = time.perf_counter() - started
        # The blocks between the site of a CLIP ViT-L/14 and its last tap, with weights that mean nothing.
        large = nn.ModuleList([nn.Linear(4096, 1024) for _ in range(10)])
        rows = TRACED.books * 32
        changes = {
            f"{index}.weight": Change(rows * (index // 5), torch.randn(rows, 1024), torch.randn(rows, 4096))
            for index in range(len(large))
        }
        started = time.perf_counter()
        changed(large, changes, torch.ones(2 * rows, dtype=torch.bool))
        return {
            "changed matrices of a copy": weights,
            "those of a copy of a ViT-L/14, by their sizes": time.perf_counter() - started,
            "100,000 recipients scored": scored,
        }


def told(value: float | None, form: str = ".1e") -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def page(bench: Bench, model: str) -> str:
    """Everything that was measured, as Markdown."""
    register = bench.register
    count = len(register.names)
    wrong = sum(row["innocents accused"] for row in bench.rows)
    lines = [
        "# Whose copy leaked\n",
        f"{model}, marked for {count} recipients, {register.positions} positions in a codeword. A recipient "
        f"is accused at p = {ALPHA:g} over all recipients (Bonferroni). By theory alone, "
        f"{promise(register.positions, count, ALPHA)}. Innocent recipients accused in all rows: "
        f"**{wrong}**. What trains or calibrates takes {len(bench.task.train)} images of {bench.data}.\n",
        made_by(bench.device),
        "\n## One copy leaked\n",
        "| what became of it | named | innocents accused | p, surest | p, least innocent | owner's p | R | "
        "cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in bench.rows:
        if row["section"] != "together":
            lines.append(
                f"| {row['suspect']} | {row['named']} of {row['colluders']} | {row['innocents accused']} | "
                f"{told(row['p, surest'])} | {told(row['p, least innocent'])} | {told(row[OWNERS])} | "
                f"{told(row['R'], '.2f')} | {told(row.get('cosine'), '.4f')} |"
            )
    lines += [
        "\n## Recipients who collude\n",
        "Named of all colluders, the surest p, and the cosine; in bold where nobody is named.\n",
    ]
    together = [row for row in bench.rows if row["section"] == "together"]
    counts = sorted({row["colluders"] for row in together})
    lines += [
        f"| weight by weight | {' | '.join(f'{c} colluders' for c in counts)} |",
        f"|{'---|' * (len(counts) + 1)}",
    ]
    for name in dict.fromkeys(row["suspect"] for row in together):
        cells = []
        for c in counts:
            row = next((r for r in together if (r["suspect"], r["colluders"]) == (name, c)), None)
            cell = (
                "-"
                if row is None
                else f"{row['named']}, {told(row['p, surest'])} ({told(row.get('cosine'), '.3f')})"
            )
            cells.append(f"**{cell}**" if row is not None and not row["named"] else cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "\n## Innocent recipients\n",
        f"{INNOCENTS:,} codewords drawn for nobody, scored on what four colluders made:\n",
        "| p at or below | found | most to be expected on average |",
        "|---|---|---|",
        *(f"| {level:g} | {found} | {INNOCENTS * level:g} |" for level, found in bench.innocents()),
        "\n## What a copy costs\n",
        "Cosine of features with the original's, the lower of class token and mean patch, on test images.\n",
        "| copy | cosine |",
        "|---|---|",
        *(f"| {name} | {cosine:.4f} |" for name, cosine in bench.fidelity()),
        "",
        *(f"- {name}: {seconds:.2f} s" for name, seconds in bench.seconds().items()),
    ]
    return "\n".join([*lines, ""])


OWNERS = "owner's p"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--recipients", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1000, help="what attacks train on")
    parser.add_argument("--quick", action="store_true", help="no attack that trains")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of suspects")
    parser.add_argument("--device", default="cpu", help="where to compute")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    bench.measure()
    arguments.page.write_text(page(bench, Path(arguments.model).stem), encoding="utf-8")


if __name__ == "__main__":
    main()
