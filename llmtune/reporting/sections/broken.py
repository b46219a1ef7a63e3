"""What broke: general suites, divergence from the base, and whether answers still end."""

import math
from collections.abc import Sequence
from typing import Any

from llmtune.evaluation.diagnosis.results import DivergenceResult, TextDivergence
from llmtune.reporting.report import Report
from llmtune.reporting.sections.rows import slice_tables
from llmtune.reporting.sources import Generation

TEXTS = (("general", "general text"), ("target", "the task's prompts"))


def build(report: Report) -> dict[str, Any] | None:
    """Return what was measured of forgetting."""
    suites = [(suite, slice_tables(suite)) for suite in report.with_role("general")]
    divergence, stops = report.diagnostics.divergence, report.diagnostics.stops
    if not suites and divergence is None and stops is None:
        return None
    return {
        "suites": suites,
        "divergences": _divergences(divergence) if divergence else [],
        "stops": stops,
        "shown_stops": _count_stops(report.generations),
        "perplexity": math.exp,
    }


def _divergences(found: DivergenceResult) -> list[tuple[str, str, TextDivergence]]:
    """Return (text, strength, divergence) for every strength that was measured, 1 last."""
    rows = []
    smaller = sorted((s for s in found.by_strength if float(s) != 1), key=float)
    for key, text in TEXTS:
        for strength in smaller:
            at = getattr(found.by_strength[strength], key)
            if at is not None:
                rows.append((text, strength, at))
        whole = getattr(found, key)
        if whole is not None:
            rows.append((text, "1", whole))
    return rows


def _count_stops(generations: Sequence[Generation]) -> dict[str, int]:
    """Return how many answers ended by themselves, of the examples that say so for both."""
    known = [g for g in generations if None not in (g.base_stopped, g.tuned_stopped)]
    return {
        "known": len(known),
        "base": sum(bool(each.base_stopped) for each in known),
        "tuned": sum(bool(each.tuned_stopped) for each in known),
    }
