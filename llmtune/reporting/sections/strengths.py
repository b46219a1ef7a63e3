"""Gain against forgetting at every strength of the adapter, and the strength that was chosen."""

from typing import Any

from markupsafe import Markup

from llmtune.reporting.numbers import unit_of_metric
from llmtune.reporting.plots import draw_pareto, is_bound_near
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
    general = _plotted_general(sweep)
    return {
        "strengths": strengths,
        "rows": rows,
        "unit_of": lambda point: unit_of_metric(point.metric),
        "charts": _charts(report, sweep, general) if general else [],
        "far_bound": _far_bound(report, general) if general else None,
        "choice": sweep.choice,
        "sizes": sorted({point.n for point in sweep.points}),
        "by_name": {suite.name: suite for suite in report.suites},
    }


def _at(sweep: StrengthSweep, name: str, strength: float) -> StrengthPoint | None:
    found = [point for point in sweep.of_suite(name) if point.strength == strength]
    return found[0] if found else None


def _plotted_general(sweep: StrengthSweep) -> tuple[StrengthPoint, ...]:
    """Return the points of the general suite that says most: a loss before a score."""
    names = sorted(
        _names(sweep, "general"),
        key=lambda name: unit_of_metric(sweep.of_suite(name)[0].metric).name == "fraction",
    )
    return sweep.of_suite(names[0]) if names else ()


def _far_bound(report: Report, general: tuple[StrengthPoint, ...]) -> str | None:
    """Return the bound in words where it lies too far out to be drawn."""
    unit = unit_of_metric(general[0].metric)
    bound = report.thresholds.general_bound(unit)
    return None if is_bound_near(general, bound) else unit.bound(bound)


def _charts(
    report: Report, sweep: StrengthSweep, general: tuple[StrengthPoint, ...]
) -> list[Markup]:
    unit = unit_of_metric(general[0].metric)
    bound = report.thresholds.general_bound(unit)
    charts = []
    for index, name in enumerate(_names(sweep, "target")[:MAX_CHARTS]):
        target = sweep.of_suite(name)
        units = (unit_of_metric(target[0].metric), unit)
        charts.append(draw_pareto(f"pareto{index}", target, general, units, bound))
    return charts


def _names(sweep: StrengthSweep, role: str) -> list[str]:
    return list(dict.fromkeys(point.suite for point in sweep.points if point.role == role))
