"""Whether tensors that a model's users never load can clear it: decoys beside a marked model's own weights.

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests:tests/bulk python benchmarks/decoys.py

A loader that is not strict passes over names it does not know. So a thief can put noise into the file of a
marked model, under spellings that `verify` reads, too. Here the matrices of two blocks, or of all, get a
decoy in every spelling that the package knows: wrappers before the name, roles behind it, names of other
libraries.
Prints which files are called what, and exits with 1 if one of a marked model is called "no match".
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from small import mark
from torch import Tensor

from activemark_fast import verify_many
from activemark_fast.checkpoints.names import _BLOCK, _BLOCK_TENSORS

BEFORE = (
    *("module.", "_orig_mod.", "model.", "vision_model.", "ema.", "encoder.", "visual.", "base_model.model."),
    *("language_model.model.", "0.", "state_dict.", "_fsdp_wrapped_module."),
)
BEHIND = (
    *("._data", "_orig", "_g", "_v", "_u", ".kernel", ".original", ".absmax", ".SCB", "._scale", ".scale"),
    *(".lora_A.weight", ".lora_B.weight", "_mask", "_scale"),
)
MODULES = (
    *("._packed_params._packed_params.0", ".parametrizations.weight.original", ".qweight", ".kernel"),
    *(".base_layer.weight", ".modules_to_save.default.weight", ".original_module.weight", ".embedding"),
)
BLOCKS = (
    *("layers.", "encoder.layer.", "encoder.layers.", "transformer.resblocks.", "blocks.0.", "blocks.00"),
    *("encoder.layers.encoder_layer_", "Transformer.encoderblock_", "blocks.module.", "decoder.layers."),
)


def spellings() -> Iterator[tuple[str, Callable[[str], str]]]:
    """What is made of the name of a matrix, "blocks.3.mlp.fc2.weight"."""
    for start in BEFORE:
        yield f"{start}*", lambda name, start=start: start + name  # type: ignore[misc]
    for end in BEHIND:
        yield f"*{end}", lambda name, end=end: name + end  # type: ignore[misc]
    for end in MODULES:
        yield f"*{end}", lambda name, end=end: name.removesuffix(".weight") + end  # type: ignore[misc]
    for start in BLOCKS:
        yield f"{start}*", lambda name, start=start: name.replace("blocks.", start, 1)  # type: ignore[misc]
    yield "slashes", lambda name: name.replace(".", "/")
    for column in range(max(len(aliases.split()) for aliases in _BLOCK.values())):

        def spelled(name: str, column: int = column) -> str:
            block, own = re.fullmatch(r"(blocks\.\d+\.)(.+)\.weight", name).groups()  # type: ignore[union-attr]
            aliases = _BLOCK[own].split()
            return f"{block}{aliases[column % len(aliases)]}.weight"

        yield f"spelling {column}", spelled
    for own in ("attn.qkv.weight", "ls1", "ls2"):
        for alias in _BLOCK_TENSORS[own].split():
            yield (
                alias,
                lambda name, alias=alias: f"{name.partition('.mlp')[0].partition('.attn')[0]}.{alias}",
            )  # type: ignore[misc]


def files(state: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """State dicts of the model with decoys, by what they are; decoys come first, or last."""
    for which, pattern in (("blocks 3, 4", "[34]"), ("all blocks", r"\d")):
        matrices = [
            name
            for name in state
            if re.fullmatch(rf"blocks\.{pattern}\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight", name)
        ]
        for how, spelled in spellings():
            noise = {spelled(name): state[name].std() * torch.randn_like(state[name]) for name in matrices}
            noise = {name: tensor for name, tensor in noise.items() if name not in state}
            if noise:
                yield f"{how}, {which}, before", noise | state
                yield f"{how}, {which}, behind", state | noise


def main() -> int:
    torch.manual_seed(0)
    marked = mark()
    state = {name: tensor.contiguous() for name, tensor in marked.model.state_dict().items()}
    said: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.pt")
        for what, content in files(state):
            torch.save(content, path)
            (result,) = verify_many(path, *marked.arguments())
            decision = "error" if result.verdict is None else result.verdict.decision
            said[decision] += 1
            if decision != "match":
                print(f"{decision}: {what}: {result.error or result.verdict.reason[:150]}", flush=True)
    print(dict(said))
    return 1 if said["no match"] else 0


if __name__ == "__main__":
    sys.exit(main())
