"""Reports: what was measured, as pictures. The only part of the package that imports matplotlib."""

from activemark_fast.report.figures import verdict_figure, verdicts_figure

__all__ = ["verdict_figure", "verdicts_figure"]
