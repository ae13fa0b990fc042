"""Whether `compare` means what it says: independent pairs, descendants, and models made to deceive it.

    python benchmarks/descent.py --data cifar10.npz --segmentation camvid.npz --work FOLDER --out FILE.md

- *Independent*: 33 small ViTs (timm's and torchvision's constructors) are trained a little on CIFAR-10, each
  from a seed of its own, in another order of the data, by other optimisers, for other times; all 528 pairs.
  Pairs share models, but under the assumption (each model's units could be numbered in any order) any two of
  the p-values are independent: given one model, the numberings of two others are. So the share of small ones
  has the mean and the standard error that 528 separate pairs would have.
- *Same initialisation*: pairs from one seed whose data came in another order. They are relatives.
- *Descendants*: the demo model through every attack of the full suite (merges with a stranger in place of the
  original, which would be no change).
- *Removals*: the same through the adaptive suite, what a thief does to be rid of a mark. Not the slicing:
  that is done by hooks, which leave the weights as they are.
- *Hostile*: what a thief does to hide a descent, and a forger to make one up.
- *Cost*: two ViT-L/14; 1,000 sketches.

What was trained or measured lies in `--work` and is not made again. Needs some 40 minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from activemark_fast import compare, load_model
from activemark_fast.attacks import (
    distil,
    finetune,
    noise,
    permute_inside,
    permute_residual,
    reinitialise,
    rotate_residual,
)
from activemark_fast.attacks.matrices import reset_parameters
from activemark_fast.attacks.suite import suite
from activemark_fast.attacks.symmetry import _move
from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints import architecture_of, build_model, save_model
from activemark_fast.datasets import Labelled, Task, load_task, synthetic_task
from activemark_fast.descent import SHARED, Descent, Sketch
from activemark_fast.descent.basis import Procrustes
from activemark_fast.descent.matching import head_likeness, nearest
from activemark_fast.descent.sketch import ranked
from activemark_fast.descent.weights import Weights
from activemark_fast.normalisation import Preprocess

REFIT_STEPS = 150
MODELS = 33
"""528 pairs. Every fourth model is torchvision's."""
SIZES = {"width": 64, "depth": 6, "heads": 4, "patch": 8}
PREPROCESS = Preprocess((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def fresh_model(seed: int, library: str) -> Any:
    """A small ViT as its library initialises it; torchvision's own class leaves its head at zero."""
    torch.manual_seed(seed)
    if library == "timm":
        return VisionTransformer(
            img_size=32,
            patch_size=SIZES["patch"],
            embed_dim=SIZES["width"],
            depth=SIZES["depth"],
            num_heads=SIZES["heads"],
            num_classes=10,
        )
    return TorchvisionViT(
        image_size=32,
        patch_size=SIZES["patch"],
        num_layers=SIZES["depth"],
        num_heads=SIZES["heads"],
        hidden_dim=SIZES["width"],
        mlp_dim=4 * SIZES["width"],
        num_classes=10,
    )


def trained(seed: int, data: Labelled, order: int | None = None, library: str | None = None) -> nn.Module:
    """The model of a seed, trained a little; `order` seeds the order of the data and nothing else.

    Steps, learning rate and optimiser differ from seed to seed, as between people.
    """
    library = library or ("torchvision" if seed % 4 == 3 else "timm")
    model = fresh_model(seed, library)
    steps = (60, 120, 240)[seed % 3]
    if seed % 5 == 4:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, nesterov=True
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=(1e-3, 5e-4)[seed % 2], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(10_000 + (seed if order is None else order))
    for _ in range(steps):
        chosen = torch.randint(len(data), (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(data.images[chosen]), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Pool:
    """The trained models, made once and kept in a folder."""

    def __init__(self, folder: Path, data: Labelled) -> None:
        self.folder = folder
        self.data = data

    def model(self, seed: int, order: int | None = None) -> nn.Module:
        path = self.folder / f"model-{seed}-{'own' if order is None else order}.pt"
        if not path.exists():
            torch.save(trained(seed, self.data, order).state_dict(), path)
        model = fresh_model(seed, "torchvision" if seed % 4 == 3 else "timm")
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()

    def data_part(self, count: int) -> Labelled:
        return Labelled(self.data.images[:count], self.data.labels[:count])


class Results:
    """What was measured, by name, kept in a file as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def measure(self, name: str, run: Callable[[], Any]) -> Any:
        if name not in self.rows:
            self.rows[name] = run()
            self.path.write_text(json.dumps(self.rows, indent=1))
            print(name, json.dumps(self.rows[name])[:200], flush=True)
        return self.rows[name]


def facts(found: Descent) -> dict[str, Any]:
    return {
        "p": found.p_value,
        "score": found.score,
        "decision": found.decision,
        "basis": found.basis,
        "shared": len(found.shared),
        "blocks": len(found.blocks),
    }


def independent(pool: Pool) -> dict[str, Any]:
    models = [pool.model(seed) for seed in range(MODELS)]
    found = [facts(compare(a, b)) for a, b in itertools.combinations(models, 2)]
    sketches = [Sketch.of(model) for model in models]
    alike = [a.likeness(b) for a, b in itertools.combinations(sketches, 2)]
    p_values = np.array([row["p"] for row in found])
    scores = [row["score"] for row in found]
    return {
        "pairs": len(found),
        "share_at_most_0.05": float((p_values <= 0.05).mean()),
        "share_at_most_0.2": float((p_values <= 0.2).mean()),
        "smallest": float(p_values.min()),
        "at_most_1e-6": int((p_values <= 1e-6).sum()),
        "largest_score": max(scores),
        "false_alarms": sum(row["decision"] == "descent" for row in found),
        "inconclusive": sum(row["decision"] == "inconclusive" for row in found),
        "largest_sketch": max(alike),
    }


def relabelled(pool: Pool, times: int) -> dict[str, Any]:
    """One independent pair, the units and heads of one model numbered anew, again and again."""
    a, b = pool.model(0), pool.model(1)
    p_values = np.array([compare(a, permute_inside(b, None, seed, 1)).p_value for seed in range(times)])
    return {
        "times": times,
        "share_at_most_0.05": float((p_values <= 0.05).mean()),
        "share_at_most_0.2": float((p_values <= 0.2).mean()),
        "smallest": float(p_values.min()),
    }


def attacked(
    model: nn.Module, tasks: dict[str, Task], stranger: nn.Module, suite_name: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    for attack in suite(suite_name, Backbone(model).depth):
        if attack.run is None or attack.family == "slicing":
            continue

        def run(attack: Any = attack) -> dict[str, Any]:
            settings = dict(attack.settings)
            if attack.other is not None:
                settings["other"] = copy.deepcopy(stranger)
            suspect = attack.run(model, tasks[attack.task].train, 0, attack.strength, **settings)
            row = facts(compare(model, suspect)) | {"removes": attack.removes, "family": attack.family}
            return row | {"sketch": Sketch.of(model).likeness(Sketch.of(suspect))}

        name = attack.name.replace("of the original", "of a stranger") if attack.other else attack.name
        yield name if name.startswith(attack.family) else f"{attack.family}: {name}", run


def refitted(model: nn.Module, data: Labelled, steps: int) -> nn.Module:
    """All MLPs re-initialised, then fitted to give the features that they gave."""
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    view, teacher = Backbone(student), Backbone(copy.deepcopy(model))
    for block in view.blocks:
        reset_parameters(block.mlp, generator)
    parameters = [p for block in view.blocks for p in block.mlp.parameters()]
    student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(steps):
        images = data.images[torch.randint(len(data), (32,), generator=generator)]
        with torch.no_grad():
            wanted = teacher.run(teacher.stem(images), 0, teacher.depth)
        loss = nn.functional.mse_loss(view.run(view.stem(images), 0, view.depth), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.requires_grad_(True)


@torch.no_grad()
def scaled(model: nn.Module) -> nn.Module:
    """Scales moved between norms and matrices, channel by channel, and all that writes scaled alike."""
    moved: Any = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for block in moved.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            factors = torch.rand(len(norm.weight), generator=generator) * 4 + 0.25
            norm.weight *= factors
            norm.bias *= factors
            linear.weight /= factors
    return moved


@torch.no_grad()
def wider(model: nn.Module, decoys: bool) -> nn.Module:
    """Every MLP twice as wide: each unit split into two, or as many decoys that write next to nothing.

    Decoys read what the units of the model read, and write something else: who matches by one matrix falls
    for it.
    """
    moved: Any = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for block in moved.blocks:
        first, second = block.mlp.fc1, block.mlp.fc2
        units, width = first.weight.shape
        order = torch.randperm(2 * units, generator=generator)
        rows = torch.cat([first.weight, first.weight])[order]
        biases = torch.cat([first.bias, first.bias])[order]
        columns = torch.cat([second.weight / 2, second.weight / 2], dim=1)
        if decoys:
            random = torch.randn(width, units, generator=generator) * 1e-6
            columns = torch.cat([second.weight, random], dim=1)
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 2 * units), nn.Linear(2 * units, width)
        block.mlp.fc1.weight.copy_(rows)
        block.mlp.fc1.bias.copy_(biases)
        block.mlp.fc2.weight.copy_(columns[:, order])
        block.mlp.fc2.bias.copy_(second.bias)
    return moved


@torch.no_grad()
def with_idle_blocks(model: nn.Module) -> nn.Module:
    """Two blocks that add nothing put in front."""
    moved: Any = copy.deepcopy(model)
    idle = copy.deepcopy(moved.blocks[0])
    for linear in (idle.attn.proj, idle.mlp.fc2):
        linear.weight.zero_()
        linear.bias.zero_()
    moved.blocks = nn.Sequential(idle, copy.deepcopy(idle), *moved.blocks)
    return moved


@torch.no_grad()
def renumbered(innocent: nn.Module, victim: nn.Module) -> nn.Module:
    """An innocent model whose units were numbered anew: each has the number of the victim's most alike."""
    moved: Any = copy.deepcopy(innocent)
    with Weights(innocent) as mine, Weights(victim) as theirs:
        for index, block in enumerate(moved.blocks):
            a, b = theirs.block(index), mine.block(index)
            likeness = (rows(a.reads) @ rows(b.reads).T) + (rows(a.writes) @ rows(b.writes).T)
            order = torch.full((len(a.reads),), -1)
            first, second = nearest(likeness)
            order[first] = second
            left = sorted(set(range(len(order))) - set(second.tolist()))
            order[order < 0] = torch.tensor(left)
            block.mlp.fc1.weight.copy_(block.mlp.fc1.weight[order])
            block.mlp.fc1.bias.copy_(block.mlp.fc1.bias[order])
            block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, order])
    return moved


def rows(values: Tensor) -> Tensor:
    flat = values.flatten(1)
    return flat / flat.norm(dim=1, keepdim=True)


@torch.no_grad()
def rotated_to_fit(innocent: nn.Module, victim: nn.Module, blocks: list[int], rounds: int = 40) -> Tensor:
    """The map of an innocent's residual stream that makes its units most like the victim's in some blocks.

    Nearest units are matched and the best orthogonal map to them found, in turn, from three starts.
    """
    with Weights(victim) as theirs, Weights(innocent) as mine:
        pairs = [(theirs.block(i), mine.block(i)) for i in blocks]
    best = (-1.0, torch.eye(theirs.width))
    for seed in range(3):
        start = torch.randn(theirs.width, theirs.width, generator=torch.Generator().manual_seed(seed))
        basis = torch.linalg.qr(start).Q
        for _ in range(rounds):
            fit, reached = Procrustes(theirs.width), []
            for a, b in pairs:
                moved_rows = rows(b.reads @ basis), rows(b.writes @ basis)
                likeness = rows(a.reads) @ moved_rows[0].T + rows(a.writes) @ moved_rows[1].T
                first, second = nearest(likeness)
                reached.append(float(likeness[first, second].mean()))
                for ours, others in ((a.reads, b.reads), (a.writes, b.writes)):
                    fit.show(rows(ours[first]), rows(others[second]), weight=len(first) ** 0.5)
            if min(reached) > best[0]:
                best = (min(reached), basis)
            basis = fit.matrix()
    return best[1]


def heads_rotated_to_fit(
    innocent: nn.Module, victim: nn.Module, blocks: list[int], steps: int = 300
) -> Tensor:
    """The same for heads, by gradient steps on their likeness."""
    with Weights(victim) as theirs, Weights(innocent) as mine, torch.no_grad():
        pairs = [(theirs.block(i).heads, mine.block(i).heads) for i in blocks]
    width = theirs.width
    start = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) * 0.5 / width**0.5
    start.requires_grad_(True)
    inside = torch.eye(width) - 1 / width  # the map takes the all-ones vector to itself
    optimizer = torch.optim.Adam([start], lr=0.02)
    for _ in range(steps):
        skew = inside @ (start - start.T) @ inside
        basis = torch.linalg.solve(torch.eye(width) + skew, torch.eye(width) - skew)
        loss = torch.zeros(())
        for a, b in pairs:
            assert a is not None
            assert b is not None
            moved = tuple(part @ basis for part in b)
            for k in (0, 2):
                loss = loss - head_likeness(a[k : k + 2], moved[k : k + 2]).diagonal().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return basis.detach()


@torch.no_grad()
def with_basis(model: nn.Module, basis: Tensor) -> nn.Module:
    """`model` with its residual stream h moved to h @ basis, which does not change its function."""
    moved: Any = rotate_residual(model, None, 0, 1)  # folds norms and scales, and moves by a map of its own
    with Weights(model) as before, Weights(moved) as after:
        written = [torch.cat([w.block(i).writes for i in range(w.depth)]) for w in (before, after)]
    width = before.width
    own = torch.linalg.lstsq(written[0].double(), written[1].double(), driver="gelsd").solution
    own += torch.full((width, width), 1 / width, dtype=torch.float64)
    _move(moved, torch.linalg.solve(own, basis.double()))
    return moved


def hostile(pool: Pool, task: Task, results: Results) -> None:
    demo = load_model("demo")
    inside = permute_inside(demo, None, 0, 1)
    fitted = cache(lambda: refitted(demo, task.train, REFIT_STEPS))
    thieves: dict[str, Callable[[], nn.Module]] = {
        "units and heads renumbered and scaled": lambda: inside,
        "residual stream permuted": lambda: permute_residual(demo, None, 0, 1),
        "residual stream rotated": lambda: rotate_residual(demo, None, 0, 1),
        "rotated, renumbered, 30% noise": lambda: noise(rotate_residual(inside, None, 0, 1), None, 0, 0.3),
        "rotated, renumbered, fine-tuned at 3e-4": lambda: finetune(
            rotate_residual(inside, None, 0, 1), task.train, 0, 3e-4, batch_size=16
        ),
        "scales moved between norms and matrices": lambda: scaled(demo),
        "every unit split into two": lambda: wider(demo, decoys=False),
        "as many decoys as units": lambda: wider(demo, decoys=True),
        "two idle blocks in front": lambda: with_idle_blocks(demo),
        "MLPs re-initialised and fitted again": fitted,
        "the same, renumbered and rotated": lambda: rotate_residual(
            permute_inside(fitted(), None, 0, 1), None, 0, 1
        ),
        "all blocks re-initialised": lambda: reinitialise(demo, None, 0, 12),
        "distilled into a fresh model": lambda: distil(demo, task.train, 0, 3),
    }
    for name, make in thieves.items():
        results.measure(f"thief: {name}", lambda make=make: facts(compare(demo, make())))
    victim, innocent = pool.model(0), pool.model(1)
    depth = SIZES["depth"]
    several = list(range(1, depth))
    forgers: dict[str, Callable[[], nn.Module]] = {
        "innocent units renumbered to fit": lambda: renumbered(innocent, victim),
        "rotated to fit the units of one block": lambda: with_basis(
            innocent, rotated_to_fit(innocent, victim, [2])
        ),
        "rotated to fit the units of three blocks": lambda: with_basis(
            innocent, rotated_to_fit(innocent, victim, [2, 3, 4])
        ),
        "the same, then renumbered to fit": lambda: renumbered(
            with_basis(innocent, rotated_to_fit(innocent, victim, [2, 3, 4])), victim
        ),
        "rotated to fit the heads of one block": lambda: with_basis(
            innocent, heads_rotated_to_fit(innocent, victim, [2])
        ),
        "rotated to fit the heads of three blocks": lambda: with_basis(
            innocent, heads_rotated_to_fit(innocent, victim, [2, 3, 4])
        ),
        "rotated to fit the heads of five blocks": lambda: with_basis(
            innocent, heads_rotated_to_fit(innocent, victim, several)
        ),
    }
    for name, make in forgers.items():
        results.measure(f"forger: {name}", lambda make=make: facts(compare(victim, make())))
    results.measure(
        "forger: trains the suspect on and calls the result the original",
        lambda: facts(compare(finetune(innocent, pool.data_part(1000), 1, 3e-4, batch_size=16), innocent)),
    )


def cost(folder: Path) -> dict[str, Any]:
    """Two ViT-L/14, compared by the command in a process of its own: seconds and memory."""
    name, spec = "vit_large_patch14_clip_224.openai", "timm:vit_large_patch14_clip_224.openai"
    paths = {}
    for file, seed in (("a", 0), ("b", 1)):
        paths[file] = folder / f"large-{file}.safetensors"
        if not paths[file].exists():
            torch.manual_seed(seed)
            import timm

            save_model(timm.create_model(name), paths[file], spec)
    found = {}
    for case, pair in (("independent", ("a", "b")), ("the same", ("a", "a"))):
        command = [
            sys.executable,
            "-m",
            "activemark_fast",
            "compare",
            *(str(paths[one]) for one in pair),
            "--json",
        ]
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "2"})
        output, _ = process.communicate()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found[case] = {
            "seconds": time.perf_counter() - started,
            "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "cores": len(os.sched_getaffinity(0)),
            # What children used at most, so far: only the first process tells its own.
            "peak_gb_so_far": after.ru_maxrss / 1e6,
            "decision": json.loads(output)["decision"],
        }
    for path in paths.values():
        path.unlink()
    return found


