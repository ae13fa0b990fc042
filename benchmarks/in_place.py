"""How much memory it takes to mark the tower of a larger model in place, and to verify it.

Builds a model as LLaVA of random weights, its tower's of the size that trained ones have. Told is what the
process held at most over what it held with the model loaded, of small images, so that activations are few.
Counted all the same: photographs that come with the package, activations, and their statistics.

    MALLOC_MMAP_THRESHOLD_=131072 OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/in_place.py
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
import transformers
from families import trained
from measure import PeakMemory
from models import made_by
from torch import nn

from activemark_fast import Key, embed, verify

KEY = Key(b"benchmarks/in_place.py: a key of no worth")
CPU = torch.device("cpu")


def llava(width: int, blocks: int, side: int, layers: int) -> nn.Module:
    """A tower of `blocks` of `width`, and a language model of so many layers of 64 MiB."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        image_size=side,
        patch_size=16,
    )
    text = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=1000,
    )
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text)
    )
    trained(model.model.vision_tower, 0)
    return model.eval()


def size(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--layers", type=int, default=55, help="of the language model, 64 MiB each")
    arguments = parser.parse_args()
    model = llava(arguments.width, arguments.blocks, arguments.side, arguments.layers)
    tower = size(model.get_submodule("model.vision_tower"))
    print(made_by())
    print(f"A model of {size(model) / 2**20:.0f} MiB, its tower of {tower / 2**20:.0f} MiB.\n")
    print("| | MiB | towers | s |\n|---|---|---|---|")
    warnings.simplefilter("ignore", RuntimeWarning)  # of targets that were missed

    def told(name: str, peak: PeakMemory, started: float) -> None:
        seconds = time.perf_counter() - started
        print(f"| {name} | {peak.bytes / 2**20:.0f} | {peak.bytes / tower:.2f} | {seconds:.0f} |", flush=True)

    started = time.perf_counter()
    with PeakMemory(CPU) as peak:
        made = embed(model, KEY, bits=24, fidelity=0.97, inplace=True)
    told("`embed(inplace=True)`", peak, started)
    started = time.perf_counter()
    with PeakMemory(CPU) as peak:
        verdict = verify(model, made.watermark, KEY)
    told(f"`verify`: {verdict.decision}", peak, started)


if __name__ == "__main__":
    main()
