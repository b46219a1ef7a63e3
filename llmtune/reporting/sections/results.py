"""Base, tuned and merged on every suite, grouped by what the suite stands for."""

from dataclasses import dataclass
from typing import Any

from llmtune.reporting.report import Report
from llmtune.reporting.sections.rows import Row, find_limits, suite_row

ROLE_TITLES = {
    "target": "What it was tuned for",
    "transfer": "What it never saw",
    "general": "What it could do before",
}


@dataclass(frozen=True)
class Group:
    """The suites of one role."""

    title: str
    role: str
    rows: tuple[Row, ...]


def build(report: Report) -> dict[str, Any] | None:
    """Return the suites by role."""
    if not report.suites:
        return None
    limits = find_limits(report.suites, report.thresholds)
    groups = [
        Group(
            ROLE_TITLES.get(role, role),
            role,
            tuple(suite_row(s, limits, report.thresholds) for s in report.with_role(role)),
        )
        for role in dict.fromkeys(suite.role for suite in report.suites)
    ]
    return {"groups": groups, "limits": limits}