def ranking() -> dict[str, Any]:
    draws = np.random.default_rng(0)
    many = [Sketch(1024, draws.integers(-127, 128, (24, 128)).astype(np.int8)) for _ in range(1000)]
    started = time.perf_counter()
    ranked(many[0], many)
    return {"sketches": 1000, "seconds": time.perf_counter() - started, "bytes_each": many[0].values.nbytes}


def page(found: dict[str, Any], attacks: int, images: int) -> str:
    """docs/descent.md."""
    alone, same = found["independent pairs"], found["same initialisation"]
    anew, sketches = found["renumbered"], found["ranking"]
    lines = [
        "# Descent without a mark: what was measured",
        "",
        f"Written by `python benchmarks/descent.py --images {images}` on "
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {platform.machine()}, torch {torch.__version__}. What each "
        f"row is: `benchmarks/descent.py`. The p-value is exact if nobody who saw both models has renumbered "
        f"one of them; the score is no p-value, and a descent is claimed from {SHARED}.",
        "",
        "## Independent pairs",
        "",
        "| | |",
        "|---|---|",
        f"| pairs | {alone['pairs']} |",
        f"| p ≤ 0.05 | {alone['share_at_most_0.05']:.3f} |",
        f"| p ≤ 0.2 | {alone['share_at_most_0.2']:.3f} |",
        f"| smallest p | {alone['smallest']:.2g} |",
        f"| p ≤ 1e-6 | {alone['at_most_1e-6']} |",
        f"| largest score | {alone['largest_score']:.3f} |",
        f"| called a descent, inconclusive | {alone['false_alarms']}, {alone['inconclusive']} |",
        f"| largest likeness of two sketches | {alone['largest_sketch']:.2f} |",
        f"| one pair, renumbered {anew['times']} times: p ≤ 0.05, p ≤ 0.2, smallest | "
        f"{anew['share_at_most_0.05']:.3f}, {anew['share_at_most_0.2']:.3f}, {anew['smallest']:.2g} |",
        "",
        "p pays for two tests in two bases, so that small ones are rarer than their size says.",
        "",
        "Of one initialisation, the data in another order (relatives, by their common ancestor): "
        f"{sum(row['decision'] == 'descent' for row in same)} of {len(same)} called a descent, scores "
        f"{min(row['score'] for row in same):.2f} to {max(row['score'] for row in same):.2f}, p at most "
        f"{max(row['p'] for row in same):.2g}.",
        "",
    ]
    measured = sum(name.startswith("descendant: ") for name in found)
    trained_on = f"attacks trained on {images} images"
    for title, prefix in (
        (f"Descendants of the demo model ({measured} of {attacks} attacks; {trained_on})", "descendant: "),
        (f"The demo model after the adaptive suite, slicing left out ({trained_on})", "removal: "),
        ("Thieves: the demo model, hidden", "thief: "),
        ("Forgers: an innocent model, made to look like a descendant", "forger: "),
    ):
        lines += [
            f"## {title}",
            "",
            "| | verdict | score | blocks | p | basis | sketch |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in found.items():
            if name.startswith(prefix):
                sketch = f"{row['sketch']:.2f}" if "sketch" in row else ""
                bound = "≤ " if row["p"] < 1e-290 else ""
                lines.append(
                    f"| {name.removeprefix(prefix)} | {row['decision']} | {row['score']:.3f} | "
                    f"{row['shared']} of "
                    f"{row['blocks']} | {bound}{row['p']:.2g} | {row['basis']} | {sketch} |"
                )
        lines.append("")
    lines += [
        "## Cost",
        "",
        f"{sketches['sketches']:,} sketches of a ViT-L, {sketches['bytes_each'] / 1000:.1f} kB each, are "
        f"ranked in {sketches['seconds']:.2f} s.",
        "",
    ]
    if "cost" in found:
        times = "; ".join(
            f"{case} {row['processor_seconds']:.0f} s of processor time, {row['seconds']:.0f} s in all on "
            f"{row['cores']} core(s)"
            for case, row in found["cost"].items()
        )
        peak = max(row["peak_gb_so_far"] for row in found["cost"].values())
        lines += [
            "Two ViT-L/14 (random weights, float32 files), from the start of the process, on a machine that "
            f"did other work as well: {times}; at most {peak:.2f} GB.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--segmentation", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=160, help="that attacks train on (160)")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    results = Results(arguments.work / "results.json")
    pool = Pool(arguments.work, load_task(arguments.data, PREPROCESS, 20_000, 1).train)
    results.measure("independent pairs", lambda: independent(pool))
    results.measure(
        "same initialisation",
        lambda: [facts(compare(pool.model(seed), pool.model(seed, order=seed + 500))) for seed in range(6)],
    )
    results.measure("renumbered", lambda: relabelled(pool, 200))
    demo = load_model("demo")
    preprocess = Backbone(demo).preprocess
    tasks = {
        "similar": load_task(arguments.data, preprocess, arguments.images, 1),
        "dissimilar": synthetic_task(preprocess, arguments.images, 1),
        "segmentation": load_task(arguments.segmentation, preprocess, arguments.images, 1),
    }
    results.measure("ranking", ranking)
    hostile(pool, tasks["similar"], results)
    torch.manual_seed(1)
    stranger = build_model(architecture_of("demo"))
    attacks = list(attacked(demo, tasks, stranger, "full"))
    removals = list(attacked(demo, tasks, stranger, "adaptive"))
    every = [("descendant", attack) for attack in attacks] + [("removal", attack) for attack in removals]
    for kind, (name, run) in every:
        results.measure(f"{kind}: {name}", run)
        # After each, for it takes long: what is there is shown with how much of it is there.
        arguments.out.write_text(page(results.rows, len(attacks), arguments.images))
    results.measure("cost", lambda: cost(arguments.work))
    arguments.out.write_text(page(results.rows, len(attacks), arguments.images))


if __name__ == "__main__":
    main()
