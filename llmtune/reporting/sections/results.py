"""The main arms on every suite, grouped by what the suite is for, and the parts of the change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from markupsafe import Markup

from llmtune.evaluation.main_arms import CHAIN, MainArm
from llmtune.reporting.beside import BesideTable, tabulate_beside
from llmtune.reporting.charts import draw_interval, interval_limit
from llmtune.reporting.numbers import Unit
from llmtune.reporting.suites import Change, SliceReport, SuiteReport, Thresholds, name_pairs

ROLE_TITLES = {
    "target": "What it was tuned for",
    "transfer": "What it never saw",
    "general": "What it could do before",
}


@dataclass(frozen=True)
class Row:
    """One line of a results table: a suite, or a slice of one, with its interval drawn."""

    suite: SuiteReport
    change: Change | None
    plot: Markup | None
    slice: SliceReport | None = None


@dataclass(frozen=True)
class Group:
    """The suites of one role."""

    title: str
    role: str
    rows: tuple[Row, ...]


class ResultsSection(TypedDict):
    """What the template shows; `limits` are the ends of each unit's axis.

    `pairs` says which arms are compared; `parts` are the change's, shown for the suites `chains`.
    """

    groups: list[Group]
    limits: dict[Unit, float]
    pairs: str
    parts: dict[str, tuple[MainArm, MainArm]]
    chains: list[SuiteReport]
    beside: list[BesideTable]


def show_results(suites: Sequence[SuiteReport], thresholds: Thresholds) -> ResultsSection | None:
    """Return the suites by role."""
    if not suites:
        return None
    limits = _find_limits(suites, thresholds)
    groups = [
        Group(
            ROLE_TITLES.get(role, role),
            role,
            tuple(_row(suite, limits, thresholds) for suite in suites if suite.role == role),
        )
        for role in dict.fromkeys(suite.role for suite in suites)
    ]
    return {
        "groups": groups,
        "limits": limits,
        "pairs": name_pairs(suites),
        "parts": CHAIN,
        "chains": [suite for suite in suites if len(suite.chain) > 1],
        "beside": [table for suite in suites if (table := tabulate_beside(suite)) is not None],
    }


def _find_limits(suites: Sequence[SuiteReport], thresholds: Thresholds) -> dict[Unit, float]:
    """Return the end of each unit's axis: every interval fits, and so does a bound that applies."""
    ends: dict[Unit, list[float]] = {}
    for suite in suites:
        if suite.change is not None:
            mine = ends.setdefault(suite.unit, [])
            mine += suite.gain(suite.change)
            if suite.role == "general":
                mine.append(thresholds.general_bound(suite.unit))
    return {unit: interval_limit(mine) for unit, mine in ends.items()}


def _row(suite: SuiteReport, limits: dict[Unit, float], thresholds: Thresholds) -> Row:
    """Return a suite's row; a general suite shows its bound."""
    if suite.change is None:
        return Row(suite, None, None)
    bound = thresholds.general_bound(suite.unit) if suite.role == "general" else None
    plot = draw_interval(*suite.gain(suite.change), limit=limits[suite.unit], bound=bound)
    return Row(suite, suite.change, plot)
