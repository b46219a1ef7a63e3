"""Everything about the data that would make a fine-tune silently wrong, found beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from llmtune.data.collect import Split, SplitCollector, read_evaluation_keys
from llmtune.data.config import DataConfig
from llmtune.data.findings import Finding, Notebook, ShownRow
from llmtune.data.hub import pin_sources
from llmtune.data.prepare import order_epoch
from llmtune.data.problems import RowProblem, list_first, shorten
from llmtune.data.report import DataReport
from llmtune.io.fingerprint import JsonObject
from llmtune.models.chat_template import default_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LISTED_LABELS = 8


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
    labels: dict[Split, dict[str, int]] = field(default_factory=dict)
    """Of each split whose answers are labels: how many rows have which, the commonest first."""
    first_rows: dict[Split, tuple[ShownRow, ...]] = field(default_factory=dict)
    """Of each split, for the page."""
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
            "labels": {split: dict(counts) for split, counts in self.labels.items()},
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
        for split, counts in self.labels.items():
            yield f"{split} labels: {_list_labels(counts)}"
        if self.system is not None:
            said = shorten(self.system, 80)
            yield f"system prompt of chats without one: {said} (data.system sets it)"
        for finding in self.findings:
            yield f"{finding.severity}: {finding.kind}: {finding.message}: {finding.count:,}"
            if finding.places:
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
        labels={split: seen.labels for split, seen in notebook.splits.items() if seen.labels},
        first_rows={split: tuple(seen.first) for split, seen in notebook.splits.items()},
        system=default_system(tokenizer) if tokenizer.chat_template else None,
    )


def _list_labels(counts: dict[str, int]) -> str:
    """Return the labels with their counts, or of many only how many and how uneven."""
    if len(counts) <= LISTED_LABELS:
        return ", ".join(f"{shorten(name, 40)} {count:,}" for name, count in counts.items())
    (most, largest), *_, (least, smallest) = counts.items()
    return (
        f"{len(counts):,}, from {smallest:,} rows ({shorten(least, 40)}) to {largest:,} "
        f"({shorten(most, 40)})"
    )
