"""Rows that are to be labeled, as a suite: scored as the report scores them, without answers."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.data.problems import RowProblem
from llmtune.data.prompts import PromptRow, prompts_error
from llmtune.errors import LlmtuneError
from llmtune.evaluation.suite import load_suite
from llmtune.evaluation.tasks.base import BadItem, PromptedSuite, Suite, SuiteItem
from llmtune.evaluation.tasks.config import as_labelling_task, labelling_task


def label_prompts(labels: Sequence[str], rows: Sequence[PromptRow], path: Path) -> Suite:
    """Return a suite that asks prompts for one of `labels`.

    Raises:
        LlmtuneError: fewer than two labels, or rows that are continued as they are.
    """
    if len(set(labels)) < max(2, len(labels)) or not all(labels):
        raise LlmtuneError(
            f"--choices {','.join(labels)}: expected at least two different labels, none empty"
        )
    plain = [
        RowProblem(str(path), row.line, "is continued as it is; --choices answers chats")
        for row in rows
        if row.question.kind != "chat"
    ]
    if plain:
        raise prompts_error(plain)
    items = [
        SuiteItem(str(row.line), row.line, str(path), choices=tuple(labels), answer=0).asking(
            row.question
        )
        for row in rows
    ]
    return _suite("choices", labelling_task(labels, path), items, path)


def label_rows(name: str, rows: Iterable[tuple[int, Mapping[str, Any]]], path: Path) -> Suite:
    """Return a suite's questions over rows that need no answers.

    Raises:
        LlmtuneError: the suite has no labels of its own, or rows lack a field of its prompt.
    """
    suite = load_suite(name)
    config = as_labelling_task(suite.config)
    if config is None or not isinstance(config, PromptedSuite):
        raise LlmtuneError(
            f"--suite {name}: has no labels that are the same for every item; give them with "
            "--choices"
        )
    items, problems = [], []
    for line, row in rows:
        # The right label is not known, and any one of them makes the item whole.
        fields = {**row, config.answer: config.fixed_choices[0]}
        try:
            items.append(config.read_item(fields, SuiteItem(str(line), line, str(path))))
        except BadItem as error:
            problems.append(RowProblem(str(path), line, str(error)))
    if problems:
        raise prompts_error(problems)
    return _suite(suite.name, config, items, path)


def _suite(name: str, config: Any, items: Sequence[SuiteItem], path: Path) -> Suite:
    """Return the suite; copies need no clusters, since nothing is averaged."""
    content = [(item.prompt, item.choices, list(item.messages), list(item.tools)) for item in items]
    fingerprint = hashlib.sha256(repr(content).encode("utf-8", "surrogatepass")).hexdigest()
    items = [replace(item, cluster=None) for item in items]
    return Suite(name, path, config, tuple(items), path, fingerprint)
