"""The report in the terminal: verdict, reasons, one table, caveats, cost; fits 80 columns."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmtune.evaluation.diagnosis.base import Diagnostic
from llmtune.evaluation.diagnosis.config import DIAGNOSES
from llmtune.evaluation.main_arms import CHAIN, MAIN_ARMS
from llmtune.reporting.numbers import (
    Unit,
    format_bytes,
    format_count,
    format_p,
    format_seconds,
    unit_of_metric,
)
from llmtune.reporting.report import Report
from llmtune.reporting.sections.arms import arm_rows
from llmtune.reporting.sections.record import group_by_command
from llmtune.reporting.sections.seeds import SeedStudy
from llmtune.reporting.suites import Change, SuiteReport

if TYPE_CHECKING:
    from llmtune.evaluation.compare import ComparisonJson
    from llmtune.evaluation.scores import Scores

STYLES = {"good": "bold green", "bad": "bold red", "open": "bold yellow"}


def render_terminal(report: Report) -> RenderableType:
    """Return what to print; color is the console's choice, so NO_COLOR works."""
    name = report.verdict.name
    verdict = _sentence((name, STYLES[report.verdict.tone]), "  ", report.verdict.meaning)
    parts: list[RenderableType] = [_sentence(report.compared)] if report.compared else []
    parts += [verdict]
    parts += [_indented(f"Carries: {carried}.") for carried in report.verdict.carries]
    parts += [_indented(reason) for reason in report.verdict.reasons]
    parts += [_indented(f"Now: {report.verdict.to_do}")] if report.verdict.to_do else []
    if report.suites:
        parts += [Text(), suites_table(report)]
    if any(suite.chain for suite in report.suites):
        parts += [chain_table(report)]
    if any(suite.rivals for suite in report.with_role("target")):
        parts += [arms_table(report)]
    if report.seeds is not None:
        parts += [seeds_table(report.seeds)]
    if report.caveats:
        parts += [Text("Read this too:", style="bold")]
        parts += [_indented(f"- {caveat}") for caveat in report.caveats]
    if report.missing:
        parts += [_sentence(line) for line in format_missing(report)]
    if cost := format_cost(report):
        parts.append(_sentence(cost))
    return Group(*parts)


def suites_table(report: Report) -> Table:
    """Return the table of the main arms per suite, grouped by role."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("suite", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    for arm in (*MAIN_ARMS, "majority"):
        table.add_column(arm, justify="right", no_wrap=True)
    previous = None
    for suite in report.suites:
        if previous is not None and suite.role != previous:
            table.add_section()
        previous = suite.role
        unit = suite.unit
        table.add_row(
            Text(suite.name),
            format_count(suite.n),
            *(unit.score(suite.score(arm)) for arm in MAIN_ARMS),
            unit.score(suite.majority),
        )
    return table


def chain_table(report: Report) -> Table:
    """Return each suite's change with its interval, and the parts that it is made of."""
    percent = f"{report.resampling.confidence * 100:g} %"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("suite", overflow="fold")
    table.add_column(f"change, {percent}", justify="right", no_wrap=True)
    for part in CHAIN:
        table.add_column(part, justify="right", no_wrap=True)
    for suite in report.suites:
        parts = (suite.chain.get(part) for part in CHAIN)
        table.add_row(
            Text(suite.name),
            _format_change(suite, suite.change),
            *(suite.unit.change(part.difference) if part else "–" for part in parts),
        )
    return table


