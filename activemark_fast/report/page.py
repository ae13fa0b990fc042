"""The evidence page: one HTML file that needs no network, for people who did not make the measurement."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby

import jinja2
import numpy as np

from activemark_fast import __version__
from activemark_fast.commitment import Opening
from activemark_fast.descent import ASSUMPTION, MATRICES, SHARED, Descent
from activemark_fast.evaluation import Evaluation, Row
from activemark_fast.freedoms import EVIDENCE_AT
from activemark_fast.profiling import Profile
from activemark_fast.report.charts import error_histogram, profile_chart
from activemark_fast.site import Site
from activemark_fast.verdict import Verdict, fair_coin_pass_rate

_HEADINGS = {
    "match": "Match: this model carries the owner's mark",
    "no match": "No match: no sign of the owner's mark",
    "inconclusive": "Inconclusive: neither a match nor none",
}


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an evidence page shows.

    Attributes:
        suspect: name of the suspect.
        verdict: on the suspect.
        site: where the mark is.
        profile: of the suspect; None if it could not be read.
        evaluation: what the mark survives; None if that was not measured.
        command: reads the mark again.
        facts: digests, versions and the like, by name.
        date: of the page.
        descent: from the original, by the weights alone; None if that was not asked for.
    """

    suspect: str
    verdict: Verdict
    site: Site
    profile: Profile | None
    evaluation: Evaluation | None
    command: str
    facts: Mapping[str, str]
    date: str
    descent: Descent | None = None


def evidence_page(evidence: Evidence) -> str:
    """The page as HTML, in one piece, readable without colour, on a phone and on paper."""
    verdict, evaluation = evidence.verdict, evidence.evaluation
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    counts = np.bincount(verdict.bit_errors, minlength=verdict.bits + 1).tolist()
    innocent, innocents = _innocent_errors(evaluation, verdict.bits)
    return template.render(
        heading=_HEADINGS[verdict.decision],
        decision=verdict.decision,
        suspect=evidence.suspect,
        version=__version__,
        date=evidence.date,
        plain=_in_plain_words(verdict),
        verdict=verdict,
        p_value=_number(verdict.p_value),
        paid=_number(verdict.paid_p_value),
        choices=_choices(verdict),
        evidence_at=_number(EVIDENCE_AT),
        alpha=_number(verdict.alpha),
        chance=_number(fair_coin_pass_rate(verdict.bits, verdict.tau)),
        histogram=verdict.images and error_histogram(counts, innocent, verdict.tau, innocents),
        innocents=innocents,
        counts=counts,
        profile=evidence.profile and profile_chart(evidence.profile, evidence.site),
        site=evidence.site,
        taps=" and ".join(map(str, evidence.site.taps)),
        trace=verdict.trace,
        accused=verdict.trace and [(name, _number(p)) for name, p in verdict.trace.accused],
        others=verdict.trace and _number(verdict.trace.smallest_unaccused),
        descent=evidence.descent,
        descent_p=evidence.descent and _number(evidence.descent.p_value),
        descent_rows=evidence.descent and _descent_rows(evidence.descent),
        descent_columns=("block", "units with the same number", "heads", "score", *MATRICES),
        assumption=ASSUMPTION,
        shared=SHARED,
        evaluation=evaluation,
        fidelity=_fidelity(evaluation),
        summary=evaluation and evaluation.summary(),
        families=_families(evaluation),
        command=evidence.command,
        facts=evidence.facts.items(),
        commitment=verdict.opening and _committed(verdict.opening),
    )


def _in_plain_words(verdict: Verdict) -> list[str]:
    """The verdict, for readers who know neither watermarks nor statistics."""
    if verdict.decision == "inconclusive":
        return [f"Nothing can be concluded from this reading: {verdict.reason}."]
    if verdict.decision == "no match":
        return [
            "The messages that the owner's key writes into this model do not come out again. That is how a "
            "model looks which was made without the owner's marked weights; it is no proof that it was."
        ]
    said = (
        "The messages that the owner's key writes into this model come out again, and only weights that "
        "were changed with that key give them back. So the model, or the part of it that was read, descends "
        "from the owner's marked model."
    )
    if verdict.p_value is None:
        return [
            "A decoder that was trained with the owner's model reads its messages from this model, too. Such "
            "a decoder can be trained for any model, so by itself this is no proof."
        ]
    odds = (
        f"By chance: a model made without the key would look like this at most once in "
        f"{_odds(verdict.p_value)} cases."
    )
    if verdict.identical:
        odds += " Its weights are, bit for bit, those that the watermark file names."
    if verdict.aligned is not None:
        odds += f" A {verdict.aligned} of its activations, which hides a mark, was undone before reading."
    lies = re.sub(r"\d[\d.]*e[+-]\d+", lambda number: _number(float(number[0])), str(verdict.evidence))
    said_by_owner = f"If the owner is not to be trusted: {lies}."
    if verdict.chosen:
        return [said, said_by_owner, _bound(verdict)]
    return [said, odds, said_by_owner, _bound(verdict)]


