"""The change by every metadata column of target and transfer suites, and the worst slice of all."""

from collections.abc import Sequence
from functools import partial
from typing import TypedDict

from llmtune.reporting.charts import draw_interval, interval_limit
from llmtune.reporting.sections.results import Row
from llmtune.reporting.suites import SliceReport, SuiteReport

SliceTable = tuple[Row, ...]


class SlicesSection(TypedDict):
    """What the template shows."""

    tables: list[tuple[SuiteReport, tuple[SliceTable, ...]]]
    worst: list[tuple[SuiteReport, SliceReport]]


def show_slices(suites: Sequence[SuiteReport]) -> SlicesSection | None:
    """Return the slice tables, and the worst slice of every suite."""
    sliced = [suite for suite in suites if suite.slices]
    if not sliced:
        return None
    return {
        "tables": [(s, slice_tables(s)) for s in sliced if s.role != "general"],
        "worst": [(suite, _worst(suite)) for suite in sliced],
    }


def slice_tables(suite: SuiteReport) -> tuple[SliceTable, ...]:
    """Return a suite's slices, a table for each column, worst first, on one axis of their own."""
    ends = [end for each in suite.slices for end in suite.gain(each.change)]
    draw = partial(draw_interval, limit=interval_limit(ends))
    tables: dict[str, list[Row]] = {}
    for each in suite.slices:
        row = Row(suite, each.change, draw(*suite.gain(each.change)), each)
        tables.setdefault(each.column, []).append(row)
    return tuple(tuple(rows) for rows in tables.values())


def _worst(suite: SuiteReport) -> SliceReport:
    return min(suite.slices, key=lambda each: suite.gain(each.change)[0])
