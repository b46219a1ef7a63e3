"""What is diagnosed: a loaded model with its rows and suites, and samples of their texts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerFast

from llmtune.data.config import DataConfig
from llmtune.data.example import IGNORE_INDEX, Example, ExampleTable, split_answer
from llmtune.data.prepare import prepare_examples
from llmtune.evaluation.requests import encode_prompts
from llmtune.evaluation.tasks.base import Role, Suite
from llmtune.io.fingerprint import hash_json
from llmtune.models.live import LiveModel
from llmtune.scoring.batches import choose_token_budget
from llmtune.scoring.requests import encode_passage
from llmtune.training.rows import EpochSampler

T = TypeVar("T")
OnProgress = Callable[[str, int, int], None]
"""Told what is measured, how many texts are done, and of how many."""


@dataclass(frozen=True)
class TrainedSteps:
    """How much was trained, and on what: the order of the rows follows from the seed."""

    steps: int | None
    """None if that is not known: then every row counts as seen."""
    batch_size: int
    seed: int
    num_sources: int
    """The run's own train sources; those behind them are general data against forgetting."""
    num_added: int = 0
    """Rows that the base wrote against forgetting: they stand behind the prepared ones."""

    def num_epochs(self, num_rows: int) -> float:
        """Return how often these steps went over `num_rows` prepared rows and the added ones."""
        if self.steps is None:
            return 1.0
        return self.steps / math.ceil((num_rows + self.num_added) / self.batch_size)

    def seen(self, table: ExampleTable) -> tuple[int, ...]:
        """Return the places of the run's own rows that these steps saw, in ascending order."""
        order = list(EpochSampler(len(table) + self.num_added, self.seed))
        if self.steps is not None and self.num_epochs(len(table)) < 1:
            order = order[: self.steps * self.batch_size]
        prepared = sorted(place for place in order if place < len(table))
        return tuple(place for place in prepared if table.source_indices[place] < self.num_sources)


@dataclass(frozen=True)
class Subject:
    """A model with its adapter on, and what it was trained and is evaluated on.

    `trained` are the rows of `train` that training has seen, by their place; `held_out` may be
    empty.
    """

    scored: LiveModel
    suites: tuple[Suite, ...]
    train: ExampleTable
    trained: tuple[int, ...]
    held_out: ExampleTable


@dataclass(frozen=True)
class DiagnosisSettings:
    """How a diagnosis is made; `token_budget` None chooses by the device."""

    token_budget: int | None = None
    seed: int = 0
    confidence: float = 0.95
    on_progress: OnProgress | None = None

    def budget(self, scored: LiveModel) -> int:
        """Return the padded tokens of one batch."""
        return self.token_budget or choose_token_budget(scored.model)

    def report(self, what: str, total: int) -> Callable[[int], None]:
        """Return what to call with the number of texts that are done."""

        def advance(done: int) -> None:
            if self.on_progress is not None:
                self.on_progress(what, done, total)

        return advance


@dataclass(frozen=True)
class Turn:
    """What the model reads before the last trained answer of a row, and that answer."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def model_inputs(scored: LiveModel, *, with_adapter: bool) -> dict[str, str]:
    """Return the hashes of the models for a diagnostic's `inputs`."""
    identity = scored.identity
    inputs = {"base": identity.base, "precision": f"{identity.dtype} {identity.quantization}"}
    return inputs | ({"adapter": str(identity.adapter)} if with_adapter else {})


def hash_ids(sequences: Sequence[Sequence[int]]) -> str:
    """Return one hash of lists of token ids."""
    return hash_json([list(map(int, ids)) for ids in sequences])


def pick(sequence: Sequence[T], limit: int, seed: int) -> list[T]:
    """Return at most `limit` of a sequence, chosen by the seed, in their own order."""
    if len(sequence) <= limit:
        return list(sequence)
    chosen = np.random.default_rng(seed).permutation(len(sequence))[:limit]
    return [sequence[place] for place in sorted(chosen.tolist())]