def _bound(verdict: Verdict) -> str:
    """Since when the owner could not choose any more."""
    since = None if verdict.opening is None else verdict.opening.proven_since
    if since is None:
        return "Nothing shows since when the owner has had this key: no checked timestamp was given."
    return f"The owner had committed to this key and watermark before {since:%Y-%m-%d}."


def _choices(verdict: Verdict) -> str:
    """What an owner could choose, and what the p-value is multiplied with for it."""
    return ", ".join(f"{name} {count}" for name, count in verdict.alternatives.items())


def _odds(p_value: float) -> str:
    if p_value > 1e-6:
        return f"{1 / p_value:,.0f}"
    exponent = math.floor(-math.log10(p_value))
    return f"{1 / p_value / 10.0**exponent:.1f}·10{_superscript(exponent)}"


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _number(value: float | None) -> str:
    """A number as people write it: 5.4·10⁻²⁰."""
    if value is None:
        return "-"
    if value == 0 or 0.001 <= value < 1e6:
        return f"{value:.3g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    return f"{value / 10.0**exponent:.2g}·10{_superscript(exponent)}"


def _innocent_errors(evaluation: Evaluation | None, bits: int) -> tuple[list[float], str]:
    """How many wrong bits innocent models show, and which models these are."""
    rows = [] if evaluation is None else [r for r in evaluation.rows if r["expected"] == "no match"]
    counts = np.array([r["histogram"] for r in rows if len(r["histogram"]) == bits + 1])
    if counts.size and counts.sum():
        return counts.sum(axis=0).tolist(), f"{len(counts)} innocent readings"
    return [math.comb(bits, k) / 2**bits for k in range(bits + 1)], "fair coins"


def _fidelity(evaluation: Evaluation | None) -> dict[str, float] | None:
    if evaluation is None:
        return None
    marked, original = (evaluation.row("as released", subject) for subject in ("marked", "original"))
    if marked is None or original is None or marked["cosine"] is None:
        return None
    return {
        "cosine": marked["cosine"],
        "after": marked["probe_accuracy"],
        "before": original["probe_accuracy"],
    }


def _families(evaluation: Evaluation | None) -> list[tuple[str, list[Row]]]:
    """The attacks, by family, as the table shows them."""
    if evaluation is None:
        return []
    owners = [r for r in evaluation.rows if (r["subject"], r["key"]) == ("marked", "owner")]
    return [
        (family, [_cells(evaluation, row) for row in rows])
        for family, rows in groupby(owners, key=lambda row: str(row["family"]))
    ]


def _cells(evaluation: Evaluation, row: Row) -> Row:
    original = evaluation.row(row["attack"], "original")
    other = evaluation.row(row["attack"], "marked", "another")
    rate = row["detection_rate"]
    return {
        "attack": row["attack"],
        "heat": f"{rate or 0:.2f}",
        "rate": "-" if rate is None else f"{rate:.3f}",
        "p": _number(row["p_value"]),
        "found": {"match": "✓ match", "no match": "✗ no match"}.get(row["decision"], row["decision"]),
        "as_expected": row["as_expected"],
        "original_p": _number(None if original is None else original["p_value"]),
        "original_as_expected": original is None or original["as_expected"],
        "other_p": _number(None if other is None else other["p_value"]),
        "other_as_expected": other is None or other["as_expected"],
        "cosine": _fixed(row["cosine"]),
        "probe": _fixed(row["probe_accuracy"]),
        "task": _fixed(row["task_score"]),
    }


def _descent_rows(descent: Descent) -> list[list[str]]:
    """A row for each pair of blocks: its number, units, heads, score, and what became of each matrix."""
    return [
        [
            str(block.b) if block.a == block.b else f"{block.b} (the original's {block.a})",
            f"{block.units[0]} of {block.units[1]}",
            f"{block.heads[0]} of {block.heads[1]}" if block.heads[1] else "-",
            f"{block.score:.2f}",
            *(
                f"{block.states[name]} ({block.likeness[name]:.2f})" if name in block.states else "-"
                for name in MATRICES
            ),
        ]
        for block in descent.blocks
    ]


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _committed(opening: Opening) -> Sequence[tuple[str, str]]:
    return [
        ("Result", str(opening)),
        ("Created, says the owner", opening.created),
        ("Signed by", opening.public_key),
    ]
