"""Everything about the data that would make a fine-tune silently wrong, found beforehand."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from string import Template
from typing import TYPE_CHECKING

from llmtune.data.collect import Split, SplitCollector, read_evaluation_keys
from llmtune.data.config import DataConfig
from llmtune.data.findings import Finding, Notebook
from llmtune.data.hub import pin_sources
from llmtune.data.prepare import order_epoch
from llmtune.data.problems import RowProblem, list_first, shorten
from llmtune.data.report import DataReport
from llmtune.io.fingerprint import JsonObject
from llmtune.models.chat_template import default_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHOWN_PLACES = 50


@dataclass(frozen=True)
class ModelLimits:
    """What the model cannot read, as far as it is known without loading it."""

    positions: int | None = None
    """The longest sequence that it has positions for; None has no limit."""
    item_problems: tuple[RowProblem, ...] = ()
    """Items of the suites that it cannot be asked."""


@dataclass(frozen=True)
class CheckReport:
    """What `data check` found."""

    reports: tuple[DataReport, ...]
    """Train, then evaluation where there is one."""
    findings: tuple[Finding, ...]
    roles: dict[str, int]
    turns: dict[int, int]
    """How many rows have how many messages."""
    scripts: dict[str, int]
    system: str | None = None
    """The system prompt that the template prints in a chat without one."""

    @property
    def is_ok(self) -> bool:
        """True when nothing would stop a run."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One line: may this data be trained on?"""
        errors = [f for f in self.findings if f.severity == "error"]
        warnings = len(self.findings) - len(errors)
        if errors:
            kinds = ", ".join(f"{finding.kind} ({finding.count:,})" for finding in errors)
            return f"not ready: {kinds}"
        if warnings:
            return f"ready, with {warnings} kind{'s' * (warnings > 1)} of warning"
        return "ready: nothing found"

    def to_json(self) -> JsonObject:
        """Return the report as JSON values."""
        return {
            "verdict": self.verdict,
            "ok": self.is_ok,
            "findings": [asdict(finding) for finding in self.findings],
            "splits": {report.split: report.to_json() for report in self.reports},
            "roles": self.roles,
            "turns": {str(count): rows for count, rows in self.turns.items()},
            "scripts": self.scripts,
            "system": self.system,
        }

    def lines(self) -> list[str]:
        """Return the report as lines for the terminal, the verdict last."""
        return list(self._iter_lines())

    def _iter_lines(self) -> Iterator[str]:
        for report in self.reports:
            yield from report.lines()
        if self.roles:
            yield "roles: " + ", ".join(f"{role} {count:,}" for role, count in self.roles.items())
        yield "scripts: " + ", ".join(f"{name} {count:,}" for name, count in self.scripts.items())
        if self.system is not None:
            said = shorten(self.system, 80)
            yield f"system prompt of chats without one: {said} (data.system sets it)"
        for finding in self.findings:
            yield f"{finding.severity}: {finding.kind}: {finding.message}: {finding.count:,}"
            yield from list_first(finding.places, count=finding.count, indent="  ")
        yield self.verdict


def check_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    limits: ModelLimits = ModelLimits(),
    near_duplicates: bool = True,
) -> CheckReport:
    """Read all data as a run would and report everything found, refusing nothing.

    Importing torch is never needed.

    Raises:
        LlmtuneError: a source cannot be read at all, or the tokenizer cannot serve.
    """
    config = pin_sources(config)
    notebook = Notebook(config)
    reports = []
    splits: tuple[Split, ...] = ("train", "evaluation")
    for split in splits:
        keys = read_evaluation_keys(config) if split == "train" else {}
        seen = notebook.splits[split]
        collector = SplitCollector(config, tokenizer, split, keys, seen.look_at)
        if not collector.sources:
            continue
        table = collector.read()
        order, taken = order_epoch(collector, table, seed=0)
        report = collector.report(table.take(order), taken)
        reports.append(report)
        notebook.add_bad_rows(collector)
        notebook.add_shared(collector)
        notebook.add_lengths(collector)
        notebook.add_positions(table, limits.positions, split)
        notebook.add_signal(report)
    notebook.add_items(limits.item_problems)
    notebook.add_suspicions()
    notebook.add_duplicates()
    notebook.add_conflicts()
    if near_duplicates:
        notebook.add_near_duplicates()
    train, evaluation = notebook.splits["train"], notebook.splits["evaluation"]
    findings = sorted(notebook.findings, key=lambda f: (f.severity != "error", -f.count, f.kind))
    return CheckReport(
        reports=tuple(reports),
        findings=tuple(findings),
        roles=dict((train.roles + evaluation.roles).most_common()),
        turns=dict(sorted((train.turns + evaluation.turns).items())),
        scripts=dict((train.scripts + evaluation.scripts).most_common()),
        system=default_system(tokenizer) if tokenizer.chat_template else None,
    )


def render_check_page(report: CheckReport) -> str:
    """Return the page: verdict, findings with their rows, and every count."""
    state = "ok" if report.is_ok else "bad"
    findings = "\n".join(_finding_html(finding) for finding in report.findings)
    splits = "\n".join(_split_html(split) for split in report.reports)
    counts = "".join(
        f"<tr><th>{name}</th><td>{html.escape(_join(values))}</td></tr>"
        for name, values in (
            ("roles", report.roles),
            ("messages in a row", report.turns),
            ("scripts", report.scripts),
        )
    )
    if report.system is not None:
        said = html.escape(report.system)
        counts += f"<tr><th>system prompt of chats without one</th><td>{said}</td></tr>"
    return Template(PAGE).substitute(
        state=state,
        verdict=html.escape(report.verdict),
        splits=splits,
        counts=counts,
        findings=findings or "<p>Nothing found.</p>",
    )


def _finding_html(finding: Finding) -> str:
    places = "".join(
        f"<li><code>{html.escape(f'{place.source}:{place.line}')}</code> "
        f"{html.escape(place.detail)}</li>"
        for place in finding.places[:SHOWN_PLACES]
    )
    more = finding.count - min(len(finding.places), SHOWN_PLACES)
    places += f"<li>... and {more:,} more</li>" if more > 0 and finding.places else ""
    return (
        f'<details class="{finding.severity}" open><summary>{finding.severity}: '
        f"<b>{html.escape(finding.kind)}</b>: {html.escape(finding.message)}: {finding.count:,}"
        f"</summary><ul>{places}</ul></details>"
    )


def _split_html(report: DataReport) -> str:
    lines = "\n".join(html.escape(line) for line in report.lines())
    return f"<pre>{lines}</pre>"


def _join(counts: dict[str, int] | dict[int, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Data check</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --quiet: #6b6b6b;
  --error: #b3261e; --warning: #8a6100; --ok: #1e7a36; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eaeaea; --paper: #161616; --quiet: #9a9a9a; --error: #ff8a80;
    --warning: #f2c14e; --ok: #7bd88f; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem } .ok { color: var(--ok) } .bad { color: var(--error) }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
th { text-align: left; padding-right: 1rem; font-weight: 600; vertical-align: top }
details { border-left: 4px solid var(--warning); padding: .2rem .8rem; margin: .6rem 0 }
details.error { border-color: var(--error) } li { overflow-wrap: anywhere }
</style></head><body>
<h1>Data check: <span class="$state">$verdict</span></h1>
$splits
<table>$counts</table>
$findings
</body></html>
"""
