"""Options of the benchmarks, and the table and the plot of embedding minutes that end a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

_ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="embedding minutes of the demo model only")
    parser.addoption(
        "--model", default="demo", help="what test_embed_verify.py marks: a file or model string"
    )
    parser.addoption("--plot", type=Path, metavar="FILE", help="draw embedding minutes into this file")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def record_row() -> Any:
    """Takes a row of the table of embedding minutes."""
    return _ROWS.append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _ROWS:
        return
    columns = list(dict.fromkeys(name for row in _ROWS for name in row))
    terminalreporter.section("minutes to embed")
    terminalreporter.write_line(f"| {' | '.join(columns)} |")
    terminalreporter.write_line("|---" * len(columns) + "|")
    for row in _ROWS:
        terminalreporter.write_line(f"| {' | '.join(str(row.get(name, '')) for name in columns)} |")
    path = config.getoption("--plot")
    if path is not None:
        _draw(path)
        terminalreporter.write_line(f"drawn: {path}")


def _draw(path: Path) -> None:
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in _ROWS))
    figure = Figure(figsize=(8, 0.6 + 0.45 * len(_ROWS)), layout="constrained")
    axes = figure.subplots(len(models), 1, sharex=True, squeeze=False)[:, 0]
    for axis, model in zip(axes, models, strict=True):
        rows = [row for row in _ROWS if row["model"] == model]
        minutes = [float(row["minutes"]) for row in rows]
        colours = ["#0072B2" if row["method"].startswith("embed") else "#6B6B6B" for row in rows]
        axis.barh(range(len(rows)), minutes, color=colours, height=0.7)
        axis.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xscale("log")
        for place, value in enumerate(minutes):
            axis.text(1.15 * value, place, f"{value:.3g}", va="center", fontsize=9)
        axis.set_title(model, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlim(right=20 * max(float(row["minutes"]) for row in _ROWS))
    axes[-1].set_xlabel("minutes (log scale), one machine, one run")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
