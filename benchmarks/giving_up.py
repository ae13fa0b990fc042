"""How often `verify`, which stops early, says "no match" of a mark that all images would prove.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/giving_up.py --keys 2

The demo model is marked and the mark weakened: averaged with the original, pruned, disturbed, vaccinated,
projected. A suspect that answers on some images only is made of the readings of two: the marked model's on
a share of the images, the original's on the others, in the passive band too. Of each suspect every image is
read once; the looks of `verify` are then replayed over random orders of the images, which are the key's to
choose (the passive band is read of the same images whatever the order). Prints a line for each suspect: the
paid p-value of all images by injections, the passive band's, the share of orders by which it is given up
(wrong where all images make a match and the passive band, paid, does not), and how many images are read of
those that are.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from activemark_fast import Embedding, Key, embed, load_model, verify
from activemark_fast.attacks import average, noise, prune
from activemark_fast.attacks.adaptive import spectral, vaccinate
from activemark_fast.backbone import Backbone
from activemark_fast.codec.codebooks import (
    BANDS,
    MAX_BOOKS,
    MEASURED_IMAGES,
    SiteMeasure,
    codebooks,
    draw_sent,
)
from activemark_fast.codec.passive import (
    BAND_NAMES,
    Moments,
    Rows,
    passive_rows,
    passive_scores,
    readings,
)
from activemark_fast.decision import Policy
from activemark_fast.defaults import ALPHA
from activemark_fast.freedoms import alternatives
from activemark_fast.marking.reading import Channel, passive_pairs, without_crosstalk
from activemark_fast.marking.suffix import site_activations
from activemark_fast.p_value import sign_flip_p_value
from activemark_fast.sequential import (
    LEAST_IMAGES,
    SHOWS,
    WEAKEST_MARK,
    WEAKEST_NATURAL,
    look_ends,
    look_penalties,
    mark_excluded,
    out_of_reach,
)
from activemark_fast.triggers import photograph_crops, trigger_images
from activemark_fast.verdict import NO_MATCH_ABOVE
from activemark_fast.watermark import TRIGGER_IMAGES

PUBLIC = Key(b"giving up: everybody's images")
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


@dataclass(frozen=True, eq=False)
class Read:
    """What the images show of a suspect.

    Attributes:
        agreements: of each band, of each of its codebooks (taps, images, reads, rows).
        sent: the same, what was sent (images, reads, rows).
        pairs: for each block behind the site its rows, and input and output of `MEASURED_IMAGES` images.
    """

    agreements: tuple[tuple[torch.Tensor, ...], ...]
    sent: tuple[tuple[torch.Tensor, ...], ...]
    pairs: tuple[tuple[Rows, torch.Tensor, torch.Tensor], ...]

    def of(self, images: np.ndarray) -> Read:
        """Some of the images, in that order."""
        return Read(
            tuple(tuple(part[:, images] for part in band) for band in self.agreements),
            tuple(tuple(part[images] for part in band) for band in self.sent),
            self.pairs,
        )

    @cached_property
    def cleared(self) -> list[list[torch.Tensor]]:
        """The agreements less crosstalk."""
        return [
            [without_crosstalk(*pair) for pair in zip(*band, strict=True)]
            for band in zip(self.agreements, self.sent, strict=True)
        ]

    @cached_property
    def naturals(self) -> list[np.ndarray]:
        """Of each band but the first (images, taps), mean of +1 for a right bit and -1 for a wrong one."""
        return [torch.cat(band, dim=3).sign().mean(dim=(2, 3)).T.numpy() for band in self.agreements[1:]]

    @cached_property
    def bands(self) -> list[np.ndarray]:
        """The same of all bands (images, taps, rows, reads), cleared of crosstalk."""
        rights = [torch.cat([part.sign() for part in band], dim=3) for band in self.cleared]
        return [right.permute(1, 0, 3, 2).numpy().astype(int) for right in rights]

    @cached_property
    def loud(self) -> np.ndarray:
        """(images, taps), mean over the bits of +1 for a right one of the loud message and -1."""
        right = self.agreements[0][0].mean(dim=2) > 0
        return (2 * right.double().mean(dim=-1) - 1).T.numpy()

    @cached_property
    def passive(self) -> float:
        """The p-value of the passive band."""
        read = [readings(rows, Moments.of(before, after)) for rows, before, after in self.pairs]
        return sign_flip_p_value(passive_scores(read))

    def among(self, other: Read, share: float) -> Read:
        """The first `share` of this one's images, and the others of another suspect."""

        def some(ours: torch.Tensor, theirs: torch.Tensor, images: int = 0) -> torch.Tensor:
            split = round(share * ours.shape[images])
            return torch.cat(
                [ours.narrow(images, 0, split), theirs.narrow(images, split, ours.shape[images] - split)],
                dim=images,
            )

        agreements = tuple(
            tuple(some(*pair, images=1) for pair in zip(*band, strict=True))
            for band in zip(self.agreements, other.agreements, strict=True)
        )

        pairs = tuple(
            (rows, some(before, other_before), some(after, other_after))
            for (rows, before, after), (_, other_before, other_after) in zip(
                self.pairs, other.pairs, strict=True
            )
        )
        return Read(agreements, self.sent, pairs)

    @cached_property
    def p_values(self) -> list[float]:
        """Of each band, nothing paid."""
        return [sign_flip_p_value(band.sum(axis=(0, 3)).flatten().tolist()) for band in self.bands]


