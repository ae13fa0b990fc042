"""verify: does a suspect descend from the marked model?"""

from __future__ import annotations

import os

import torch
from torch import nn

from activemark_fast.commitment import Commitment
from activemark_fast.defaults import ALPHA
from activemark_fast.following import computed_on
from activemark_fast.key import Key
from activemark_fast.runtime import resolve_device
from activemark_fast.tracing import Register
from activemark_fast.verdict import Verdict
from activemark_fast.verifier import Verifier
from activemark_fast.watermark import Watermark


def verify(
    suspect: nn.Module,
    watermark: Watermark,
    key: Key | bytes | str | os.PathLike[str],
    images: object = None,
    *,
    alpha: float = ALPHA,
    tau: int | None = None,
    align: bool | None = None,
    commitment: Commitment | None = None,
    exhaustive: bool = False,
    architecture: str | None = None,
    register: Register | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> Verdict:
    """Reads the mark from `suspect` and says whether it is there.

    Images are read in growing steps, in a secret random order, until a match is evidence even against a lying
    owner (`freedoms.EVIDENCE_AT`), or next to out of reach of all that are left (`sequential.out_of_reach`).
    The p-value stays exact (`sequential.look_penalties`).

    The suspect runs no further than the last tap, in eval mode, and is left as it was. What is wrong with a
    suspect (another architecture, too few blocks, non-finite weights or outputs) makes the verdict
    "inconclusive", with the reason; what is wrong with the other arguments is an error.

    Args:
        suspect: a model with loaded weights. All of its image towers that fit are read, and the p-value pays
            for their number.
        watermark: what `embed` returned, or `Watermark.load`.
        key: the key it was made with, in any form `embed` takes.
        images: the trigger images of the embedding; None, and nothing else, if they were made from the key.
        alpha: p-value at or below which a keyed mark is a match; above 0, at most 0.001.
        tau: most wrong bits of an image that counts as detected; by default what one fair-coin message in
            10,000 stays within (5 of 32 bits).
        align: whether to undo a permutation, rotation or scaling of the suspect's residual stream before
            reading (`align`). None: where the plain reading is no match and such a map explains the suspect
            well; the p-value pays for the second try. A suspect of another width is read so only.
        commitment: what the owner published; the verdict then tells whether this key and watermark are the
            committed ones, and since when.
        exhaustive: read all images of every suspect, so that detection rates can be compared.
        architecture: the model string by which the suspect was built, where that is the owner's word, such as
            the watermark's: heads, norms and the like, which weights leave open. The p-value pays for it.
        register: of the recipients of copies (`Embedding.register`, `Register.load`); `Verdict.trace` then
            tells whose copy the suspect was made from. A recipient is accused at `alpha`, all of them paid.
        device: where to compute; by default where the suspect is.
        precision: as in `embed`.

    Returns:
        The verdict. Keyed codec: "match" if the exact p-value is at most `alpha` after all that an owner
        could choose is paid for (`freedoms`); "no match" if it is above 0.001 and the images exclude a mark
        as faint as `sequential` has it; else, and where the mark has too few bits for `alpha`,
        "inconclusive". Learned codec: "match" if at least half of the images are detected, "inconclusive" if
        the codec also reads the unmarked original; there is no p-value.

    Raises:
        TypeError, ValueError: an argument is not as described.
        WatermarkError: `key` is not the key of `watermark`.
        RegisterError: `register` is of another key or another marked model.
        ImageMismatchError: `images` are not those of the embedding.
    """
    if not isinstance(suspect, nn.Module):
        raise TypeError(f"suspect: wanted a torch.nn.Module, got {type(suspect).__name__}")
    tensors = list(suspect.parameters())
    verifier = Verifier(
        watermark,
        key,
        images,
        alpha=alpha,
        tau=tau,
        align=align,
        commitment=commitment,
        architecture=architecture,
        power=None if exhaustive else 1.0,
        register=register,
        device=resolve_device(device, computed_on(tensors[0].device if tensors else torch.device("cpu"))),
        precision=precision,
    )
    return verifier.judge(suspect)
