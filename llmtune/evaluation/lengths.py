"""Items that a model cannot be asked, found before anything is trained."""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.data.init_suite import FEWEST_ITEMS, NoSuite, SuiteDraft, render_items
from llmtune.data.masks import refuse_control_text
from llmtune.data.problems import RowError, RowProblem
from llmtune.data.prompts import prompts_error
from llmtune.evaluation.question import question_of
from llmtune.evaluation.suite import load_suite, render_suite
from llmtune.evaluation.tasks.base import PromptedSuite, Suite, SuiteItem
from llmtune.models.turns import control_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_TOKENS = 512
"""More than a chat template writes around one question; only then are items tokenized to see."""


def refuse_unfit_items(
    tokenizer: "PreTrainedTokenizerFast", suites: Sequence[Suite], positions: int | None
) -> None:
    """Refuse suites with items that the model cannot be asked.

    Raises:
        LlmtuneError: names the items by file and line, with what is wrong.
    """
    problems = find_unfit_items(tokenizer, suites, positions)
    if problems:
        raise prompts_error(problems)


def without_unfit_items(
    draft: SuiteDraft, tokenizer: "PreTrainedTokenizerFast", positions: int | None
) -> tuple[SuiteDraft | NoSuite, str | None]:
    """Return a drafted suite without what the model cannot be asked, and what to say of it."""
    with tempfile.TemporaryDirectory(prefix="llmtune-") as folder:
        path, items = Path(folder, "draft.yaml"), Path(folder, "items.jsonl")
        items.write_text(render_items(draft), encoding="utf-8")
        text = render_suite(draft, name="draft", items_name=items.name, source=items.name)
        path.write_text(text, encoding="utf-8")
        problems = find_unfit_items(tokenizer, [load_suite(path)], positions)
    if not problems:
        return draft, None
    lines = {problem.line for problem in problems}
    kept = tuple(item for line, item in enumerate(draft.items, 1) if line not in lines)
    note = (
        f"{len(lines)} of {len(draft.items)} drafted items cannot be asked and are left out; the "
        f"first {problems[0].message.partition(';')[0]}"
    )
    if len(kept) < FEWEST_ITEMS:
        return NoSuite(f"{note}; {len(kept)} are left, and {FEWEST_ITEMS} are needed"), note
    return replace(draft, items=kept), note


def find_unfit_items(
    tokenizer: "PreTrainedTokenizerFast", suites: Sequence[Suite], positions: int | None
) -> list[RowProblem]:
    """Return the items that the model cannot be asked, by file and line.

    They take more tokens than the model has positions for, or are chats in which a text holds what
    would end or open a turn, which training refuses too.

    Args:
        positions: the longest sequence that the model has positions for; None has no limit.
    """
    controls = control_pattern(tokenizer) if tokenizer.chat_template else None
    problems = []
    for suite in suites:
        if controls is not None and getattr(suite.config, "chat", True):
            problems += _find_controls(suite, controls)
        if positions is not None:
            problems += _find_long(tokenizer, suite, positions)
    return problems


def _find_controls(suite: Suite, controls: re.Pattern[str]) -> list[RowProblem]:
    problems = []
    for item in suite.items:
        question = question_of(suite, item)
        choices = [{"role": "assistant", "content": choice} for choice in item.choices]
        try:
            refuse_control_text(
                replace(question, messages=[*question.messages, *choices]), controls
            )
        except RowError as error:
            problems.append(RowProblem(item.source, item.line, str(error), error.kind))
    return problems


def _find_long(
    tokenizer: "PreTrainedTokenizerFast", suite: Suite, positions: int
) -> list[RowProblem]:
    config = suite.config
    room = positions - TEMPLATE_TOKENS
    system = config.system or "" if isinstance(config, PromptedSuite) else ""
    # No token is shorter than a byte, so most items are known to fit without tokenizing them.
    doubtful = suite.select({item.id for item in suite.items if _num_bytes(item, system) > room})
    if not doubtful.items:
        return []
    return [
        RowProblem(
            item.source,
            item.line,
            f"takes {length:,} tokens, and the model has {positions:,} positions; shorten the item "
            "or leave it out",
            "positions",
        )
        for item, length in zip(
            doubtful.items, config.item_lengths(tokenizer, doubtful), strict=True
        )
        if length > positions
    ]


def _num_bytes(item: SuiteItem, system: str) -> int:
    longest = max(item.choices, key=len, default="")
    beside = json.dumps([*item.messages, *item.tools]) if item.messages or item.tools else ""
    texts = (system, item.prompt, longest, item.text, beside)
    return sum(len(text.encode("utf-8", "replace")) for text in texts)
