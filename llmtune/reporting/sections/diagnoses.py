"""What each diagnosis shows of itself, as data; which one it is matters to no page."""

from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from llmtune.evaluation.diagnosis.base import Diagnosis
from llmtune.evaluation.diagnosis.shown import (
    CleanScore,
    Facts,
    Plot,
    Section,
)
from llmtune.reporting.charts import BASE, GOOD, OPEN, PAPER, draw, finish_axes, format_tick
from llmtune.reporting.numbers import NumberWriter
from llmtune.reporting.report import Report
from llmtune.reporting.suites import SuiteReport


def show_diagnosis(report: Report, diagnosis: Diagnosis[Any]) -> dict[str, Section] | None:
    """Return the section of one diagnosis; None if it was not made or has no section."""
    found = report.diagnostics.found.get(diagnosis.name)
    section = None if found is None else diagnosis.section(found, collect_facts(report))
    return None if section is None else {"section": section}


def show_forgetting(report: Report) -> list[Section]:
    """Return what the diagnoses say about forgetting."""
    facts = collect_facts(report)
    sections = []
    for diagnosis, found in report.diagnostics:
        if diagnosis.is_about_forgetting:
            shown = diagnosis.instead(facts) if found is None else diagnosis.section(found, facts)
            sections += [shown] if shown else []
    return sections


def collect_facts(report: Report) -> Facts:
    """Return what the sections may say beside their own numbers."""
    known = [g for g in report.generations if None not in (g.base_stopped, g.tuned_stopped)]
    return Facts(
        write=NumberWriter(),
        clean={suite.name: _clean(suite) for suite in report.suites if suite.clean},
        contaminated_share=report.thresholds.contaminated_share,
        example_stops=(
            len(known),
            sum(bool(each.base_stopped) for each in known),
            sum(bool(each.tuned_stopped) for each in known),
        ),
    )


def _clean(suite: SuiteReport) -> CleanScore:
    clean, unit = suite.clean, suite.unit
    assert clean is not None, "only suites with leaked items are compared without them"
    change = clean.change
    return CleanScore(
        before=f"{unit.score(suite.before)} → {unit.score(clean.before)}",
        after=f"{unit.score(suite.after)} → {unit.score(clean.after)}",
        change=unit.change(change.difference),
        interval=unit.interval(change.low, change.high),
    )


def draw_forecasts(given: Plot) -> Markup:
    """Draw points over a number of rows, a fitted line, and forecasts with their intervals."""

    def plot(axes: Axes) -> None:
        rows = [x for x, _ in given.points]
        axes.plot(
            rows,
            [y for _, y in given.points],
            color=GOOD,
            ls="none",
            marker="o",
            label="trained",
        )
        if given.line:
            axes.plot(*zip(*given.line, strict=True), color=BASE, lw=1)
        for x, y, low, high in given.forecasts:
            axes.errorbar(
                [x],
                [y],
                yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
                color=OPEN,
                marker="s",
                mfc=PAPER,
                capsize=3,
                lw=1,
            )
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        finish_axes(axes, *given.axes)
        ticks = sorted({*rows, *(x for x, *_ in given.forecasts)})
        axes.set_xticks(ticks, [format_tick(tick) for tick in ticks])

    return draw(given.name, given.label, plot)
