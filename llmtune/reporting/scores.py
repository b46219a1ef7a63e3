"""Scores that were asked for alone, as one small table."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from llmtune.reporting.numbers import Unit, format_count, unit_of_metric

ARMS = ("base", "tuned", "merged")


def render_scores(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of suites by arms; the last column is tuned minus base with its interval."""
    arms = [arm for arm in ARMS if any(arm in suite["arms"] for suite in scores.values())]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("suite")
    for name in ("n", *arms, "majority"):
        table.add_column(name, justify="right")
    is_compared = any(suite["comparison"] for suite in scores.values())
    if is_compared:
        table.add_column("tuned - base", justify="right")
    for name, suite in scores.items():
        unit = unit_of_metric(suite["metric"])
        cells = [name, format_count(suite["n"])]
        cells += [unit.score(suite["arms"].get(arm, {}).get("mean")) for arm in arms]
        cells.append(unit.score(suite["majority"]))
        if is_compared:
            change = suite["comparison"]
            cells.append(_format_change(unit, change) if change else "")
        table.add_row(*cells)
    return table


def _format_change(unit: Unit, change: Mapping[str, Any]) -> str:
    interval = unit.interval(change["low"], change["high"])
    return f"{unit.change(change['difference'])} {interval}"
