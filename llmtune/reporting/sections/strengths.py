"""Gain against forgetting at every strength of the adapter, and the strength that was chosen."""

from typing import Any

from llmtune.reporting.numbers import unit_of_metric
from llmtune.reporting.plots import draw_pareto
from llmtune.reporting.report import Report
from llmtune.reporting.strengths import StrengthPoint, StrengthSweep

MAX_CHARTS = 3


def build(report: Report) -> dict[str, Any] | None:
    """Return the charts (a target against the general suite that says most), and the table."""
    sweep = report.strengths
    if sweep is None:
        return None
    strengths = sorted({point.strength for point in sweep.points})
    suites = list(dict.fromkeys(point.suite for point in sweep.points))
    rows = [(name, [_at(sweep, name, strength) for strength in strengths]) for name in suites]
    return {
        "strengths": strengths,
        "rows": rows,
        "unit_of": lambda point: unit_of_metric(point.metric),
        "charts": _charts(report, sweep),
        "choice": sweep.choice,
        "sizes": sorted({point.n for point in sweep.points}),
        "by_name": {suite.name: suite for suite in report.suites},
    }


def _at(sweep: StrengthSweep, name: str, strength: float) -> StrengthPoint | None:
    found = [point for point in sweep.of_suite(name) if point.strength == strength]
    return found[0] if found else None


def _charts(report: Report, sweep: StrengthSweep) -> list[Any]:
    targets = _names(sweep, "target")[:MAX_CHARTS]
    generals = sorted(
        _names(sweep, "general"),
        key=lambda name: unit_of_metric(sweep.of_suite(name)[0].metric).name == "fraction",
    )
    if not generals:
        return []
    general = sweep.of_suite(generals[0])
    unit = unit_of_metric(general[0].metric)
    charts = []
    for index, name in enumerate(targets):
        target = sweep.of_suite(name)
        units = (unit_of_metric(target[0].metric), unit)
        bound = report.thresholds.general_bound(unit)
        charts.append(draw_pareto(f"pareto{index}", target, general, units, bound))
    return charts


def _names(sweep: StrengthSweep, role: str) -> list[str]:
    return list(dict.fromkeys(point.suite for point in sweep.points if point.role == role))
