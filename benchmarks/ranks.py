"""Marking by two processes (gloo) against one: the same mark, and how much sooner.

    python benchmarks/ranks.py [--width 384] [--depth 12] [--image 112]

Wall time tells how much sooner only where each process has a core of its own; processor time of the busier
process, which is printed beside it, tells how the work is divided on any machine. Gloo waits without a core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

CODE = """
import json, os, sys, time, torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from activemark_fast.embedding import embed
from activemark_fast.watermark import fingerprint
torch.set_num_threads(1)
torch.manual_seed(0)
model = VisionTransformer(**json.loads(sys.argv[1]), num_classes=0).eval()
group = None
if os.environ["WORLD_SIZE"] != "1":
    dist.init_process_group("gloo")
    group = dist.group.WORLD
wall, cpu = time.perf_counter(), time.process_time()
made = embed(model, b"activemark_fast benchmark: ranks", group=group, inplace=True)
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, fingerprint(made.model)]))
"""


def marked(count: int, shape: dict[str, int]) -> tuple[float, float, str]:
    """Seconds and CPU seconds of the slowest of `count` processes, and the fingerprint they agree on."""
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "WORLD_SIZE": str(count)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, json.dumps(shape)],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    told = [json.loads(process.communicate()[0]) for process in processes]
    (print_,) = {fingerprint for _, _, fingerprint in told}
    return max(wall for wall, _, _ in told), max(cpu for _, cpu, _ in told), print_


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--image", type=int, default=112)
    args = parser.parse_args()
    shape = {
        "img_size": args.image,
        "patch_size": 16,
        "embed_dim": args.width,
        "depth": args.depth,
        "num_heads": args.width // 64,
    }
    one, two = marked(1, shape), marked(2, shape)
    same = "the same bits" if one[2] == two[2] else "OTHER BITS"
    print(f"one process: {one[0]:.1f} s, {one[1]:.1f} CPU s; two: {two[0]:.1f} s, {two[1]:.1f} CPU s; {same}")
    print(f"{one[0] / two[0]:.2f} times as fast by the clock, {one[1] / two[1]:.2f} by processor time")


if __name__ == "__main__":
    main()
