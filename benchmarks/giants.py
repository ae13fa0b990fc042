"""A ViT larger than the memory it may take: marked and verified over its files, cut off and gone on with.

    python benchmarks/giants.py make FOLDER --width 2048 --depth 40
    python benchmarks/giants.py run FOLDER OUT [--again] [--device cuda]
    python benchmarks/giants.py cut FOLDER OUT --after 20
    python benchmarks/giants.py compare FOLDER OUT

`make` writes random weights, in bfloat16 and shards. `run` marks FOLDER into OUT and verifies it, each in a
process of its own, whose private memory (RssAnon: all but mapped files, which are page cache) is looked at
20 times a second; with `--again` it goes on with what an earlier one left; with `--device` it also tells how
much of the GPU's memory was taken. `cut` marks once whole into
OUT-whole, unless that is there, and once killed after so many seconds, again and again, and compares the
files. `compare` measures `embed` of the model in memory beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

KEY = b"activemark_fast benchmark: giants"
SHARD_BYTES = 500_000_000
ON_DEVICE = """
import torch
if device != "cpu":
    print(f"at most {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the device")
"""
MARK = (
    """
import sys, time
from pathlib import Path
from activemark_fast.giants import embed_stored
started = time.perf_counter()
name, out, key, device = sys.argv[1:]
made = embed_stored(name, out, out + ".watermark", key.encode(), device=device)
print(made.engine, made.quality, made.site_reason, sep="\\n")
print(f"embed_stored: {time.perf_counter() - started:.1f} s, {time.process_time():.1f} CPU s")
"""
    + ON_DEVICE
)
READ = (
    """
