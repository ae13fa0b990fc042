"""What `verify` and `report` share: one suspect, named by a path or a model string, and its verdict."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activemark_fast.cli.common import MODEL_HELP, chosen_device

if TYPE_CHECKING:
    from torch import nn

    from activemark_fast.bulk import SuspectResult
    from activemark_fast.commitment import Commitment
    from activemark_fast.key import Key
    from activemark_fast.verdict import Verdict
    from activemark_fast.watermark import Watermark


@dataclass(frozen=True)
class Judged:
    """A suspect, loaded, and what came of it. architecture, path: None where a model string was given."""

    result: SuspectResult
    verdict: Verdict
    architecture: str | None
    path: Path | None
    module: nn.Module | None

    @property
    def record(self) -> dict[str, object]:
        """The verdict and how the suspect was read, as JSON types."""
        read = self.result.to_dict()
        return {**self.verdict.to_dict(), "tensors": read["tensors"], "towers": read["towers"]}

    @property
    def text(self) -> str:
        """The verdict and how the suspect was read, for people."""
        lines = [str(self.verdict)]
        if self.result.fit is not None:
            lines.append(str(self.result.fit))
        if len(self.result.towers) > 1:
            towers = ", ".join(map(repr, self.result.towers))
            lines.append(
                f"  {len(self.result.towers)} image towers: {towers}; the verdict is on the first "
                "that matches, else on that with the lowest p-value, which pays for all"
            )
        return "\n".join(lines)

    def whole(self, watermark: Watermark, args: argparse.Namespace) -> nn.Module | None:
        """The suspect as a model; None where not all of it could be read."""
        if self.path is None or self.architecture is None or self.result.fit is None:
            return self.module
        from activemark_fast.bulk import memory_limit
        from activemark_fast.checkpoints import build_model
        from activemark_fast.checkpoints.target import whole_model

        model = build_model(self.architecture).to(chosen_device(args.device))
        return whole_model(self.path, model, watermark.site, self.result.fit.tower, memory_limit())


def add_suspect(command: argparse.ArgumentParser) -> None:
    """The argument SUSPECT and the option --architecture."""
    command.add_argument(
        "suspect",
        metavar="SUSPECT",
        help="a checkpoint, which is never unpickled: a file of any usual form, or a folder as transformers, "
        f"open_clip or PEFT save it; or {MODEL_HELP}",
    )
    command.add_argument(
        "--architecture",
        metavar="STRING",
        help="what a checkpoint is loaded into, a model string without @PATH; by default what the marked "
        "model is, else what the file itself names",
    )


def judge(
    args: argparse.Namespace,
    watermark: Watermark,
    key: Key,
    commitment: Commitment | None,
    exhaustive: bool,
    **settings: Any,
) -> Judged:
    """The verdict on the suspect that `args` name, read as `verify-many` reads it but never given up early.

    exhaustive: read all images, whatever they show.
    settings: as `decision_settings` gives them, and `register`.

    Raises:
        ValueError: it cannot be read.
    """
    from activemark_fast.bulk import SuspectResult, find_suspects, memory_limit
    from activemark_fast.bulk.sweep import SweepSettings
    from activemark_fast.checkpoints import load_model
    from activemark_fast.verification import verify

    device = chosen_device(args.device)
    named, path = named_suspect(args.suspect)
    shared = settings | {"commitment": commitment, "device": device, "precision": args.precision}
    if path is None:
        module = load_model(args.suspect, device=device)
        verdict = verify(module, watermark, key, args.images, exhaustive=exhaustive, **shared)
        return Judged(SuspectResult(args.suspect, verdict), verdict, None, None, module)
    given = args.architecture or named or own_architecture(path, watermark)
    found = list(find_suspects(path))
    if len(found) != 1:
        raise ValueError(f"{path}: wanted one suspect, found {len(found)}; verify-many takes many")
    power = None if exhaustive else 1.0
    sweeper = SweepSettings(
        watermark, key, given, args.images, power=power, max_bytes=memory_limit(), **shared
    ).sweeper()
    result = sweeper.run(found[0])
    if result.verdict is None:
        problem = result.error or result.skipped or ""
        raise ValueError(problem if args.suspect in problem else f"{args.suspect}: {problem}")
    return Judged(result, result.verdict, given or watermark.architecture, found[0].path, None)


def own_architecture(path: Path, watermark: Watermark) -> str | None:
    """What a checkpoint itself says that it is; None where the watermark is to be believed instead.

    Raises:
        ValueError: neither says it.
    """
    from activemark_fast.checkpoints import architecture_of

    try:
        own = architecture_of(path)
    except ValueError as error:
        if watermark.architecture is None:
            raise ValueError(
                f"{path}: neither it nor the watermark names an architecture; say it with --architecture"
            ) from error
        return None
    return own if watermark.architecture in (None, own) else None


def named_suspect(spec: str) -> tuple[str | None, Path | None]:
    """The architecture that a suspect's name says, and the path of its weights; None for what it lacks."""
    from activemark_fast.checkpoints import architecture_of

    path = Path(spec)
    if spec != "demo" and path.exists():
        return None, path
    architecture, at, weights = spec.partition("@")
    if at and ":" in architecture:
        return architecture_of(spec), Path(weights)
    return None, None
