"""The comparison of two runs for people: a page, a JSON file, and a table in the terminal."""

import re
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtune.experiments.versus import SuiteVersus, Versus
from llmtune.io.run_dir import atomic_write_json, atomic_write_text
from llmtune.reporting.figures import draw_interval, interval_limit
from llmtune.reporting.html import make_environment
from llmtune.reporting.numbers import Unit, format_count, format_p

LONGEST_NAME = 12
"""A longer name of a run does not head a column in the terminal."""


@dataclass(frozen=True)
class ShownSuite:
    """One suite of the comparison with its interval drawn and who is better."""

    suite: SuiteVersus
    plot: Markup
    winner: str
    is_clear: bool


def write_versus(versus: Versus, out_dir: Path) -> Path:
    """Write `versus-<second>.html` and `.json` into a directory and return the page's path."""
    safe = re.sub(r"[^\w.-]+", "-", versus.second).strip("-.") or "run"
    page = out_dir / f"versus-{safe}.html"
    atomic_write_json(page.with_suffix(".json"), versus.as_json())
    atomic_write_text(page, render_versus(versus))
    return page


def render_versus(versus: Versus) -> str:
    """Return the page of a comparison; it asks for nothing from outside."""
    limits = _limits(versus)
    significance = 1 - versus.resampling.confidence
    shown = [
        ShownSuite(
            suite,
            draw_interval(*_gain(suite), limit=limits[suite.unit]),
            versus.winner(suite),
            suite.better(significance) is not None,
        )
        for suite in versus.suites
    ]
    return make_environment().get_template("versus.html.j2").render(versus=versus, shown=shown)


def render_versus_table(versus: Versus) -> RenderableType:
    """Return the table to print; long names stand above it, so that it fits 80 columns."""
    names = {"first": versus.first, "second": versus.second}
    is_long = max(map(len, names.values())) > LONGEST_NAME
    shown = {side: side if is_long else name for side, name in names.items()}
    significance = 1 - versus.resampling.confidence
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("suite", overflow="fold")
    for name in ("n", *shown.values()):
        table.add_column(Text(name), justify="right", overflow="fold")
    percent = f"{versus.resampling.confidence * 100:g} %"
    table.add_column(f"second minus first, {percent}", justify="right", no_wrap=True)
    table.add_column("Holm p", justify="right", no_wrap=True)
    table.add_column("better", overflow="fold")
    for suite in versus.suites:
        found, unit = suite.found, suite.unit
        table.add_row(
            Text(suite.name),
            format_count(found.n),
            unit.score(found.base),
            unit.score(found.tuned),
            f"{unit.change(found.difference)} {unit.interval(found.low, found.high)}",
            format_p(suite.holm_p),
            Text(shown.get(suite.better(significance) or "", "none shown")),
        )
    legend = [Text(f"{side}: {name}") for side, name in names.items() if is_long]
    notes = [
        Text(f"Only in {name}: {', '.join(suites)}.")
        for name, suites in (
            (versus.first, versus.only_first),
            (versus.second, versus.only_second),
        )
        if suites
    ]
    return Group(*legend, table, *notes)


def _gain(suite: SuiteVersus) -> tuple[float, float, float]:
    found = suite.found
    if found.higher_is_better:
        return found.difference, found.low, found.high
    return -found.difference, -found.high, -found.low


def _limits(versus: Versus) -> dict[Unit, float]:
    ends: dict[Unit, list[float]] = {}
    for suite in versus.suites:
        ends.setdefault(suite.unit, []).extend(_gain(suite))
    return {unit: interval_limit(mine) for unit, mine in ends.items()}
