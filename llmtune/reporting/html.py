"""The report as one self-contained page: no script, no request, light, dark, phone and paper."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmtune.reporting import numbers
from llmtune.reporting.facts import format_label, format_value, list_facts
from llmtune.reporting.report import Report
from llmtune.reporting.sections import (
    arms,
    broken,
    diagnoses,
    plan,
    probabilities,
    record,
    results,
    sequence,
    slices,
    strengths,
    training,
)

Build = Callable[[Report], Mapping[str, Any] | None]

SECTIONS: tuple[tuple[str, Build], ...] = (
    ("results", results.build),
    ("arms", arms.build),
    ("strengths", strengths.build),
    ("broken", broken.build),
    ("sequence", sequence.build),
    ("slices", slices.build),
    ("probabilities", probabilities.build),
    ("training", training.build),
    ("plan", plan.build),
    ("learning_curve", diagnoses.build_learning_curve),
    ("contamination", diagnoses.build_contamination),
    ("memorisation", diagnoses.build_memorisation),
    ("shift", diagnoses.build_shift),
    ("probe", diagnoses.build_probe),
    ("generations", record.build_generations),
    ("merge", record.build_merge),
    ("data", record.build_data),
    ("missing", record.build_missing),
    ("record", record.build_record),
)
"""The page from top to bottom; each name is its template's, each function says what to show."""


def render_html(report: Report) -> str:
    """Return the page; every text that comes from data or models is escaped."""
    environment = make_environment()
    sections = [
        Markup(environment.get_template(f"{name}.html.j2").render(report=report, **shown))  # noqa: S704
        for name, build in SECTIONS
        if (shown := build(report)) is not None
    ]
    return environment.get_template("page.html.j2").render(
        report=report,
        headline=_headline(report),
        names={suite.name for suite in report.suites},
        sections=sections,
    )


def make_environment() -> Environment:
    """Return the templates with how numbers are written."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=numbers.format_count,
        seconds=numbers.format_seconds,
        bytes=numbers.format_bytes,
        p=numbers.format_p,
        number=numbers.format_number,
        share=numbers.FRACTION.score,
        facts=list_facts,
        label=format_label,
        together=numbers.keep_together,
        yaml=_format_yaml,
    )
    environment.globals.update(format_value=format_value, nats=numbers.NATS)
    return environment


def _headline(report: Report) -> list[str]:
    """Return what was done to what; a local base by its name, its whole path is in the record."""
    config, manifest = report.manifest.config, report.manifest
    adapter, base = config.get("adapter") or {}, manifest.base
    method = adapter.get("method")
    origin = str(base.get("origin") or (config.get("model") or {}).get("base") or "")
    parts = [
        origin if base.get("revision") else Path(origin).name,
        f"quantization {base['quantization']}" if base.get("quantization") else "",
        f"{method} rank {adapter['rank']}" if method and "rank" in adapter else method or "",
        manifest.created.partition("T")[0],
    ]
    return [part for part in parts if part]


def _format_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=90)
