"""What comes of one suspect in a sweep."""

from __future__ import annotations

from dataclasses import dataclass

from activemark_fast.checkpoints.fit import Fit
from activemark_fast.verdict import Verdict


@dataclass(frozen=True, eq=False)
class SuspectResult:
    """A verdict on one suspect, or why there is none.

    Attributes:
        suspect: its absolute path, or "module N".
        verdict: the verdict; None where the suspect could not be read.
        error: why it could not; None with a verdict.
        skipped: why it is no suspect at all, such as an optimiser's state; then there is neither of them.
        fit: how its tensors were matched to the marked model's; None for loaded modules and errors.
        towers: what stands before the names of each image tower that was read; the verdict is on that of
            `fit`, in which most of a mark was seen.
        size, modified: bytes of its files and their newest modification time, nanoseconds since 1970; 0 for
            loaded modules and where no file could be opened.
        bytes_read: bytes of tensors that were read.
        seconds: wall time from opening it to the verdict.
    """

    suspect: str
    verdict: Verdict | None = None
    error: str | None = None
    skipped: str | None = None
    fit: Fit | None = None
    towers: tuple[str, ...] = ()
    size: int = 0
    modified: int = 0
    bytes_read: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """The result as JSON types."""
        return {
            "suspect": self.suspect,
            "size": self.size,
            "modified": self.modified,
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "error": self.error,
            "skipped": self.skipped,
            "towers": list(self.towers),
            "tensors": None if self.fit is None else self.fit.to_dict(),
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
        }
