"""Which model families can be marked: docs/models.md.

Builds each family from its library at small settings, with random weights of the size that trained ones
have; marks it, verifies it, reads the mark once more after noise on all matrices of its blocks, and reads an
innocent of the same family. What cannot be marked must say why in one sentence.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/families.py --out docs/models.md

What is known of a family is kept in `--rows`, so that a run that was cut off goes on where it was; `--only`
measures those families again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from models import made_by
from small_models import BACKBONES, FAMILIES, VLM_TOWERS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from activemark_fast import Key, embed, verify
from activemark_fast.attacks.noise import noise
from activemark_fast.backbone import Backbone
from activemark_fast.embedding import UnverifiedMarkError
from activemark_fast.towers import NotAViTError, feed
from activemark_fast.triggers import trigger_images

KEY = Key(b"benchmarks/families.py: a key of no worth")
BITS, FIDELITY, NOISE = 24, 0.97, 0.02
SEEN = 32
"""Photographs that batch norms have their statistics of."""


@dataclass(frozen=True)
class Row:
    """What came of one family; where it was refused or failed, only that is set, and says why."""

    family: str
    refused: str = ""
    failed: str = ""
    tower: str = ""
    blocks: str = ""
    fidelity: float = 0.0
    decision: str = ""
    p_value: float = 1.0
    rate: float = 0.0
    after_noise: str = ""
    innocent: str = ""
    seconds: float = 0.0
    day: str = ""

    @property
    def marked(self) -> bool:
        """Whether it was marked and the mark found."""
        return self.decision == "match"

    @property
    def cells(self) -> str:
        """What came of it, as cells of a table."""
        if self.refused or self.failed:
            return f"{f'refused: {self.refused}' if self.refused else f'FAILED: {self.failed}'} | | | | | | |"
        return (
            f"{f'`{self.tower}`' if self.tower else 'the model'} | {self.blocks} | {self.fidelity:.4f} | "
            f"{self.p_value:.1e}, {self.rate:.2f} | {self.after_noise} | {self.innocent} | "
            f"{self.seconds:.0f} |"
        )


@torch.no_grad()
def trained(model: nn.Module, seed: int) -> nn.Module:
    """The model with random weights of about the size that trained ones have.

    A bias that starts at 1, as a gate's does, stays about 1; batch norms have the statistics of photographs.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(values * max(1, parameter[0].numel()) ** -0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.02 * values + float((parameter == 1).all()))
        else:
            parameter.copy_(1 + 0.1 * values)
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    if norms:
        with suppress(NotAViTError):  # it is refused, whatever its statistics
            _show_photographs(Backbone(model), norms)
    return model.eval()


def _show_photographs(view: Backbone, norms: list[BatchNorm]) -> None:
    """Gives batch norms the statistics that they would have after training."""
    images = trigger_images(None, KEY, view.preprocess, SEEN).pixels
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches, of which there is one
        norm.train()
    feed(view.encoder, images)


def run(family: str) -> Row:
    """Marks a family, verifies, attacks once and reads an innocent."""
    torch.manual_seed(0)
    model = trained(FAMILIES[family](), 0)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of targets that were missed
            made = embed(model, KEY, bits=BITS, fidelity=FIDELITY)
    except (ValueError, UnverifiedMarkError) as error:
        return Row(family, refused=told(error))
    seconds = time.perf_counter() - started
    verdict = verify(made.model, made.watermark, KEY)
    noisy = verify(noise(made.model, None, 0, NOISE), made.watermark, KEY)
    other = verify(trained(FAMILIES[family](), 1), made.watermark, KEY)
    view = Backbone(model)
    site = made.watermark.site
    return Row(
        family,
        tower=view.tower,
        blocks=f"{type(view.blocks[0]).__name__} x {site.depth}, {site.num_tokens} x {site.width}",
        fidelity=made.fidelity,
        decision=verdict.decision,
        p_value=verdict.paid_p_value or 1.0,
        rate=verdict.detection_rate,
        after_noise=noisy.decision,
        innocent=other.decision,
        seconds=seconds,
    )


def told(error: Exception) -> str:
    """An error in a cell of a table."""
    return " ".join(str(error).split()).replace("|", "/")


def main() -> None:
    """Measures what is not known yet, and writes the table after each family."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="families whose names hold one of these")
    parser.add_argument(
        "--rows", type=Path, default=Path("build/families.jsonl"), metavar="FILE", help="what is known"
    )
    arguments = parser.parse_args()
    known: dict[str, Row] = {}
    if arguments.rows.exists():
        for line in arguments.rows.read_text(encoding="utf-8").splitlines():
            row = Row(**json.loads(line))
            known[row.family] = row
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        if not any(part in family for part in arguments.only) if arguments.only else family in known:
            continue
        try:
            known[family] = run(family)
        except Exception as error:  # told in the table, which goes on
            known[family] = Row(family, failed=f"{type(error).__name__}: {told(error)}")
        known[family] = replace(known[family], day=str(datetime.now(timezone.utc).date()))
        print(f"{family} | {known[family].cells}", file=sys.stderr, flush=True)
        with arguments.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(known[family])) + "\n")
        write(arguments.out, known)
    write(arguments.out, known)


def write(path: Path, known: dict[str, Row]) -> None:
    """Writes the page of what is known, in the order of the families."""
    path.write_text(page([known[family] for family in FAMILIES if family in known]), encoding="utf-8")


def page(rows: list[Row]) -> str:
    """The page of these rows."""
    known = {row.family: row for row in rows}
    refused = sum(bool(row.refused) for row in rows)
    marked = sum(row.marked for row in rows)
    found = sum(row.marked and row.after_noise == "match" for row in rows)
    accused = sum(row.innocent == "match" for row in rows)
    days = ", ".join(sorted({row.day for row in rows}))
    used = {**BACKBONES, **VLM_TOWERS}
    most = sum(family in known and known[family].marked for family in used.values())
    lines = "\n".join(f"| {row.family} | {row.cells}" for row in rows)
    head = (
        "tower | blocks, tokens x width | fidelity | paid p, R | after noise | innocent | s |\n"
        "|---|---|---|---|---|---|---|---|"
    )

    def of(chosen: dict[str, str]) -> str:
        return "\n".join(
            f"| {name}: {family} | {known[family].cells if family in known else 'not run | | | | | | |'}"
            for name, family in chosen.items()
        )

    return f"""# Which models can be marked

Made by

{made_by()}
Each family is built by its library at small settings, with random weights of the size that trained ones have;
batch norms have the statistics of {SEEN} photographs.

| families | {len(rows)} |
|---|---|
| marked, and the mark found by `verify` | {marked} |
| refused in one sentence, before anything was handed out | {refused} |
| crashed, or marked and not found | {len(rows) - marked - refused} |
| innocents of the same family that were accused | {accused} |
| marked ones also found after noise of {NOISE} on all matrices of their blocks | {found} |

Marks are of {BITS} bits at a fidelity of {FIDELITY}. s is the time of `embed`, in seconds, on a machine that
did other work beside it. Rows are kept from run to run; these are of {days}.

## The most used

{most} of {len(used)} are marked and found.

| backbone | {head}
{of(BACKBONES)}

| tower of a VLM | {head}
{of(VLM_TOWERS)}

## All families

| family | {head}
{lines}
"""


if __name__ == "__main__":
    main()
