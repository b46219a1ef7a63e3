"""What two models are compared on: held-out rows, labelled items and the open prompts."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from llmtune.data.config import DataConfig
from llmtune.data.example import IGNORE_INDEX
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.data.prepare import prepare_examples
from llmtune.data.render import render_question
from llmtune.evaluation.tasks.base import Suite
from llmtune.scoring.requests import ContinuationRequest

NUM_ROWS = 20
NUM_LABELS = 20
NUM_NEW_TOKENS = 32
"""Tokens of an open prompt's greedy answer."""


@dataclass(frozen=True)
class ComparedPrompts:
    """What the two models are compared on, all as token ids; any of the three may be empty."""

    sequences: tuple[tuple[int, ...], ...] = ()  # logits and KL at every position
    labels: tuple[ContinuationRequest, ...] = ()  # the likelier continuation must be the same
    open_prompts: tuple[tuple[int, ...], ...] = ()  # greedy answers


@dataclass(frozen=True)
class HeldOut:
    """What a run has kept from training."""

    data: DataConfig
    seed: int
    suites: tuple[Suite, ...] = ()
    """The first target suite of choices among these gives the labels to compare."""


def build_prompts(
    tokenizer: PreTrainedTokenizerFast, held_out: HeldOut | None = None
) -> ComparedPrompts:
    """Return the first held-out rows and labels, and the open prompts.

    Without rows the open prompts are the sequences too.
    """
    questions = tuple(tuple(render_question(tokenizer, question)) for question in OPEN_PROMPTS)
    if held_out is None:
        return ComparedPrompts(sequences=questions, open_prompts=questions)
    return ComparedPrompts(
        sequences=_read_rows(tokenizer, held_out) or questions,
        labels=_build_labels(tokenizer, held_out),
        open_prompts=questions,
    )


def _read_rows(
    tokenizer: PreTrainedTokenizerFast, held_out: HeldOut
) -> tuple[tuple[int, ...], ...]:
    """Return rows of the evaluation split, each up to the token before the last trained one.

    What a template writes behind an answer's end is never generated, so it is not compared.
    """
    split = prepare_examples(held_out.data, tokenizer, split="evaluation", seed=held_out.seed)
    rows = []
    for index in range(min(NUM_ROWS, len(split.examples))):
        example = split.examples[index]
        trained = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
        if trained and trained[-1]:
            rows.append(tuple(example.input_ids[: trained[-1]]))
    return tuple(rows)


def _build_labels(
    tokenizer: PreTrainedTokenizerFast, held_out: HeldOut
) -> tuple[ContinuationRequest, ...]:
    for suite in held_out.suites:
        if suite.role == "target" and (requests := suite.config.choice_requests(tokenizer, suite)):
            return tuple(requests[:NUM_LABELS])
    return ()
