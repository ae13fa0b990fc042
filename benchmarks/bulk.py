"""Bulk verification: its verdicts and speed, its journal under kill -9, its memory.

    .venv/bin/python benchmarks/bulk.py speed  [--architecture demo] [--bf16] [--suspects 50] [--loop 6]
    .venv/bin/python benchmarks/bulk.py kills  [--kills 20]
    .venv/bin/python benchmarks/bulk.py memory [--suspects 1000]
    .venv/bin/python benchmarks/bulk.py stacking [--suspects 16]
    .venv/bin/python benchmarks/bulk.py blocks
    .venv/bin/python benchmarks/bulk.py hostile [--suspects 2000]

`speed` compares with a loop of `verify` and with the plain recipe (load, all blocks, all images), both over
`--loop` of the readable suspects, per suspect, and with the disk: the files are read from it, not from the
system's cache. `--bf16`: the models' weights are. All in one run, on CUDA if there is a device. `stacking`
runs models through their first 11 blocks, one after the other and with stacked weights, on as many images as
looks take. `blocks` reads marked demo models of which each block in turn was dropped, doubled, exchanged with
the next, dropped while another was doubled, or has one before it that adds next to nothing (1/1000 of what it
wrote). `hostile` sweeps innocent models in all forms that the tests know (docs/forms.md), most of them with
bytes changed, put in, taken out or cut off, and pickles that would run a command.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import random
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from activemark_fast import Key, Watermark, embed, load_model, save_model, verify, verify_many
from activemark_fast.backbone import Backbone
from activemark_fast.bulk import read_journal
from activemark_fast.checkpoints import architecture_of, build_model
from activemark_fast.codec.codebooks import BANDS, MEASURED_IMAGES, SiteMeasure, codebooks, draw_sent
from activemark_fast.codec.passive import BAND_NAMES
from activemark_fast.marking.suffix import run_to_taps, site_activations
from activemark_fast.p_value import bit_scores, sign_flip_p_value
from activemark_fast.runtime import resolve_autocast
from activemark_fast.triggers import trigger_images

KEY = Key(b"benchmark: a key of no secrecy")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WANTED = {"match": "match", "innocent": "no match", "broken": None}


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("echo executed",)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def noisy(model: nn.Module, seed: int) -> nn.Module:
    disturbed = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in disturbed.parameters():
            if parameter.numel() > 1:
                parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    return disturbed


def make(folder: Path, spec: str, suspects: int, dtype: torch.dtype = torch.float32) -> Watermark:
    """A fifth of the suspects match, three fifths are innocent, a fifth is broken or hostile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        architecture = architecture_of(spec)
        original = load_model(spec) if spec == "demo" else build_model(architecture).eval()
        original.to(DEVICE, dtype)
        made = embed(original, KEY, architecture=architecture)
    for name in WANTED:
        (folder / name).mkdir()
    for index in range(suspects // 5):
        save_model(
            noisy(made.model, index) if index else made.model,
            folder / "match" / f"{index}.safetensors",
            architecture,
        )
        path = folder / "broken" / f"{index}.pt"
        if index % 3 == 0:
            torch.save({"model": Bomb()}, path)
        elif index % 3 == 1:
            torch.save(original.state_dict(), path)
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.write_bytes(os.urandom(4096))
    for index in range(suspects - 2 * (suspects // 5)):
        save_model(
            noisy(original, 100 + index) if index else original,
            folder / "innocent" / f"{index}.safetensors",
            architecture,
        )
    return made.watermark


def plain_recipe(path: Path, watermark: Watermark) -> float:
    """Loads the suspect, runs all blocks on all images, and reads what is injected; the p-value."""
    backbone = Backbone(load_model(path, device=DEVICE))
    autocast = resolve_autocast("auto", DEVICE)
    site, bits, stretched = watermark.site, watermark.bits, KEY.stretched()
    pixels = trigger_images(None, KEY, watermark.preprocess, watermark.images).pixels
    sent = draw_sent(stretched, "verify", len(pixels), bits)
    scores: dict[str, list[int]] = {band.name: [] for band in BANDS}
    with torch.no_grad():
        activations = site_activations(backbone, pixels, site.block, autocast)
        measured = SiteMeasure.of(activations.output[:MEASURED_IMAGES], site.prefix_tokens)
        for book, messages in zip(codebooks(stretched, site, bits, measured), sent, strict=True):
            codec, total = book.to(DEVICE), torch.zeros(len(book.taps), bits, dtype=torch.int64)
            for message in messages.to(DEVICE).unbind(dim=1):
                with autocast(backbone.dtype):
                    decoded, stream = run_to_taps(backbone, codec, activations, message, site.block)
                    backbone.run(stream, codec.taps[-1] + 1, backbone.depth)
                total += torch.tensor([bit_scores(read.logits, message) for read in decoded.values()])
            scores[book.band.name] += total.flatten().tolist()
    return len(BAND_NAMES) * min(sign_flip_p_value(of_band) for of_band in scores.values())


def forget(folder: Path) -> None:
    """Makes the next reader of these files read them from the disk."""
    for path in folder.rglob("*.*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speed(args: argparse.Namespace, folder: Path) -> None:
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    watermark = make(folder, args.architecture, args.suspects, dtype)
    paths = [*sorted((folder / "match").iterdir()), *sorted((folder / "innocent").iterdir())]
    some = paths[:: max(1, len(paths) // args.loop)][: args.loop]
    list(verify_many(some[0], watermark, KEY, device=DEVICE))  # imports and warm-up
    forget(folder)
    called = time.perf_counter()
    running = verify_many(folder, watermark, KEY, device=DEVICE, journal=folder / "journal.jsonl")
    ready = time.perf_counter()
    results = list(running)
    ended = time.perf_counter()
    bulk = (ended - called) / len(results)
    good = [r for r in results if r.verdict is not None]
    forget(folder)
    started = time.perf_counter()
    disk = sum(len(path.read_bytes()) for path in paths) / (time.perf_counter() - started)
    forget(folder)
    started = time.perf_counter()
    for path in some:
        verify(load_model(path, device=DEVICE), watermark, KEY)
    loop = (time.perf_counter() - started) / len(some)
    forget(folder)
    started = time.perf_counter()
    for path in some:
        plain_recipe(path, watermark)
    plain = (time.perf_counter() - started) / len(some)
    read = sum(result.bytes_read for result in good)
    right = sum(
        (None if r.verdict is None else r.verdict.decision) == WANTED[Path(r.suspect).parent.name]
        for r in results
    )
    row = {
        "device": torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "architecture": args.architecture[:40],
        "suspects": len(results),
        "right": right,
        "images read, mean": sum(r.verdict.images for r in good if r.verdict is not None) / len(good),
        "suspects a minute": 60 / bulk,
        "over a loop of verify (readable suspects only)": loop / (bulk * len(results) / len(good)),
        "over the plain recipe (readable suspects only)": plain / (bulk * len(results) / len(good)),
        "seconds before the first suspect": ready - called,
        "GB read": read / 1e9,
        "the disk's GB a second": disk / 1e9,
        "bytes a second over the disk's, after that": read / (ended - ready) / disk,
    }
    row = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
    print(json.dumps(row, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(row))


def kills(args: argparse.Namespace, folder: Path) -> None:
    watermark = make(folder, args.architecture, args.suspects)
    journal = folder / "journal.jsonl"
    whole = list(verify_many(folder, watermark, KEY))
    draws = random.Random(0)
    happened = 0
    size = 0
    while happened < args.kills:
        process = multiprocessing.get_context("fork").Process(target=sweep, args=(folder, watermark, journal))
        process.start()
        while process.is_alive() and (journal.stat().st_size if journal.exists() else 0) <= size:
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 0.3))  # some time after it has made headway
        process.kill()
        process.join()
        happened += 1
        size = journal.stat().st_size
        print(f"kill {happened}: {len(read_journal(journal))} results", flush=True)
    sweep(folder, watermark, journal)
    lines = read_journal(journal)
    got = {line["suspect"]: (line["error"], line["verdict"]) for line in lines}
    wanted = {r.suspect: (r.error, None if r.verdict is None else r.verdict.to_dict()) for r in whole}
    same = json.dumps(got, sort_keys=True) == json.dumps(wanted, sort_keys=True)
    print(f"{happened} kills: {len(lines)} lines, {len(got)} suspects of {len(whole)}, same results: {same}")


def sweep(folder: Path, watermark: Watermark, journal: Path) -> None:
    torch.set_num_threads(1)
    for _ in verify_many(folder, watermark, KEY, journal=journal, resume=True):
        pass


def memory(args: argparse.Namespace, folder: Path) -> None:
    watermark = make(folder, args.architecture, 50)
    files = sorted(path for name in WANTED for path in (folder / name).iterdir())
    (folder / "links").mkdir()
    for index in range(args.suspects):
        os.link(files[index % len(files)], folder / "links" / f"{index:05}{files[index % len(files)].suffix}")
    seen = []
    for done, _ in enumerate(verify_many(folder / "links", watermark, KEY), start=1):
        if done >= 50 and (done - 50) % 50 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
            print(f"after {done} suspects: {seen[-1]:.1f} MB", flush=True)
    print(f"{args.suspects} suspects: at most {max(seen) / seen[0] - 1:+.1%} over what it was after 50")


@torch.no_grad()
def stacking(args: argparse.Namespace, folder: Path) -> None:
    original = (
        load_model("demo")
        if args.architecture == "demo"
        else build_model(architecture_of(args.architecture)).eval()
    )
    count = 2
    while count <= args.suspects:
        views = [Backbone(noisy(original, index).to(DEVICE)) for index in range(count)]
        models = [nn.Sequential(*view.blocks[:11]) for view in views]
        weights = torch.func.stack_module_state(models)
        skeleton = copy.deepcopy(models[0])

        def stacked(tokens: Tensor, weights: Any = weights, skeleton: nn.Module = skeleton) -> Tensor:
            def one(state: Any, x: Tensor) -> Tensor:
                return torch.func.functional_call(skeleton, state, (x,))

            return torch.func.vmap(one)(weights, tokens)

        def in_turn(tokens: Tensor, models: list[nn.Module] = models) -> Tensor:
            return torch.stack([model(x) for model, x in zip(models, tokens, strict=True)])

        for images in (8, 16, 32):
            tokens = torch.randn(count, images, views[0].num_tokens, views[0].width, device=DEVICE)
            torch.testing.assert_close(stacked(tokens), in_turn(tokens), rtol=1e-3, atol=1e-3)
            ratio = fastest(in_turn, tokens) / fastest(stacked, tokens)
            print(f"{count} models, {images} images: stacked {ratio:.2f} times as fast", flush=True)
        count *= 2


def blocks(args: argparse.Namespace, folder: Path) -> None:
    original = load_model(args.architecture)
    depth = Backbone(original).depth
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        marked = embed(original.to(DEVICE), KEY)
    state = {name: tensor.cpu() for name, tensor in marked.model.state_dict().items()}
    whole = list(range(depth))
    changes = {
        "dropped": [(f"{i}", [*whole[:i], *whole[i + 1 :]]) for i in whole],
        "doubled": [(f"{i}", [*whole[: i + 1], *whole[i:]]) for i in whole],
        "exchanged": [(f"{i}", [*whole[:i], i + 1, i, *whole[i + 2 :]]) for i in whole[:-1]],
        "dropped, the fifth after it doubled": [
            (f"{i}", [j for j in whole if j != i for _ in range(1 + (j == (i + 5) % depth))]) for i in whole
        ],
        "quiet": [(f"{i}", [*whole[:i], -1, *whole[i:]]) for i in whole],
    }
    for change, orders in changes.items():
        for name, order in orders:
            torch.save(rearranged(state, order), folder / f"{change}-{name}.pt")
    paths = sorted(folder.glob("*.pt"), key=lambda path: int(path.stem.rpartition("-")[2]))
    architecture = architecture_of(args.architecture)
    told: dict[str, list[str]] = {change: [] for change in changes}
    for result in verify_many(paths, marked.watermark, KEY, architecture, device=DEVICE, in_order=True):
        change, _, name = Path(result.suspect).stem.rpartition("-")
        verdict = result.verdict
        assert verdict is not None, result.error
        told[change].append(f"{name} {verdict.decision} {verdict.p_value:.1e}")
    for change, verdicts in told.items():
        matches = sum(" match " in verdict for verdict in verdicts)
        print(f"{change}: a match after {matches} of {len(verdicts)}; {', '.join(verdicts)}", flush=True)


def rearranged(state: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """The state with its blocks in this order; -1 is block 0, writing next to nothing."""
    made = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for new, old in enumerate(order):
        for name, tensor in state.items():
            if name.startswith(f"blocks.{max(old, 0)}."):
                quiet = old < 0 and ("proj" in name or "fc2" in name)
                made[f"blocks.{new}.{name.split('.', 2)[2]}"] = tensor * (1e-3 if quiet else 1)
    return made


def hostile(args: argparse.Namespace, folder: Path) -> None:
    tests = Path(__file__).parents[1] / "tests"
    sys.path += [str(tests), str(tests / "bulk")]
    from forms import FORMS
    from small import mark
    from test_hostile import tampered
    from tiny import vit

    marked, draw, sentinel = mark(), random.Random(0), folder / "ran"
    whole, files = folder / "whole", folder / "files"
    whole.mkdir()
    files.mkdir()
    for index, form in enumerate(FORMS):
        form.write(vit(seed=3), whole / str(index))
    torch.save({"state_dict": vit(seed=3).state_dict(), "x": Touch(sentinel)}, whole / "bomb")
    contents = [path.read_bytes() for path in sorted(whole.iterdir()) if path.is_file()]
    for index in range(args.suspects):
        content = contents[index % len(contents)]
        (files / f"{index:05}.bin").write_bytes(
            tampered(content, draw) if index >= len(contents) else content
        )
    told: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest = 0.0
    for result in verify_many(files, *marked.arguments(), max_bytes=50_000_000):
        told[result.verdict.decision if result.verdict else "error" if result.error else "not a model"] += 1
        slowest = max(slowest, result.seconds)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(
        f"{args.suspects} files, {sum(told.values())} told: {dict(told)}; code was run: {sentinel.exists()}; "
        f"at most {more:.0f} MB more memory than before; the slowest took {slowest:.1f} s"
    )


def fastest(run: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    """Seconds, the best of 5."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        run(tokens).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "kills", "memory", "stacking", "blocks", "hostile"))
    parser.add_argument("--architecture", default="demo")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what speed measures into it, too")
    parser.add_argument("--suspects", type=int)
    parser.add_argument("--loop", type=int, default=6)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    args.suspects = args.suspects or {"memory": 1000, "stacking": 16, "hostile": 2000}.get(args.what, 50)
    with TemporaryDirectory() as folder:
        modes = (speed, kills, memory, stacking, blocks, hostile)
        next(mode for mode in modes if mode.__name__ == args.what)(args, Path(folder))


if __name__ == "__main__":
    main()
