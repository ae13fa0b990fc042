"""Reports: what was measured, as pictures and pages. The only part of the package that imports matplotlib."""

from activemark_fast.report.descent import descent_figure
from activemark_fast.report.figures import verdict_figure, verdicts_figure
from activemark_fast.report.frontier import frontier_figure
from activemark_fast.report.page import Evidence, evidence_page
from activemark_fast.report.profile import profile_figure
from activemark_fast.report.trace import trace_figure

__all__ = [
    "Evidence",
    "descent_figure",
    "evidence_page",
    "frontier_figure",
    "profile_figure",
    "trace_figure",
    "verdict_figure",
    "verdicts_figure",
]
