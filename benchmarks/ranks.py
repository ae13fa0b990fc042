"""Marking by two processes (gloo) against one: the same mark, and how much sooner.

    python benchmarks/ranks.py [--width 384] [--depth 12] [--image 112]

Wall time tells how much sooner only where each process has a core of its own, and two virtual cores are often
two threads of one: so two processes that know nothing of each other are timed, too. What they get done over
one alone is what two cores of this machine can do. Gloo waits without a core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

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


def marked(ranks: Sequence[int], shape: dict[str, int], port: int) -> tuple[float, float, str]:
    """Seconds and CPU seconds of the slowest of some processes at once, and the fingerprint they agree on.

    ranks: how many processes each group has, which marks one model.
    """
    processes = []
    for group, count in enumerate(ranks):
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + group), "WORLD_SIZE": str(count)}
        processes += [
            subprocess.Popen(
                [sys.executable, "-c", CODE, json.dumps(shape)],
                env=os.environ | common | {"RANK": str(rank)},
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
    one, apart, two = (marked(ranks, shape, 29511 + 2 * i) for i, ranks in enumerate([(1,), (1, 1), (2,)]))
    same = "the same bits" if one[2] == two[2] else "OTHER BITS"
    print(
        f"one process: {one[0]:.1f} s, {one[1]:.1f} CPU s; two at once, each on its own: {apart[0]:.1f} s, "
        f"{apart[1]:.1f} CPU s; two together: {two[0]:.1f} s, {two[1]:.1f} CPU s; {same}"
    )
    print(
        f"two together are {one[0] / two[0]:.2f} times as fast as one, {apart[0] / two[0]:.2f} times as one "
        f"beside another; two cores of this machine do {2 * one[0] / apart[0]:.2f} times the work of one"
    )


if __name__ == "__main__":
    main()
