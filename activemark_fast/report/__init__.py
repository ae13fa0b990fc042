"""Reports: what was measured, as pictures. The only part of the package that imports matplotlib."""

from activemark_fast.report.figures import verdict_figure, verdicts_figure
from activemark_fast.report.profile import profile_figure

__all__ = ["profile_figure", "verdict_figure", "verdicts_figure"]
