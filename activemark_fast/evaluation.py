"""The results of an evaluation: its rows, what they say together, and the files they are kept in."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activemark_fast.files import write_whole

FORMAT_VERSION = 1
KEPT_ACCURACY = 0.95
"""Fine-tuning counts where it keeps this share of the best accuracy that any setting reaches on its task."""
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of a suite: `results.json`.

    Attributes:
        header: what was evaluated: suite, seed, models, data, versions. JSON types.
        rows: one dict for every reading of a suspect; `evaluate` says what is in it.
    """

    header: Row
    rows: list[Row]

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Reads `results.json` in `folder`.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        path = folder / "results.json"
        try:
            content = json.loads(path.read_bytes())
            header, rows = content["header"], content["rows"]
            if header["format"] != FORMAT_VERSION or not isinstance(rows, list):
                raise ValueError(f"format {header['format']}, wanted {FORMAT_VERSION}")
            return cls(header, rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder}: wanted a folder with the results.json of an evaluation: {error}"
            ) from error

    def save(self, folder: Path) -> None:
        """Writes `results.json` and `results.csv` into `folder`, each whole or not at all."""
        constant = {k: self.header[k] for k in ("model", "suite", "seed", "device", "versions", "threads")}
        lines = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.rows for name in row)) + list(constant)
        writer = csv.DictWriter(lines, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow(
                {
                    name: json.dumps(value) if isinstance(value, (dict, list)) else value
                    for name, value in (row | constant).items()
                }
            )
        text = json.dumps({"header": self.header, "rows": self.rows}, indent=1, allow_nan=False)
        for name, content in (("results.json", text), ("results.csv", lines.getvalue())):
            write_whole(folder / name, content.encode(), mode=0o644)

    def row(self, attack: str, subject: str = "marked", key: str = "owner") -> Row | None:
        """The row of one reading, if it is there."""
        for row in self.rows:
            if (row["attack"], row["subject"], row["key"]) == (attack, subject, key):
                return row
        return None

    def summary(self) -> Row:
        """What the rows say together.

        Returns:
            positives, found: readings where a match is expected, and how many match;
            negatives, accused: readings where none is expected, and how many match nevertheless;
            finetuning, finetuning_held: fine-tuning settings that keep 95 % of the best accuracy on their
            task, and in how many of them the mark is found with R at least 0.95;
            unexpected: names of the readings that are not as expected.
        """
        positives = [row for row in self.rows if row["expected"] == "match"]
        negatives = [row for row in self.rows if row["expected"] == "no match"]
        tuned = [r for r in positives if r["family"] == "fine-tuning" and r["task_score"] is not None]
        best = {r["task"]: max(x["task_score"] for x in tuned if x["task"] == r["task"]) for r in tuned}
        useful = [r for r in tuned if r["task_score"] >= KEPT_ACCURACY * best[r["task"]]]
        held = [r for r in useful if r["decision"] == "match" and r["detection_rate"] >= 0.95]
        return {
            "positives": len(positives),
            "found": sum(row["decision"] == "match" for row in positives),
            "negatives": len(negatives),
            "accused": sum(row["decision"] == "match" for row in negatives),
            "finetuning": len(useful),
            "finetuning_held": len(held),
            "unexpected": [
                f"{row['attack']} ({row['subject']}, {row['key']} key)"
                for row in (*positives, *negatives)
                if not row["as_expected"]
            ],
        }

    def frontier(self) -> list[Row]:
        """What each attack removes and what it costs: one dict an attack, from the owner's reading.

        Returns:
            attack, family, strength, p_value, detection_rate, descent and descent_score (what `compare` still
            shows; None where that was not measured), lost (points of the linear probe's accuracy, from the
            marked model as released), images, steps and seconds (of the attack). Attacks whose accuracy could
            not be measured are left out.
        """
        released = self.row("as released")
        before = None if released is None else released["probe_accuracy"]
        return [
            {name: row[name] for name in ("attack", "family", "strength", "p_value", "detection_rate")}
            | {name: row.get(name) for name in ("descent", "descent_score")}
            | {"lost": 100 * (before - row["probe_accuracy"])}
            | {"images": row["images"], "steps": row["steps"], "seconds": row["attack_seconds"]}
            for row in self.rows
            if (row["subject"], row["key"]) == ("marked", "owner")
            and None not in (before, row["probe_accuracy"])
        ]