@torch.no_grad()
def read(model: nn.Module, embedding: Embedding, key: Key) -> Read:
    """Every image of the mark, by a suspect."""
    backbone, watermark = Backbone(model), embedding.watermark
    site = watermark.site
    pixels = trigger_images(None, key, watermark.preprocess, TRIGGER_IMAGES).pixels
    at_site = site_activations(backbone, pixels, site.block, nullcontext)
    measured = SiteMeasure.of(at_site.output[:MEASURED_IMAGES], site.prefix_tokens)
    stretched = key.stretched()
    sent = draw_sent(stretched, "verify", TRIGGER_IMAGES, watermark.bits)
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {band.name: [] for band in BANDS}
    for book, messages in zip(codebooks(stretched, site, watermark.bits, measured), sent, strict=True):
        part = Channel(book, messages).agreement(backbone, at_site, 0, site.block, nullcontext)
        parts[book.band.name].append((part, messages))
    rows = passive_rows(stretched, site)
    pairs = passive_pairs(backbone, at_site.output[:MEASURED_IMAGES], site, nullcontext)
    agreements, messages = zip(*(zip(*band, strict=True) for band in parts.values()), strict=True)
    return Read(
        agreements,
        messages,
        tuple((rows[block], before, after) for block, before, after in pairs),
    )


class Looks:
    """The looks of `verify`."""

    def __init__(self, embedding: Embedding, depth: int) -> None:
        watermark = embedding.watermark
        self.ends = look_ends(TRIGGER_IMAGES)
        self.policy = Policy(
            alpha=ALPHA,
            tau=0,
            align=None,
            power=1.0,
            bits=watermark.bits,
            books=MAX_BOOKS,
            bands=len(BAND_NAMES),
            penalties=tuple(look_penalties(len(self.ends))),
            alternatives=alternatives(watermark.site, watermark.bits, depth, False),
        )
        self.weights = self.policy.weights(aligned=False)

    def given_up_after(self, suspect: Read, order: np.ndarray) -> list[int] | None:
        """How many images are read of each band of a suspect that is given up; None of others."""
        read = [0] * len(suspect.agreements)
        done = [False] * len(read)
        for look, end in enumerate(self.ends[:-1]):
            seen = suspect.of(order[:end])
            live = [band for band, over in enumerate(done) if not over]
            if min(self.weights[look] * seen.p_values[band] for band in live) <= NO_MATCH_ABOVE:
                return None
            for band in live:
                read[band] = end
                done[band] = self._hopeless(seen, band, look) and (
                    end >= LEAST_IMAGES or suspect.passive > SHOWS
                )
            if all(done):
                return read
        return None

    def _hopeless(self, seen: Read, band: int, look: int) -> bool:
        """Whether there is no use in reading more of a band."""
        draws = seen.naturals[band - 1] if band else seen.loud
        weakest = WEAKEST_NATURAL if band else WEAKEST_MARK
        right = seen.bands[band].mean(axis=3).reshape(len(draws), -1)
        wanted = self.policy.unpaid(self.weights[-1])
        return mark_excluded(draws, self.policy.miss(look), weakest) and out_of_reach(
            right, self.ends[-1], wanted
        )


