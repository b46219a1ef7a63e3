"""The report as a model card in Markdown: verdict, numbers, data and limits."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmtune.evaluation.main_arms import CHAIN, MAIN_ARMS
from llmtune.reporting.numbers import (
    FRACTION,
    NumberWriter,
    Unit,
    format_bytes,
    format_count,
    format_seconds,
)
from llmtune.reporting.report import Report
from llmtune.reporting.sections.arms import FEW_SHOT, split_name
from llmtune.reporting.suites import Change, SuiteReport, name_pairs

UNSAFE = str.maketrans({"|": "\\|", "\n": " ", "<": "&lt;", ">": "&gt;"})


def render_markdown(report: Report) -> str:
    """Return the card; paths of this machine do not enter it, a local base is named by its end."""
    parts = (
        _head(report),
        _results(report),
        _alternatives(report),
        _forgetting(report),
        _sequence(report),
        _data(report),
        _training(report),
        _limits(report),
    )
    return "\n\n".join(block for part in parts for block in part) + "\n"


def _head(report: Report) -> Iterator[str]:
    config, base = report.manifest.config, report.manifest.base
    origin = str(base.get("origin") or (config.get("model") or {}).get("base") or "unknown")
    yield f"# {_text(report.name)}"
    yield f"Fine-tuned from **{_text(origin if base.get('revision') else Path(origin).name)}**."
    if report.compared:
        yield _text(report.compared)
    yield f"## Verdict: {report.verdict.name}"
    yield _text(report.verdict.meaning)
    if report.verdict.carries:
        yield _text(f"Not shown or not measured: {'; '.join(report.verdict.carries)}.")
    yield _bullets(report.verdict.reasons)
    if report.verdict.to_do:
        yield _text(f"Now: {report.verdict.to_do}")
    if report.verdict.also:
        yield f"Also holds: {', '.join(report.verdict.also)}."
    if report.caveats:
        yield "## Read this too"
        yield _bullets(report.caveats)


def _results(report: Report) -> Iterator[str]:
    if not report.suites:
        return
    percent = f"{report.resampling.confidence * 100:g} %"
    yield "## Results"
    pairs = name_pairs(report.suites)
    yield f"The same items for every model. Change: {pairs}, {percent} interval."
    yield _table(
        ("suite", "role", "items", *MAIN_ARMS, f"change, {percent}", "shows from"),
        (_result_row(suite) for suite in report.suites),
    )
    parts = [part for part in CHAIN if any(part in suite.chain for suite in report.suites)]
    if len(parts) > 1:
        yield "What the change is made of:"
        yield _table(
            ("suite", *(f"{part}: {after} − {before}" for part, (before, after) in CHAIN.items())),
            (
                (suite.name, *(format_interval(suite.unit, suite.chain.get(p)) for p in CHAIN))
                for suite in report.suites
            ),
        )


def _result_row(suite: SuiteReport) -> tuple[str, ...]:
    unit, change = suite.unit, suite.change
    return (
        suite.name,
        suite.role,
        format_count(suite.n),
        *(unit.score(suite.score(arm)) for arm in MAIN_ARMS),
        format_interval(unit, change),
        unit.bare_size(suite.mde) if suite.mde else "–",
    )


def _alternatives(report: Report) -> Iterator[str]:
    rows = [
        (
            suite.name,
            split_name(name).label,
            suite.unit.score(suite.score(name)),
            *_over(suite, name),
        )
        for suite in report.suites
        for name in suite.rivals
        if not (split_name(name).kind == FEW_SHOT and split_name(name).rest)
    ]
    if rows:
        yield "## Alternatives on the same items"
        yield _table(("suite", "arm", "score", "tuned minus it", "unparsed"), rows)


def _over(suite: SuiteReport, name: str) -> tuple[str, str]:
    change, unit = suite.rivals[name].tuned_over, suite.unit
    return format_interval(unit, change), format_count(suite.arms[name].unparseable)


def _forgetting(report: Report) -> Iterator[str]:
    lines = [
        line
        for diagnosis, found in report.diagnostics
        if found is not None
        for line in diagnosis.summary_lines(found, NumberWriter())
    ]
    if lines:
        yield "## Distance from the base"
        yield _bullets(lines)


def _sequence(report: Report) -> Iterator[str]:
    found = report.sequence
    if found is None:
        return
    yield "## Tasks in sequence"
    rows = [("untrained", found.untrained)]
    rows += [(f"after {task}", row) for task, row in zip(found.tasks, found.matrix, strict=True)]
    yield _table(
        ("score on", *found.tasks),
        ((name, *(FRACTION.score(score) for score in scores)) for name, scores in rows),
    )
    yield (
        f"Average at the end {FRACTION.score(found.accuracy)}, backward transfer "
        f"{FRACTION.difference(found.backward_transfer)}, forward transfer "
        f"{FRACTION.difference(found.forward_transfer)}."
    )


def _data(report: Report) -> Iterator[str]:
    rows = []
    for split, described in report.manifest.data.items():
        if isinstance(described, dict):
            for source in described.get("sources", []):
                name = Path(str(source.get("path", ""))).name
                rows.append((split, name, format_count(source.get("rows_kept"))))
    if rows:
        yield "## Data"
        yield _table(("split", "source", "rows"), rows)


def _training(report: Report) -> Iterator[str]:
    config, cost = report.manifest.config, report.cost
    adapter, train = config.get("adapter") or {}, config.get("train") or {}
    known: tuple[tuple[str, Any], ...] = (
        ("method", adapter.get("method")),
        ("rank", adapter.get("rank")),
        ("base in", report.manifest.base.get("quantization")),
        ("base was stored", report.manifest.base.get("stored")),
        ("learning rate", train.get("learning_rate")),
        ("optimizer steps", cost.steps),
        ("tokens read", format_count(cost.tokens) if cost.tokens else None),
        ("time", format_seconds(cost.total_seconds) if cost.total_seconds else None),
        ("adapter", format_bytes(cost.adapter_bytes) if cost.adapter_bytes else None),
    )
    lines = [f"{name}: {value}" for name, value in known if value is not None]
    if lines:
        yield "## Training"
        yield _bullets(lines)


def _limits(report: Report) -> Iterator[str]:
    yield "## Limits"
    lines = [
        "One training seed: the intervals cover the choice of items, training noise was not "
        "measured.",
        "Only what the suites ask was measured.",
    ]
    if report.missing:
        names = ", ".join(missing.name for missing in report.missing)
        lines.append(f"Not measured: {names}.")
    yield _bullets(lines)
    yield f"Made with llmtune {report.manifest.versions.get('llmtune', '')}.".replace(" .", ".")


def format_interval(unit: Unit, change: Change | None) -> str:
    """Format a difference and its interval without the unit; a dash if there is none."""
    if change is None:
        return "–"
    return f"{unit.change(change.difference)} {unit.interval(change.low, change.high)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_text, line)) + " |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in lines)


def _text(value: object) -> str:
    """Return text that neither ends a table's cell nor is read as HTML."""
    return str(value).translate(UNSAFE)
