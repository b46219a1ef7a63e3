"""Several trainings of one recipe for people: a page, a JSON file, and a table in the terminal."""

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtune.experiments.seeds import SeedStudy, SeedSuite
from llmtune.io.run_dir import atomic_write_json, atomic_write_text
from llmtune.reporting.figures import draw_interval, interval_limit
from llmtune.reporting.html import make_environment
from llmtune.reporting.numbers import Unit, format_count, format_p

PAGE_NAME = "seeds.html"


@dataclass(frozen=True)
class ShownSuite:
    """One suite of the study with its interval drawn and its outcome in words."""

    suite: SeedSuite
    plot: Markup
    outcome: str


def write_seeds(study: SeedStudy, out_dir: Path) -> Path:
    """Write `seeds.html` and `seeds.json` into a directory and return the page's path."""
    page = out_dir / PAGE_NAME
    atomic_write_json(page.with_suffix(".json"), study.as_json())
    atomic_write_text(page, render_seeds(study))
    return page


def render_seeds(study: SeedStudy) -> str:
    """Return the page; it asks for nothing from outside."""
    limits: dict[Unit, float] = {}
    for unit in {suite.unit for suite in study.suites}:
        ends = [end for suite in study.suites if suite.unit == unit for end in suite.gain]
        limits[unit] = interval_limit(ends)
    shown = [
        ShownSuite(
            suite,
            draw_interval(*suite.gain, limit=limits[suite.unit]),
            suite.outcome(study.significance),
        )
        for suite in study.suites
    ]
    return make_environment().get_template("seeds.html.j2").render(study=study, shown=shown)


def render_seeds_table(study: SeedStudy) -> RenderableType:
    """Return the runs with their verdicts, and the table, to print; it fits 80 columns."""
    percent = f"{study.resampling.confidence * 100:g} %"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("suite", overflow="fold")
    for name in ("n", "base", "tuned", "between seeds"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column(f"change, {percent} with seeds", justify="right", no_wrap=True)
    table.add_column("Holm p", justify="right", no_wrap=True)
    for suite in study.suites:
        unit = suite.unit
        table.add_row(
            Text(suite.name),
            format_count(suite.n),
            unit.score(suite.base),
            unit.score(sum(suite.tuned) / len(suite.tuned)),
            f"± {unit.bare_size(suite.spread)}",
            f"{unit.change(suite.difference)} {unit.interval(suite.low, suite.high)}",
            format_p(suite.holm_p),
        )
    runs = zip(study.names, study.seeds, study.verdicts, strict=True)
    lines = [Text(f"{name}, seed {seed}: {verdict}") for name, seed, verdict in runs]
    return Group(*lines, table)