def suspects(embedding: Embedding, original: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a marked model whose mark is weaker."""
    marked, preprocess = embedding.model, Backbone(original).preprocess
    cut = photograph_crops(PUBLIC.stream("clean"), 256, preprocess.size)
    clean = preprocess(torch.stack([cut(index) for index in range(256)]))
    for share in (0.0, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0):
        yield f"{share:.2f} of the original", average(marked, None, 0, share, other=original)
    for strength in (0.7, 0.8, 0.9, 0.95):
        yield f"{strength:.2f} pruned", prune(marked, None, 0, strength)
    for strength in (2.0, 4.0, 6.0, 8.0):
        yield f"noise {strength:.0f}", noise(marked, None, 0, strength)
    for strength in (32, 64, 96):
        yield f"loudest {strength} out", spectral(marked, clean, 0, strength, matrices=("fc2", "attention"))
    for steps, lr in ((50, 1e-3), (100, 1e-3), (200, 1e-3), (200, 2e-3)):
        yield f"vaccinated, {steps} at {lr:g}", vaccinate(marked, clean, 0, steps, lr=lr)


def suspect_readings(
    embedding: Embedding, original: nn.Module, key: Key, innocent: Read
) -> Iterator[tuple[str, Read]]:
    """Suspects by what is read of them."""
    marked = read(embedding.model, embedding, key)
    for share in SHARES:
        yield f"answers on {share:.2f} of images", marked.among(innocent, share)
    for name, model in suspects(embedding, original):
        suspect = read(model, embedding, key)
        yield name, suspect
        if name.startswith("vaccinated"):
            yield f"{name}, but for 0.15 of images", marked.among(suspect, 0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keys", type=int, default=2)
    parser.add_argument("--orders", type=int, default=1000)
    arguments = parser.parse_args()
    original = load_model("demo")
    wrong = {name: [0, 0] for name in ("weakened", "of some images")}
    for number in range(arguments.keys):
        key = Key(f"giving up: key {number}".encode())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            embedding = embed(original, key)
        looks = Looks(embedding, Backbone(original).depth)
        draws = np.random.default_rng(number)
        orders = [draws.permutation(TRIGGER_IMAGES) for _ in range(arguments.orders)]
        innocent = read(original, embedding, key)
        after = looks.given_up_after(innocent, key.stream("looks").permutation(TRIGGER_IMAGES))
        said = verify(original, embedding.watermark, key, precision="fp32")
        assert said.images == (after or [TRIGGER_IMAGES])[0], "the looks are not verify's"
        for name, suspect in suspect_readings(embedding, original, key, innocent):
            p_value = looks.policy.price(aligned=False) * min(suspect.p_values)
            passive = looks.policy.price(aligned=False) * suspect.passive
            # Whatever is read by injections, verify reads the passive band of those that it gives up.
            match = looks.policy.matches(p_value) and not looks.policy.matches(passive)
            ends = [max(seen) for order in orders if (seen := looks.given_up_after(suspect, order))]
            if match:
                kind = wrong["of some images" if "of images" in name else "weakened"]
                kind[0], kind[1] = kind[0] + len(ends), kind[1] + len(orders)
            images = (sum(ends) + TRIGGER_IMAGES * (len(orders) - len(ends))) / len(orders)
            print(
                f"key {number}  {name:43} p {p_value:8.1e}  passive {passive:8.1e}  "
                f"{'match' if match else '-':5}  given up "
                f"{len(ends) / len(orders):.4f}{'  WRONG' if match and ends else ''}  images {images:.1f}",
                flush=True,
            )
    for name, (count, all_of_them) in wrong.items():
        print(f"marks {name}: wrongly given up {count} of {all_of_them}")


if __name__ == "__main__":
    main()
