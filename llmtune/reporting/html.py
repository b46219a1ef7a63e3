"""The report as one self-contained page: no script, no request, light, dark, phone and paper."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmtune.evaluation.diagnosis.config import DIAGNOSES
from llmtune.reporting import numbers
from llmtune.reporting.facts import format_label, format_value, list_facts
from llmtune.reporting.report import Report
from llmtune.reporting.sections.arms import show_arms
from llmtune.reporting.sections.broken import show_broken
from llmtune.reporting.sections.diagnoses import draw_forecasts, show_diagnosis
from llmtune.reporting.sections.generations import show_generations
from llmtune.reporting.sections.merge import show_merge
from llmtune.reporting.sections.plan import check_plan, show_plan
from llmtune.reporting.sections.probabilities import show_probabilities
from llmtune.reporting.sections.record import show_data, show_missing, show_record
from llmtune.reporting.sections.results import show_results
from llmtune.reporting.sections.seeds import show_seeds
from llmtune.reporting.sections.sequence import show_sequence
from llmtune.reporting.sections.slices import show_slices
from llmtune.reporting.sections.strengths import show_strengths
from llmtune.reporting.sections.training import show_training

Show = Callable[[Report], Mapping[str, object] | None]

SECTIONS: tuple[tuple[str, Show], ...] = (
    ("results", lambda r: show_results(r.suites, r.thresholds)),
    ("arms", lambda r: show_arms(r.suites)),
    ("strengths", lambda r: show_strengths(r.strengths, r.suites, r.thresholds)),
    ("seeds", lambda r: show_seeds(r.seeds)),
    ("broken", show_broken),
    ("sequence", lambda r: show_sequence(r.sequence)),
    ("slices", lambda r: show_slices(r.suites)),
    ("probabilities", lambda r: show_probabilities(r.shifts, [s.name for s in r.suites])),
    ("training", lambda r: show_training(r.curve, r.cost)),
    ("plan", lambda r: show_plan(check_plan(r.manifest))),
    *(
        ("diagnosis", partial(show_diagnosis, diagnosis=diagnosis))
        for diagnosis in DIAGNOSES
        if not diagnosis.is_about_forgetting
    ),
    ("generations", lambda r: show_generations(r.generations)),
    ("merge", lambda r: show_merge(r.merge)),
    ("data", lambda r: show_data(r.manifest)),
    ("missing", lambda r: show_missing(r.missing)),
    ("record", lambda r: show_record()),
)
"""The page from top to bottom: each name is its template's; each function says what to show."""


def render_html(report: Report) -> str:
    """Return the page; every text that comes from data or models is escaped."""
    environment = make_environment()
    sections = [
        Markup(environment.get_template(f"{name}.html.j2").render(report=report, **shown))
        for name, show in SECTIONS
        if (shown := show(report)) is not None
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
    environment.globals.update(format_value=format_value, nats=numbers.NATS, draw=draw_forecasts)
    return environment


def _headline(report: Report) -> list[str]:
    """Return what was done to what; a local base by its name, its whole path is in the record."""
    config, manifest = report.manifest.config, report.manifest
    adapter, base = config.get("adapter") or {}, manifest.base
    method = adapter.get("method")
    origin = str(base.get("origin") or (config.get("model") or {}).get("base") or "")
    parts = [
        origin if base.get("revision") else Path(origin).name,
        base.get("stored") or "",
        f"quantization {base['quantization']}" if base.get("quantization") else "",
        f"{method} rank {adapter['rank']}" if method and "rank" in adapter else method or "",
        manifest.created.partition("T")[0],
    ]
    return [part for part in parts if part]


def _format_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=90)
