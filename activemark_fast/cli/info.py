"""activemark info: what runs where on this machine, and whether a model can be marked."""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from activemark_fast import __version__
from activemark_fast.cli.common import (
    MODEL_HELP,
    Outcome,
    Subparsers,
    add_command,
    add_compute,
    add_tower,
    chosen_device,
)

PACKAGES = ("torch", "triton", "timm", "open_clip_torch", "transformers", "torchvision")


def add_to(commands: Subparsers) -> None:
    """Adds `info` to the command line."""
    info = add_command(
        commands,
        "info",
        _info,
        "show versions, devices, and what runs on which of them; or whether a model can be marked, and where",
        "With MODEL it exits with 0 where the model can be marked, 1 where it cannot, 2 on an error.",
    )
    info.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    add_tower(info)
    add_compute(info)


def _info(args: argparse.Namespace) -> Outcome:
    if args.model is not None:
        return _model(args)
    import torch

    versions = {"activemark_fast": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kernels = {"profile": _compiled(), "inject, decode": _triton(versions["triton"])}
    record: dict[str, object] = {
        "versions": versions,
        "cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "kernels": kernels,
    }
    lines = [
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        f"devices: {', '.join([f'CPU ({torch.get_num_threads()} threads)', *gpus])}",
        *(f"{name}: on the CPU {where['cpu']}; on CUDA {where['cuda']}" for name, where in kernels.items()),
    ]
    return Outcome(0, record, "\n".join(lines))


def _model(args: argparse.Namespace) -> Outcome:
    """Where a model can be marked, or what stands in the way."""
    from activemark_fast.backbone import NoSuchTowerError
    from activemark_fast.checkpoints import load_model
    from activemark_fast.outlook import outlook

    model, device = load_model(args.model), chosen_device(args.device)
    try:
        found = outlook(model, tower=args.tower, device=device, precision=args.precision)
    except NoSuchTowerError:
        raise
    except ValueError as error:
        return Outcome(1, {"markable": False, "reason": str(error)}, f"cannot be marked: {error}")
    return Outcome(0, {"markable": True, **asdict(found)}, str(found))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _compiled() -> dict[str, str]:
    """What computes magnitudes, or why nothing does."""
    from activemark_fast.ops.native import load_native

    try:
        native = load_native()
    except ImportError as error:
        return dict.fromkeys(("cpu", "cuda"), f"nothing: {error}")
    return {
        "cpu": f"C++ ({native.best_instructions().name})",
        "cuda": "CUDA" if native.cuda else "PyTorch, slowly: the package was built without CUDA",
    }


def _triton(found: str) -> dict[str, str]:
    """What injects and decodes."""
    kernels = "Triton (float64: PyTorch)" if found != "not installed" else "nothing: Triton is not installed"
    return {"cpu": "PyTorch", "cuda": kernels}
