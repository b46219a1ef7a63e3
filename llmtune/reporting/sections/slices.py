"""The change by every metadata column of target and transfer suites, and the worst slice of all."""

from typing import Any

from llmtune.reporting.report import Report
from llmtune.reporting.sections.rows import slice_tables
from llmtune.reporting.suites import SliceReport, SuiteReport


def build(report: Report) -> dict[str, Any] | None:
    """Return the slice tables, and the worst slice among suites of the same unit as the target."""
    sliced = [suite for suite in report.suites if suite.slices]
    if not sliced:
        return None
    tables = [(s, slice_tables(s)) for s in sliced if s.role != "general"]
    return {"tables": tables, "worst": [(suite, _worst(suite)) for suite in sliced]}


def _worst(suite: SuiteReport) -> SliceReport:
    return min(suite.slices, key=lambda each: suite.gain(each.change)[0])
