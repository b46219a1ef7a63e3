"""The report as one self-contained page: no script, no request, light, dark, phone and paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmtune.reporting import numbers
from llmtune.reporting.changed_words import mark_changes
from llmtune.reporting.facts import Fact, list_facts, write_label, write_value
from llmtune.reporting.figures import draw_interval, draw_loss_curve, interval_limit
from llmtune.reporting.merge_check import describe_check
from llmtune.reporting.numbers import Unit
from llmtune.reporting.report import Cost, Report
from llmtune.reporting.sources import Generation
from llmtune.reporting.suites import Change, SliceReport, SuiteReport
from llmtune.reporting.verdict import MEANINGS, Thresholds

TEMPLATE = "report.html.j2"
ROLE_TITLES = {
    "target": "What it was tuned for",
    "transfer": "What it never saw",
    "general": "What it could do before",
}
TONES = {"SHIP": "good", "NEGATIVE": "bad", "BROKE-GENERAL": "bad"}


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


def render_html(report: Report) -> str:
    """Return the page; every text that comes from data or models is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=numbers.write_count,
        seconds=numbers.write_seconds,
        bytes=numbers.write_bytes,
        p=numbers.write_p,
        number=numbers.write_number,
        facts=list_facts,
        label=write_label,
        yaml=_write_yaml,
    )
    return environment.get_template(TEMPLATE).render(_context(report))


def _context(report: Report) -> dict[str, Any]:
    curve = report.curve
    return {
        "report": report,
        "headline": _headline(report),
        "stops": _count_stops(report.generations),
        "tone": TONES.get(report.verdict.name, "open"),
        "meaning": MEANINGS[report.verdict.name],
        "groups": group_rows(report.suites, report.thresholds),
        "broken": [(s, slice_tables(s)) for s in report.suites if s.role == "general"],
        "other_slices": [
            (s, slice_tables(s)) for s in report.suites if s.role != "general" and s.slices
        ],
        "limits": _limits(report.suites, report.thresholds),
        "names": {suite.name for suite in report.suites},
        "curve": None if curve.is_empty else draw_loss_curve(curve.train, curve.evaluation),
        "generations": [
            (each, *mark_changes(each.base, each.tuned)) for each in report.generations
        ],
        "costs": _cost_facts(report.cost),
        "check": describe_check(report.merge.get("check")),
        "perplexity": math.exp,
        "write_value": write_value,
    }


def _headline(report: Report) -> list[str]:
    """Return what was done to what, as far as the manifest says it."""
    config, manifest = report.manifest.config, report.manifest
    adapter, base = config.get("adapter") or {}, manifest.base
    method = adapter.get("method")
    parts = [
        str(base.get("origin") or (config.get("model") or {}).get("base") or ""),
        f"quantization {base['quantization']}" if base.get("quantization") else "",
        f"{method} rank {adapter['rank']}" if method and "rank" in adapter else method or "",
        manifest.created.partition("T")[0],
    ]
    return [part for part in parts if part]


def _cost_facts(cost: Cost) -> tuple[Fact, ...]:
    """Return what is known of tokens and sizes; time and memory have their own table."""
    known = (
        ("optimizer steps", cost.steps, numbers.write_count),
        ("tokens read in training", cost.tokens, numbers.write_count),
        ("tokens trained on", cost.trained_tokens, numbers.write_count),
        ("tokens per second", cost.tokens_per_second, numbers.write_count),
        ("adapter on disk", cost.adapter_bytes, numbers.write_bytes),
        ("merged model on disk", cost.merged_bytes, numbers.write_bytes),
    )
    return tuple(Fact(name, write(value)) for name, value, write in known if value is not None)


def _count_stops(generations: Sequence[Generation]) -> dict[str, int]:
    """Return how many answers ended by themselves, of the examples that say so for both."""
    known = [g for g in generations if None not in (g.base_stopped, g.tuned_stopped)]
    return {
        "known": len(known),
        "base": sum(bool(each.base_stopped) for each in known),
        "tuned": sum(bool(each.tuned_stopped) for each in known),
    }


def group_rows(suites: Sequence[SuiteReport], thresholds: Thresholds) -> tuple[Group, ...]:
    """Return the suites by role, each with its interval on an axis shared by all of its unit."""
    limits = _limits(suites, thresholds)
    groups = []
    for role in dict.fromkeys(suite.role for suite in suites):
        rows = tuple(
            Row(suite, suite.change, _plot(suite, limits, thresholds))
            for suite in suites
            if suite.role == role
        )
        groups.append(Group(ROLE_TITLES.get(role, role), role, rows))
    return tuple(groups)


def slice_tables(suite: SuiteReport) -> tuple[tuple[Row, ...], ...]:
    """Return a suite's slices, a table for each column, worst first, on one axis of their own."""
    ends = [end for each in suite.slices for end in suite.gain(each.change)]
    draw = partial(draw_interval, limit=interval_limit(ends))
    tables: dict[str, list[Row]] = {}
    for each in suite.slices:
        row = Row(suite, each.change, draw(*suite.gain(each.change)), each)
        tables.setdefault(each.column, []).append(row)
    return tuple(tuple(rows) for rows in tables.values())


def _plot(suite: SuiteReport, limits: dict[Unit, float], thresholds: Thresholds) -> Markup | None:
    if suite.change is None:
        return None
    bound = thresholds.general_bound(suite.unit) if suite.role == "general" else None
    return draw_interval(*suite.gain(suite.change), limit=limits[suite.unit], bound=bound)


def _limits(suites: Sequence[SuiteReport], thresholds: Thresholds) -> dict[Unit, float]:
    """Return the end of each unit's axis: every interval fits, and so does a bound that applies."""
    ends: dict[Unit, list[float]] = {}
    for suite in suites:
        if suite.change is not None:
            mine = ends.setdefault(suite.unit, [])
            mine += suite.gain(suite.change)
            if suite.role == "general":
                mine.append(thresholds.general_bound(suite.unit))
    return {unit: interval_limit(mine) for unit, mine in ends.items()}


def _write_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=90)
