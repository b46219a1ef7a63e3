"""What leaked, how far apart the texts lie, what was learned by heart, what more rows give."""

from typing import Any

from llmtune.reporting.plots import draw_learning_curve
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
