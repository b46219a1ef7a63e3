"""Worked examples for the few-shot arm: drawn from the training data, never from the evaluation."""

import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmtune.data.collect import choose_sources, read_evaluation_keys
from llmtune.data.config import DataConfig
from llmtune.data.conversation import Conversation
from llmtune.data.overlap import is_held_out
from llmtune.data.problems import RowProblem
from llmtune.data.rows import LoadedRow, iter_raw_rows, open_source
from llmtune.evaluation.requests import encode_prompts
from llmtune.evaluation.tasks.base import (
    BadItem,
    Demonstration,
    PromptedSuite,
    Suite,
    SuiteItem,
)

log = logging.getLogger("llmtune")

MAX_POOL = 10_000
"""Training rows that are kept to draw from: a seeded sample if there are more."""

SUITE_WORDING = "the suite's prompt over the rows' fields"
ROW_WORDING = "the training rows' own messages"


@dataclass(frozen=True)
class TrainingRow:
    """A row of one question and one answer, with the fields it was read from."""

    question: str
    answer: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """The demonstrations of one draw for one suite, and the tokens they add to a prompt."""

    demonstrations: tuple[Demonstration, ...]
    tokens: int
    wording: str


def read_training_rows(config: DataConfig, suites: Sequence[Suite], seed: int) -> list[TrainingRow]:
    """Return the rows that demonstrations may be drawn from, at most MAX_POOL, in file order.

    Left out are replay sources, rows of several turns or of plain text, rows of the evaluation
    split, and rows whose question is one of the suites' (case and spaces aside).
    """
    asked = {_plain(item.prompt) for suite in suites for item in suite.items if item.prompt}
    kept: list[tuple[int, TrainingRow]] = []
    draw = random.Random(f"pool:{seed}")
    usable = (row for row in _iter_rows(config) if _plain(row.question) not in asked)
    for number, row in enumerate(usable):
        if number < MAX_POOL:
            kept.append((number, row))
        elif (place := draw.randrange(number + 1)) < MAX_POOL:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def draw_demonstrations(
    rows: Sequence[TrainingRow],
    suite: Suite,
    tokenizer: PreTrainedTokenizerFast,
    *,
    shots: int,
    seed: str,
    max_tokens: int | None,
) -> Draw | None:
    """Draw up to `shots` demonstrations for a suite, as many of each fixed choice as of another.

    A row that asks what an item asks, in the suite's own words too, is never shown.

    Args:
        seed: decides the draw; the same one gives the same demonstrations.
        max_tokens: what the model can read; fewer are taken if the longest item would not fit.

    Returns:
        None if no row can serve: no answer is one of the suite's choices, or none fits.
    """
    wording, pairs = _word_rows(rows, suite)
    asked = {_plain(item.prompt) for item in suite.items}
    pairs = [pair for pair in pairs if _plain(pair[0].prompt) not in asked]
    ordered = _balance(pairs, random.Random(seed))[:shots]
    longest, plain, answer = _longest_prompt(tokenizer, suite)
    for count in range(len(ordered), 0, -1):
        chosen = ordered[:count]
        random.Random(f"{seed}:order").shuffle(chosen)
        tokens = len(encode_prompts(tokenizer, longest, chosen)[0])
        if max_tokens is None or tokens + answer <= max_tokens:
            return Draw(tuple(chosen), tokens - plain, wording)
    return None


def takes_demonstrations(suite: Suite) -> bool:
    """Return whether few-shot means something: a question of the task, here or elsewhere."""
    return suite.asks and suite.role in ("target", "transfer")


def _iter_rows(config: DataConfig) -> Iterator[TrainingRow]:
    evaluation = read_evaluation_keys(config)
    sources, selections = choose_sources(config, "train")
    for source, selection in zip(sources, selections, strict=True):
        if source.replay:
            continue
        pairs = zip(iter_raw_rows(source), open_source(source).rows, strict=True)
        for (_, parsed), row in pairs:
            if isinstance(parsed, RowProblem) or not isinstance(row, LoadedRow):
                continue
            key = row.key
            is_kept = selection == "all" or not is_held_out(key, config.evaluation_share)
            pair = _question_and_answer(row.conversation)
            if pair is not None and is_kept and key not in evaluation:
                yield TrainingRow(*pair, dict(parsed[1]))


def _question_and_answer(conversation: Conversation) -> tuple[str, str] | None:
    if conversation.kind == "plain":
        pair = conversation.prompt.rstrip(), conversation.text.strip()
        return pair if all(pair) else None
    turns = [message for message in conversation.messages if message["role"] != "system"]
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        return None
    question, answer = (str(turn["content"]) for turn in turns)
    return (question, answer.strip()) if question.strip() and answer.strip() else None


def _word_rows(
    rows: Sequence[TrainingRow], suite: Suite
) -> tuple[str, list[tuple[Demonstration, str]]]:
    """Return the rows as demonstrations with the class each belongs to, and whose words they use.

    The suite's own prompt is used where every row has the fields that it asks for.
    """
    config = suite.config
    assert isinstance(config, PromptedSuite)
    rendered = _render_rows(config, rows)
    if rendered:
        return SUITE_WORDING, config.class_answers(rendered)
    return ROW_WORDING, config.class_answers([(row.question, row.answer) for row in rows])


def _render_rows(
    config: PromptedSuite, rows: Sequence[TrainingRow]
) -> list[tuple[str, str]] | None:
    """Return the rows' questions and right answers in the words of the suite.

    None if a row has not the fields that the suite's prompt and answer need.
    """
    try:
        items = [config.read_item(row.fields, SuiteItem(id="", line=0)) for row in rows]
    except BadItem:
        return None
    return [(item.prompt, item.right_answer) for item in items]


def _balance(
    pairs: Sequence[tuple[Demonstration, str]], draw: random.Random
) -> list[Demonstration]:
    """Shuffle the demonstrations of each class and take one of each in turn."""
    by_class: dict[str, list[Demonstration]] = defaultdict(list)
    for demonstration, name in pairs:
        by_class[name].append(demonstration)
    names = sorted(by_class)
    draw.shuffle(names)
    for name in names:
        draw.shuffle(by_class[name])
    most = max(map(len, by_class.values()), default=0)
    return [
        by_class[name][place]
        for place in range(most)
        for name in names
        if place < len(by_class[name])
    ]


def _longest_prompt(tokenizer: PreTrainedTokenizerFast, suite: Suite) -> tuple[Suite, int, int]:
    """Return the suite with its longest item alone, that prompt's tokens, and its answer's."""
    prompts = encode_prompts(tokenizer, suite)
    longest = max(range(len(prompts)), key=lambda place: len(prompts[place]))
    assert isinstance(suite.config, PromptedSuite)
    answer = suite.config.answer_tokens(tokenizer, suite)
    return replace(suite, items=(suite.items[longest],)), len(prompts[longest]), answer


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