def arms_table(report: Report) -> Table:
    """Return every measured arm on the target suites: score, and tuned minus it."""
    percent = f"{report.resampling.confidence * 100:g} %"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("arm", overflow="fold")
    for name in ("n", "score", "unparsed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"tuned minus it, {percent}", justify="right", no_wrap=True)
    for suite in report.with_role("target"):
        table.add_section()
        table.add_row(Text(suite.name, style="bold"))
        for row in arm_rows(suite):
            if not row.is_tuned:
                table.add_row(
                    Text(f"  {row.label}"),
                    format_count(row.n),
                    row.score,
                    format_count(row.unparseable),
                    _format_change(suite, row.tuned_over),
                )
    return table


def seeds_table(study: SeedStudy) -> RenderableType:
    """Return the runs with their verdicts, and the table, to print; it fits 80 columns."""
    percent = f"{study.resampling.confidence * 100:g} %"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("suite", overflow="fold")
    for name in ("n", "before", "after", "between seeds"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column(f"change, {percent} with seeds", justify="right", no_wrap=True)
    table.add_column("Holm p", justify="right", no_wrap=True)
    for suite in study.suites:
        unit = suite.unit
        table.add_row(
            Text(suite.name),
            format_count(suite.n),
            unit.score(suite.before),
            unit.score(sum(suite.after) / len(suite.after)),
            f"± {unit.bare_size(suite.spread)}",
            f"{unit.change(suite.difference)} {unit.interval(suite.low, suite.high)}",
            format_p(suite.holm_p),
        )
    runs = zip(study.names, study.seeds, study.verdicts, strict=True)
    lines = [Text(f"{name}, seed {seed}: {verdict}") for name, seed, verdict in runs]
    return Group(*lines, Text(f"together: {study.verdict}", style="bold"), table)


def format_missing(report: Report) -> list[str]:
    """Format what was not measured, and the commands that measure it."""
    lines = []
    for command, names in group_by_command(report.missing).items():
        how = f" ({command})" if command else ""
        lines.append(f"Not measured: {', '.join(names)}{how}.")
    return lines


def format_cost(report: Report) -> str:
    """Format time, peak memory, trained tokens and adapter size in one line; what is known."""
    cost = report.cost
    parts = [f"{stage} {format_seconds(spent)}" for stage, spent in cost.seconds.items()]
    if cost.largest_peak_bytes is not None:
        parts.append(f"peak {format_bytes(cost.largest_peak_bytes)}")
    if cost.training_gpu_peak_bytes is not None:
        parts.append(f"training {format_bytes(cost.training_gpu_peak_bytes)} on the GPU")
    if cost.trained_tokens is not None:
        parts.append(f"{format_count(cost.trained_tokens)} tokens trained on")
    if cost.adapter_bytes is not None:
        parts.append(f"adapter {format_bytes(cost.adapter_bytes)}")
    return ", ".join(parts)


def render_scores(scores: "Scores") -> Table:
    """Return a table of suites by arms; the last column is the change with its interval."""
    arms = [arm for arm in MAIN_ARMS if any(arm in suite["arms"] for suite in scores.values())]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("suite")
    for name in ("n", *arms, "majority"):
        table.add_column(name, justify="right")
    is_compared = any(suite["comparison"] for suite in scores.values())
    if is_compared:
        pairs = dict.fromkeys(tuple(s["compared"]) for s in scores.values() if s["compared"])
        name = "; ".join(f"{after} - {before}" for before, after in pairs)
        table.add_column(name, justify="right")
    for name, suite in scores.items():
        unit = unit_of_metric(suite["metric"])
        cells = [name, format_count(suite["n"])]
        found = [suite["arms"].get(arm) for arm in arms]
        cells += [unit.score(None if each is None else each["mean"]) for each in found]
        cells.append(unit.score(suite["majority"]))
        if is_compared:
            change = suite["comparison"]
            cells.append(_format_interval(unit, change) if change else "")
        table.add_row(*cells)
    return table


def iter_lines(found: Diagnostic) -> Iterator[str]:
    """Yield what the diagnosis says of its own result."""
    (diagnosis,) = (each for each in DIAGNOSES if isinstance(found, each.result))
    yield from diagnosis.lines(found)


def _sentence(*parts: str | tuple[str, str]) -> Text:
    """Return text that wraps at words, even on a console that is set not to wrap."""
    return Text.assemble(*parts, no_wrap=False, overflow="fold")


def _indented(text: str) -> Padding:
    return Padding(_sentence(text), (0, 0, 0, 2))


def _format_change(suite: SuiteReport, change: Change | None) -> Text:
    if change is None:
        return Text("–")
    _, low, high = suite.gain(change)
    style = "green" if low > 0 else "red" if high < 0 else ""
    interval = suite.unit.interval(change.low, change.high)
    return Text.assemble((suite.unit.change(change.difference), style), " ", interval)


def _format_interval(unit: Unit, change: "ComparisonJson") -> str:
    interval = unit.interval(change["low"], change["high"])
    return f"{unit.change(change['difference'])} {interval}"
