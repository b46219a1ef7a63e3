"""What leaked, how far apart the texts lie, what was learned by heart, what more rows give."""

from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from llmtune.evaluation.diagnosis.results import LearningCurveResult, PowerLaw
from llmtune.reporting.charts import (
    BASE,
    GOOD,
    OPEN,
    PAPER,
    draw,
    finish_axes,
    format_tick,
)
from llmtune.reporting.report import Report

MAX_FOUND = 10


def build_contamination(report: Report) -> dict[str, Any] | None:
    """Return the suites' items that stand in the training rows."""
    found = report.diagnostics.contamination
    if found is None:
        return None
    return {
        "found": found,
        "by_name": {suite.name: suite for suite in report.suites},
        "has_clean": any(suite.clean for suite in report.suites),
        "most": MAX_FOUND,
    }


def build_shift(report: Report) -> dict[str, Any] | None:
    """Return how far apart training, evaluation and general texts lie for the base."""
    shift = report.diagnostics.shift
    return {"shift": shift} if shift else None


def build_memorisation(report: Report) -> dict[str, Any] | None:
    """Return the gap of held-out and training loss, and the membership AUC."""
    found = report.diagnostics.memorisation
    return {"found": found} if found else None


def build_learning_curve(report: Report) -> dict[str, Any] | None:
    """Return the learning curve with its forecasts."""
    curve = report.diagnostics.learning_curve
    return {"learned": curve, "chart": draw_learning_curve(curve)} if curve else None


def build_probe(report: Report) -> dict[str, Any] | None:
    """Return the probe's table of cross-validated accuracies."""
    probe = report.diagnostics.probe
    return {"probe": probe} if probe else None


def draw_learning_curve(curve: LearningCurveResult) -> Markup:
    """Draw the loss over the rows, the fitted law, and its forecasts with their intervals."""

    def plot(axes: Axes) -> None:
        axes.plot(
            [p.rows for p in curve.points],
            [p.loss for p in curve.points],
            color=GOOD,
            ls="none",
            marker="o",
            label="trained",
        )
        if curve.fit is not None:
            _draw_law(axes, curve.fit, min(p.rows for p in curve.points))
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        finish_axes(axes, "training rows", curve.loss_name)
        ticks = sorted({p.rows for p in curve.points} | _forecast_rows(curve.fit))
        axes.set_xticks(ticks, [format_tick(rows) for rows in ticks])

    return draw("learning", f"Loss over training rows, {len(curve.points)} trainings", plot)


def _draw_law(axes: Axes, law: PowerLaw, first: int) -> None:
    last = law.at_4n.rows
    rows = [first * (last / first) ** (index / 60) for index in range(61)]
    axes.plot(rows, [law.E + law.A * n**-law.beta for n in rows], color=BASE, lw=1)
    for forecast in (law.at_2n, law.at_4n):
        low, high = forecast.interval
        axes.errorbar(
            [forecast.rows],
            [forecast.loss],
            yerr=[[max(0.0, forecast.loss - low)], [max(0.0, high - forecast.loss)]],
            color=OPEN,
            marker="s",
            mfc=PAPER,
            capsize=3,
            lw=1,
        )


def _forecast_rows(law: PowerLaw | None) -> set[int]:
    return set() if law is None else {law.at_2n.rows, law.at_4n.rows}