def last_turn(example: Example) -> Turn | None:
    """Return the last trained stretch of a row and all before it; None if nothing is before."""
    trained = [place for place, label in enumerate(example.labels) if label != IGNORE_INDEX]
    if not trained:
        return None
    end = trained[-1] + 1
    start = end - 1
    while start > 0 and example.labels[start - 1] != IGNORE_INDEX:
        start -= 1
    if start == 0:
        return None
    ids = example.input_ids
    return Turn(tuple(ids[:start]), tuple(ids[start:end]))


def general_sequences(
    subject: Subject, *, limit: int, max_tokens: int, seed: int
) -> list[list[int]]:
    """Return general text as token ids: the beginnings of general passages.

    These are the items of the perplexity suites whose role is `general`; without any, the prompts
    of the other general suites with their right answers, as plain text. Empty if there is no
    such suite.
    """
    tokenizer = subject.scored.tokenizer
    texts = general_texts(subject.suites)
    chosen = [list(encode_passage(tokenizer, text).token_ids) for text in pick(texts, limit, seed)]
    return [ids[:max_tokens] for ids in chosen if len(ids) > 1]


def general_texts(suites: Sequence[Suite]) -> list[str]:
    """Return the texts of the general suites: passages, or else questions with their answers."""
    general = [suite for suite in suites if suite.role == "general"]
    passages = [suite for suite in general if any(item.text for item in suite.items)]
    if passages:
        return [item.text for suite in passages for item in suite.items]
    asking = [suite for suite in general if suite.asks]
    return [f"{item.prompt} {item.right_answer}" for suite in asking for item in suite.items]


def target_prompts(
    subject: Subject, *, limit: int, seed: int, with_documents: bool = False
) -> list[tuple[int, ...]]:
    """Return the task's prompts as token ids: of the target suites that ask something.

    Without any, those of the held-out rows, or else of the train rows. A document has none, or
    (`with_documents`) its first half.
    """
    for suite in asking_suites(subject.suites, ("target",)):
        chosen = replace(suite, items=tuple(pick(suite.items, limit, seed)))
        return encode_prompts(subject.scored.tokenizer, chosen)
    for rows in (subject.held_out, subject.train):
        turns = [last_turn(rows[place]) for place in pick(range(len(rows)), limit, seed)]
        prompts = [turn.prompt_ids for turn in turns if turn is not None]
        if not prompts and with_documents:
            halves = [split_answer(rows[place]) for place in pick(range(len(rows)), limit, seed)]
            prompts = [tuple(half[0]) for half in halves if half is not None]
        if prompts:
            return prompts
    return []


def asking_suites(suites: Sequence[Suite], roles: Sequence[Role]) -> list[Suite]:
    """Return the suites of these roles that have prompts."""
    return [suite for suite in suites if suite.role in roles and suite.asks]


def fixed_choice_suites(suites: Sequence[Suite]) -> list[Suite]:
    """Return the target and transfer suites whose items all have the same choices."""
    return [
        suite
        for suite in asking_suites(suites, ("target", "transfer"))
        if suite.config.fixed_choices
    ]


def answer_text(tokenizer: PreTrainedTokenizerFast, turn: Turn) -> str:
    """Return a trained answer without the tokens that end it."""
    return str(tokenizer.decode(list(turn.answer_ids), skip_special_tokens=True)).strip()


def prepare_subject(
    scored: LiveModel,
    suites: Sequence[Suite],
    data: DataConfig,
    mixed_data: DataConfig,
    trained: TrainedSteps,
) -> Subject:
    """Tokenize both splits as training did and say which rows it has seen.

    Args:
        mixed_data: what was trained on: `data`, and general data behind it.

    Raises:
        LlmtuneError: the rows cannot be read any more.
    """
    prepare = partial(prepare_examples, tokenizer=scored.tokenizer, seed=trained.seed)
    train = prepare(mixed_data, split="train").examples
    held_out = prepare(data, split="evaluation").examples
    return Subject(
        scored=scored,
        suites=tuple(suites),
        train=train,
        trained=trained.seen(train),
        held_out=held_out,
    )
