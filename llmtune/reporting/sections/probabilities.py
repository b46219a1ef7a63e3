"""How sure both models were of each right answer."""

from typing import Any

from llmtune.reporting.plots import draw_probabilities
from llmtune.reporting.report import Report

MAX_CHARTS = 4


def build(report: Report) -> dict[str, Any] | None:
    """Return a chart for each suite with fixed choices, targets first."""
    order = [suite.name for suite in report.suites]
    shifts = sorted(report.shifts, key=lambda shift: order.index(shift.suite))[:MAX_CHARTS]
    if not shifts:
        return None
    charts = [(each, draw_probabilities(f"sure{i}", each)) for i, each in enumerate(shifts)]
    return {"charts": charts}
