"""What earlier tasks kept, where the run is a step of a sequence."""

from typing import Any

from llmtune.reporting.numbers import FRACTION
from llmtune.reporting.report import Report


def build(report: Report) -> dict[str, Any] | None:
    """Return the accuracy matrix with its three numbers."""
    found = report.sequence
    return {"sequence": found, "unit": FRACTION} if found else None
