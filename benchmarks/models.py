"""What benchmarks have in common: the models they are run on, and where and when that was."""

from __future__ import annotations

import argparse
import datetime
import io
import platform
import shlex
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from gpu import commit
from PIL import Image
from torch import Tensor, nn

from activemark_fast import load_model
from activemark_fast.checkpoints import architecture_of, build_model

HELP = """models: files, folders of safetensors files which describe themselves, or model strings such as
demo and timm:VisionTransformer?{"img_size": 224, ...}@weights.safetensors"""


@dataclass(frozen=True)
class Model:
    """A model by its name in tables and its model string or file."""

    name: str
    spec: str | Path

    def load(self, device: str = "cpu") -> nn.Module:
        return load_model(self.spec, device=device)

    @property
    def architecture(self) -> str:
        return architecture_of(self.spec)

    def fresh(self, seed: int) -> nn.Module:
        """The same architecture with random weights."""
        torch.manual_seed(seed)
        return build_model(self.architecture).eval()


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vfm", nargs="+", required=True, metavar="MODEL", help=HELP)
    parser.add_argument("--device", default="cpu", help="where to compute")


def photographs(archive: Path) -> list[Tensor]:
    """The images of an archive with arrays `jpeg` and `offset`, each (3, H, W) uint8."""
    with np.load(archive) as arrays:
        data, offset = arrays["jpeg"], arrays["offset"]

    def decoded(start: int, stop: int) -> Tensor:
        image = Image.open(io.BytesIO(data[start:stop].tobytes()))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    return [decoded(*pair) for pair in pairwise(offset)]


def models(given: list[str]) -> list[Model]:
    """The models of `--vfm`, in the order given; those of a folder in the order of their names."""
    found = []
    for spec in given:
        path = Path(spec)
        if path.is_dir():
            found += [Model(file.stem, file) for file in sorted(path.glob("*.safetensors"))]
        elif path.is_file():
            found.append(Model(path.stem, path))
        else:
            _, at, weights = spec.partition("@")
            found.append(Model(Path(weights).stem if at else spec.rpartition("/")[2], spec))
    return found


def made_by(device: str = "cpu") -> str:
    """The command that is running, where and when: lines of Markdown."""
    with open("/proc/cpuinfo", encoding="ascii") as file:
        names = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    machine = f"{', '.join(names) or platform.machine()}, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)} beside {machine}"
    today = datetime.datetime.now(datetime.timezone.utc).date()
    about = f"Commit {commit()}, {today}, torch {torch.__version__} on {machine}."
    return f"```\npython {shlex.join(sys.argv)}\n```\n\n{about}\n"
