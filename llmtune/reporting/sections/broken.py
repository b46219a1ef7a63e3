"""What broke: general suites, divergence from the base, and whether answers still end."""

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

from llmtune.evaluation.diagnosis.results import DivergenceResult, StopsResult, TextDivergence
from llmtune.reporting.diagnostics import Diagnostics
from llmtune.reporting.sections.generations import Generation
from llmtune.reporting.sections.slices import SliceTable, slice_tables
from llmtune.reporting.suites import SuiteReport

TEXTS = (("general", "general text"), ("target", "the task's prompts"))


class ShownStops(TypedDict):
    """How many examples say whether both models stopped, and how many of each did."""

    known: int
    base: int
    tuned: int


class BrokenSection(TypedDict):
    """What the template shows; a divergence is (text, strength, numbers)."""

    suites: list[tuple[SuiteReport, tuple[SliceTable, ...]]]
    divergences: list[tuple[str, str, TextDivergence]]
    stops: StopsResult | None
    shown_stops: ShownStops
    perplexity: Callable[[float], float]


def show_broken(
    suites: Sequence[SuiteReport],
    diagnostics: Diagnostics,
    generations: Sequence[Generation],
) -> BrokenSection | None:
    """Return what was measured of forgetting."""
    divergence, stops = diagnostics.divergence, diagnostics.stops
    generals = [(suite, slice_tables(suite)) for suite in suites if suite.role == "general"]
    if not generals and divergence is None and stops is None:
        return None
    return {
        "suites": generals,
        "divergences": _divergences(divergence) if divergence else [],
        "stops": stops,
        "shown_stops": _count_stops(generations),
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


def _count_stops(generations: Sequence[Generation]) -> ShownStops:
    """Return how many answers ended by themselves, of the examples that say so for both."""
    known = [g for g in generations if None not in (g.base_stopped, g.tuned_stopped)]
    return {
        "known": len(known),
        "base": sum(bool(each.base_stopped) for each in known),
        "tuned": sum(bool(each.tuned_stopped) for each in known),
    }
