"""Examples, merge check, data, what is missing, and the record of what the run stands on."""

from typing import Any

from llmtune.reporting.changed_words import mark_changes
from llmtune.reporting.merge_check import describe_check
from llmtune.reporting.report import Report


def build_generations(report: Report) -> dict[str, Any] | None:
    """Return the example prompts answered by both models, changed words marked."""
    if not report.generations:
        return None
    rows = [(each, *mark_changes(each.base, each.tuned)) for each in report.generations]
    return {"generations": rows}


def build_merge(report: Report) -> dict[str, Any] | None:
    """Return the merge and its check."""
    return {"check": describe_check(report.merge.get("check"))} if report.merge else None


def build_data(report: Report) -> dict[str, Any] | None:
    """Return the splits as the manifest describes them."""
    return {} if report.manifest.data else None


def build_missing(report: Report) -> dict[str, Any] | None:
    """Return what was not measured, by the command that measures it."""
    if not report.missing:
        return None
    by_command: dict[str | None, list[str]] = {}
    for missing in report.missing:
        by_command.setdefault(missing.command, []).append(missing.name)
    return {"by_command": by_command}


def build_record(_: Report) -> dict[str, Any]:
    """Return nothing of its own: the record shows the manifest."""
    return {}
