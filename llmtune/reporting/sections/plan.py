"""The planner's estimate of training memory beside the measured peak."""

from typing import Any

from llmtune.reporting.plan_check import check_plan
from llmtune.reporting.report import Report


def build(report: Report) -> dict[str, Any] | None:
    """Return the section's values; None where there is nothing to compare."""
    check = check_plan(report.manifest)
    return None if check is None else {"check": check}
