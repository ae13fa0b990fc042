"""How a checkpoint fitted, for reports."""

from __future__ import annotations

from dataclasses import dataclass, field

_MAX_NAMES = 20
_MAX_NAME = 120


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits the marked model, up to the last tap.

    Attributes:
        tower: what stands before the names of the image tower that was read.
        matched: tensors of the model that were loaded as they are.
        converted: what was done to others → to how many.
        missing: names of the model's tensors that the checkpoint does not have, or not in the right shape.
        why: of some of the missing, what stands in their place.
        ignored: names of the checkpoint's tensors that were not used.
        odd: those of `ignored` which the suspect's own image tower seems to compute with.
        doubts: what may hide a mark: a suspect that has any is never "no match".
    """

    tower: str = ""
    matched: int = 0
    converted: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    why: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def missing_and_why(self) -> list[str]:
        """The first of what is missing, each with what stands in its place."""
        return shown_names(
            tuple(f"{name} ({self.why[name]})" if name in self.why else name for name in self.missing)
        )

    def __str__(self) -> str:
        read = [f"{self.matched} tensors as they are"]
        read += [f"{count} after conversion ({what})" for what, count in self.converted.items()]
        lines = [f"  read: {', '.join(read)}" + (f"; all under {self.tower!r}" if self.tower else "")]
        if self.missing:
            lines.append(f"  missing: {', '.join(self.missing_and_why)}")
        if self.ignored:
            names = ", ".join(shown_names(self.ignored, 5))
            lines.append(f"  not used: {len(self.ignored)} tensors ({names})")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The fit as JSON types; of long lists the first 20 names and how many more there are."""
        return {
            "tower": self.tower[:_MAX_NAME],
            "matched": self.matched,
            "converted": self.converted,
            "missing": self.missing_and_why,
            "ignored": shown_names(self.ignored),
            "odd": shown_names(self.odd),
            "doubts": shown_names(self.doubts),
        }


def shown_names(names: tuple[str, ...], count: int = _MAX_NAMES) -> list[str]:
    """The first names, none of them endless or with control characters, and how many more there are."""
    more = [f"and {len(names) - count} more"] if len(names) > count else []
    return ["".join(c if c.isprintable() else "?" for c in n[:_MAX_NAME]) for n in names[:count]] + more