import sys, time
from activemark_fast.giants import verify_stored
from activemark_fast.watermark import Watermark
started = time.perf_counter()
name, watermark, key, device = sys.argv[1:]
print(verify_stored(name, Watermark.load(watermark), key.encode(), device=device))
print(f"verify_stored: {time.perf_counter() - started:.1f} s, {time.process_time():.1f} CPU s")
"""
    + ON_DEVICE
)
WHOLE = """
import sys, time, torch
from activemark_fast.checkpoints import load_model
from activemark_fast.embedding import embed
from activemark_fast.checkpoints.files import Checkpoint
from pathlib import Path
started = time.perf_counter()
model = load_model(sys.argv[1]).to(torch.bfloat16)
loaded = time.perf_counter()
made = embed(model, sys.argv[2].encode(), inplace=True)
print(f"load_model: {loaded - started:.1f} s, embed: {time.perf_counter() - loaded:.1f} s")
print(f"{time.process_time():.1f} CPU s")
"""


def make(folder: Path, width: int, depth: int, image: int, seed: int = 0) -> None:
    """Writes a random ViT, as timm starts one."""
    shape = {
        "img_size": image,
        "patch_size": 16,
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // 64,
        "num_classes": 0,
    }
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        state = VisionTransformer(**shape).state_dict()
    folder.mkdir()
    torch.manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD_BYTES
    where: dict[str, int] = {}
    written = 0

    def write() -> None:
        save_file(shards[-1], folder / f"{len(shards):05d}.safetensors")
        shards[-1] = {}

    for name, like in state.items():
        value = torch.empty(like.shape)
        if like.ndim > 1:
            value.normal_(std=0.02)
        else:
            value.fill_(1.0 if re.search(r"norm\d?\.weight$", name) else 0.0)
        room -= 2 * value.numel()
        if room < 0 and shards[-1]:
            write()
            shards.append({})
            room = SHARD_BYTES
        where[name] = len(shards)
        shards[-1][name] = value.bfloat16()
        written += value.numel()
    write()
    names = {i: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
    for i, name in names.items():
        os.rename(folder / f"{i:05d}.safetensors", folder / name)
    index = {"metadata": {}, "weight_map": {name: names[i] for name, i in where.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "architecture.txt").write_text(f"timm:VisionTransformer?{json.dumps(shape)}")
    print(f"{written / 1e9:.2f} billion parameters in {len(shards)} files")


def spec_of(folder: Path, weights: Path | None = None) -> str:
    """The model string of a folder that `make` wrote."""
    return f"{(folder / 'architecture.txt').read_text()}@{weights or folder}"


def size_of(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def watched(code: str, args: list[str], kill_after: float | None = None) -> tuple[int, float, int]:
    """Runs code in a process of its own.

    Returns its exit status, its seconds, and the most private memory it was seen with.
    """

    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *args])
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            peak = max(peak, int(found[1]) << 10 if found else 0)
        except OSError:
            pass
        if kill_after is not None and time.perf_counter() - started > kill_after:
            process.send_signal(signal.SIGKILL)
            process.wait()
            break
        time.sleep(0.05)
    return process.returncode, time.perf_counter() - started, peak


def remove(out: Path) -> None:
    """What an earlier run left."""
    for path in (out, out.parent / f".{out.name}.work"):
        shutil.rmtree(path, ignore_errors=True)
    Path(f"{out}.watermark").unlink(missing_ok=True)


def told(what: str, status: int, seconds: float, peak: int) -> None:
    """Prints what a process came to."""
    print(
        f"{what}: exit {status}, {seconds:.1f} s, peak {peak / 2**30:.2f} GiB of private memory", flush=True
    )


def run(folder: Path, out: Path, again: bool, device: str) -> None:
    """Marks and verifies."""
    if not again:
        remove(out)
    size = size_of(folder)
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    print(f"{size / 1e9:.2f} GB, read once in {time.perf_counter() - started:.1f} s", flush=True)
    told("mark", *watched(MARK, [spec_of(folder), str(out), KEY.decode(), device]))
    read = [spec_of(folder, out), f"{out}.watermark", KEY.decode(), device]
    told("verify", *watched(READ, read))


def cut(folder: Path, out: Path, after: float) -> None:
    """Marks once whole, unless that is there, and once with kills; the files must be the same."""
    whole = Path(f"{out}-whole")
    remove(out)
    if not Path(f"{whole}.watermark").exists():
        remove(whole)
        told("whole", *watched(MARK, [spec_of(folder), str(whole), KEY.decode(), "cpu"]))
    status, kills = -1, 0
    while status != 0:
        status, seconds, peak = watched(MARK, [spec_of(folder), str(out), KEY.decode(), "cpu"], after)
        told("cut off" if status else "gone on", status, seconds, peak)
        kills += status != 0
        after *= 1.3
    names = sorted(path.name for path in whole.iterdir())
    same = all((whole / name).read_bytes() == (out / name).read_bytes() for name in names)
    same &= Path(f"{whole}.watermark").read_bytes() == Path(f"{out}.watermark").read_bytes()
    print(f"{kills} kills, {len(names)} files and the watermark {'the same' if same else 'DIFFERENT'}")


def compare(folder: Path, out: Path) -> None:
    """Times the model in memory beside the model over its files, in turns."""
    for _ in range(2):
        remove(out)
        told("over files", *watched(MARK, [spec_of(folder), str(out), KEY.decode(), "cpu"]))
        told("in memory", *watched(WHOLE, [spec_of(folder), KEY.decode()]))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("make", "run", "cut", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=40)
    parser.add_argument("--image", type=int, default=64, help="pixels a side")
    parser.add_argument("--again", action="store_true", help="go on with what an earlier run left")
    parser.add_argument("--after", type=float, default=20.0)
    parser.add_argument("--device", default="cpu", help="where `run` computes")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.width, args.depth, args.image)
    elif args.what == "run":
        run(args.folder, args.out, args.again, args.device)
    elif args.what == "cut":
        cut(args.folder, args.out, args.after)
    else:
        compare(args.folder, args.out)


if __name__ == "__main__":
    main()
