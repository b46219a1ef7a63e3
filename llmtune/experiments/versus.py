"""Two runs on the same items: which tuned model is better, with the statistics of the report."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import Comparison, compare_arms
from llmtune.evaluation.results import ArmResult
from llmtune.evaluation.stats import Resampling, holm, needed_items
from llmtune.io.fingerprint import JsonObject
from llmtune.io.manifest import read_manifest
from llmtune.io.run_dir import RunDir, atomic_write_json, atomic_write_text
from llmtune.reporting.charts import draw_interval, interval_limit
from llmtune.reporting.html import make_environment
from llmtune.reporting.numbers import Unit, format_count, format_p, unit_of_metric, without_nan
from llmtune.reporting.run_results import read_current_results, read_resampling
from llmtune.reporting.suites import place_of

ARM = "tuned"
MAY_DIFFER = ("base", "precision", "template", "versions")
"""What two runs may be allowed to differ in; items and how they are scored never."""


@dataclass(frozen=True)
class SuiteVersus:
    """One suite: the scores of both tuned models, and second minus first on the same items."""

    name: str
    role: str
    found: Comparison
    holm_p: float
    needed_items: int | None

    @property
    def unit(self) -> Unit:
        """How this suite's scores are written."""
        return unit_of_metric(self.found.metric)

    def better(self, significance: float) -> str | None:
        """Return `first` or `second` if the difference is clear of chance, else None."""
        if self.found.low <= 0 <= self.found.high or self.holm_p > significance:
            return None
        return "second" if self.found.gain > 0 else "first"


@dataclass(frozen=True)
class Versus:
    """The comparison of two runs; suites that only one of them has are named, not compared."""

    first: str
    second: str
    suites: tuple[SuiteVersus, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    differences: Mapping[str, tuple[str, ...]]
    resampling: Resampling

    @property
    def names(self) -> dict[str | None, str]:
        """How each side is called, and neither of them."""
        return {"first": self.first, "second": self.second, None: "no difference shown"}

    def winner(self, suite: SuiteVersus) -> str:
        """Return the name of the run that is better on a suite, or that none is."""
        return self.names[suite.better(1 - self.resampling.confidence)]

    def as_json(self) -> JsonObject:
        """Return the comparison for scripts."""
        significance = 1 - self.resampling.confidence
        suites = {
            suite.name: suite.found.as_dict()
            | {
                "holm_p": suite.holm_p,
                "needed_items": suite.needed_items,
                "better": suite.better(significance),
            }
            for suite in self.suites
        }
        values: dict[str, Any] = without_nan(
            {
                "format": 1,
                "first": self.first,
                "second": self.second,
                "difference": "second minus first",
                "suites": suites,
                "only_first": list(self.only_first),
                "only_second": list(self.only_second),
                "recipes_differ_in": {name: list(keys) for name, keys in self.differences.items()},
                "statistics": asdict(self.resampling),
            }
        )
        return values


def compare_runs(first: RunDir, second: RunDir, *, across: tuple[str, ...] = ()) -> Versus:
    """Compare the tuned models of two runs on every suite that both have.

    Args:
        across: what of the recipes may differ (`base`, `precision`, `template`, `versions`).

    Raises:
        LlmtuneError: one is not a run, they share no suite, or their recipes differ.
    """
    if first.path.resolve() == second.path.resolve():
        raise LlmtuneError(f"{first.path}: is the same run twice")
    refused = [key for key in across if key not in MAY_DIFFER]
    if refused:
        raise LlmtuneError(f"--across {refused[0]}: expected one of {', '.join(MAY_DIFFER)}")
    results = [_tuned_results(run) for run in (first, second)]
    shared = [name for name in results[0] if name in results[1]]
    if not shared:
        raise LlmtuneError(
            f"{first.path} and {second.path} have no suite on which both tuned models were scored; "
            f"they have {_listed(results[0])} and {_listed(results[1])}"
        )
    resampling = read_resampling(read_manifest(first).config)
    found = _compare(results, shared, resampling, across)
    adjusted = holm([each.p_value for each in found])
    suites = [
        SuiteVersus(each.suite, each.role, each, p, needed_items(each.difference, each.mde, each.n))
        for each, p in zip(found, adjusted, strict=True)
    ]
    names = tell_apart([first.path, second.path])
    return Versus(
        names[0],
        names[1],
        suites=tuple(sorted(suites, key=lambda suite: place_of(suite.role, suite.name))),
        only_first=tuple(sorted(set(results[0]) - set(shared))),
        only_second=tuple(sorted(set(results[1]) - set(shared))),
        differences={
            each.suite: each.recipe_differences for each in found if each.recipe_differences
        },
        resampling=resampling,
    )


def _compare(
    results: list[dict[str, ArmResult]],
    shared: list[str],
    resampling: Resampling,
    across: tuple[str, ...],
) -> list[Comparison]:
    """Compare every shared suite; all refusals are reported at once."""
    found, problems = [], []
    for name in shared:
        first, second = results[0][name], results[1][name]
        try:
            found.append(compare_arms(first, second, resampling=resampling, across=across))
        except LlmtuneError as error:
            problems.append(str(error))
    if problems:
        raise LlmtuneError(
            "\n".join(problems) + "\nthe runs cannot be compared; a difference in "
            f"{', '.join(MAY_DIFFER)} can be allowed with --across"
        )
    return found


def _tuned_results(run: RunDir) -> dict[str, ArmResult]:
    results = read_current_results(run, read_manifest(run))
    return {name: arms[ARM] for name, arms in results.items() if ARM in arms}


def tell_apart(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return what tells runs apart: their directories' names, or as they were given."""
    names = tuple(path.resolve().name for path in paths)
    return names if len(set(names)) == len(names) else tuple(map(str, paths))


def _listed(results: Mapping[str, ArmResult]) -> str:
    return ", ".join(sorted(results)) or "none"


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
    """Return the table to print; long names are above it, so that it fits 80 columns."""
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
