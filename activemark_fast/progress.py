"""Progress bars of long work."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm
from typing_extensions import Self


class Progress:
    """A bar on standard error with the stage, what was measured last and the time left; nothing if hidden."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: tqdm | None = None

    def stage(self, name: str, total: int) -> None:
        """Ends the bar there is and starts one of `total` steps."""
        self._close()
        self._bar = tqdm(total=total, desc=name, disable=not self._shown, leave=False, dynamic_ncols=True)

    def note(self, text: str) -> None:
        """Leaves a line on standard error, above the bars."""
        if self._shown:
            tqdm.write(text, file=sys.stderr)

    def advance(self, steps: int = 1, **measured: float) -> None:
        """Moves the bar on and shows numbers beside it."""
        if self._bar is not None:
            if measured:
                self._bar.set_postfix(
                    {name: f"{value:.4g}" for name, value in measured.items()}, refresh=False
                )
            self._bar.update(steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
