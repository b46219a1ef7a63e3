"""Rows of results tables, each with its interval drawn on an axis shared by all of its unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from llmtune.reporting.figures import draw_interval, interval_limit
from llmtune.reporting.numbers import Unit
from llmtune.reporting.suites import Change, SliceReport, SuiteReport, Thresholds


@dataclass(frozen=True)
class Row:
    """One line of a results table: a suite, or a slice of one, with its interval drawn."""

    suite: SuiteReport
    change: Change | None
    plot: Markup | None
    slice: SliceReport | None = None


def suite_row(suite: SuiteReport, limits: dict[Unit, float], thresholds: Thresholds) -> Row:
    """Return a suite's row; a general suite shows its bound."""
    if suite.change is None:
        return Row(suite, None, None)
    bound = thresholds.general_bound(suite.unit) if suite.role == "general" else None
    plot = draw_interval(*suite.gain(suite.change), limit=limits[suite.unit], bound=bound)
    return Row(suite, suite.change, plot)


def slice_tables(suite: SuiteReport) -> tuple[tuple[Row, ...], ...]:
    """Return a suite's slices, a table for each column, worst first, on one axis of their own."""
    ends = [end for each in suite.slices for end in suite.gain(each.change)]
    draw = partial(draw_interval, limit=interval_limit(ends))
    tables: dict[str, list[Row]] = {}
    for each in suite.slices:
        row = Row(suite, each.change, draw(*suite.gain(each.change)), each)
        tables.setdefault(each.column, []).append(row)
    return tuple(tuple(rows) for rows in tables.values())


def find_limits(suites: Sequence[SuiteReport], thresholds: Thresholds) -> dict[Unit, float]:
    """Return the end of each unit's axis: every interval fits, and so does a bound that applies."""
    ends: dict[Unit, list[float]] = {}
    for suite in suites:
        if suite.change is not None:
            mine = ends.setdefault(suite.unit, [])
            mine += suite.gain(suite.change)
            if suite.role == "general":
                mine.append(thresholds.general_bound(suite.unit))
    return {unit: interval_limit(mine) for unit, mine in ends.items()}
