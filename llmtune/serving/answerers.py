"""Who answers the rows of a file: a loaded model that writes, one that chooses, or an endpoint."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, Protocol

from llmtune.data.problems import RowProblem
from llmtune.data.prompts import PromptRow, encode_questions, prompts_error
from llmtune.errors import LlmtuneError
from llmtune.evaluation.endpoint import Endpoint, Question, RefusedQuestion, iter_replies
from llmtune.evaluation.tasks.base import Scoring, Suite
from llmtune.io.fingerprint import JsonValue
from llmtune.io.progress import progress_bar
from llmtune.models.live import LiveModel
from llmtune.scoring.batches import choose_token_budget, position_limit
from llmtune.scoring.generate import Decoding, iter_texts
from llmtune.scoring.live import as_arm

log = logging.getLogger("llmtune")

LABELLED_AT_ONCE = 256
"""Rows whose labels are kept together: fewer are lost if the command is stopped."""

REFUSED_AT_FIRST = 8
"""Rows that an endpoint refuses, none answered, after which it is not asked more; where such rows
are to be skipped, it is asked all."""


class Answerer(Protocol):
    """Answers rows by their place; what it yields is written down at once."""

    @property
    def name(self) -> str:
        """Who answers, for people."""
        ...

    @property
    def skipped(self) -> Mapping[int, str]:
        """Rows that no answer fits behind, with why."""
        ...

    def describe(self) -> Mapping[str, JsonValue]:
        """Return all that decides the answers."""
        ...

    def answer(self, done: Collection[int]) -> Iterator[tuple[int, list[JsonValue]]]:
        """Yield the place of each row that is not `done`, with the values of its columns."""
        ...


@dataclass(frozen=True)
class LongRows:
    """What happens to rows that leave the model no position for an answer."""

    path: Path
    is_error: bool

    def find(
        self, live: LiveModel, rows: Sequence[PromptRow], ends: Sequence[int]
    ) -> dict[int, str]:
        """Return the places of long rows with why; `ends` are the positions that each needs.

        Raises:
            LlmtuneError: there are some, and they are not to be skipped.
        """
        limit = position_limit(live.model)
        long = {
            place: f"takes {end - 1:,} tokens, and the model has {limit:,} positions"
            for place, end in enumerate(ends)
            if limit is not None and end > limit
        }
        if long and self.is_error:
            raise prompts_error(
                [
                    RowProblem(
                        str(self.path),
                        rows[place].line,
                        f"{why}; shorten it, or give --too-long skip to leave such rows unanswered",
                    )
                    for place, why in long.items()
                ]
            )
        for place, why in long.items():
            log.warning("%s:%d: skipped: %s", self.path, rows[place].line, why)
        return long


class Writer:
    """A loaded model that writes: the columns are the text and whether it ended by itself."""

    def __init__(
        self,
        live: LiveModel,
        arm: str,
        rows: Sequence[PromptRow],
        how: tuple[int, float],
        long: LongRows,
    ) -> None:
        self.name, self._live, self._how = arm, live, how
        asked = [(str(long.path), row.line, row.question) for row in rows]
        self._prompts = encode_questions(live.tokenizer, asked)
        self.skipped = long.find(live, rows, [len(ids) + 1 for ids in self._prompts])

    def describe(self) -> Mapping[str, JsonValue]:
        """Return the prompts, the model, and how it writes."""
        return {
            "input": self._prompts,
            "model": self._live.identity_as(self.name).as_dict(),
            "length or temperature": list(self._how),
        }

    def answer(self, done: Collection[int]) -> Iterator[tuple[int, list[JsonValue]]]:
        """Yield answers as they end."""
        asked = [place for place in range(len(self._prompts)) if place not in self.skipped]
        length, temperature = self._how
        live = self._live
        with as_arm(live, self.name), progress_bar("predict", len(asked), unit="rows") as bar:
            for index, answer, is_batch_end in iter_texts(
                live.model,
                live.tokenizer,
                [self._prompts[place] for place in asked],
                Decoding(length, live.stop_token_ids, temperature=temperature),
                token_budget=choose_token_budget(live.model),
                done={index for index, place in enumerate(asked) if place in done},
            ):
                if asked[index] not in done:
                    yield asked[index], [answer.text, answer.stopped]
                if is_batch_end:
                    bar.update(len(done))


class Labeller:
    """A loaded model that chooses: the columns are the label and the probability of each one."""

    def __init__(
        self, live: LiveModel, arm: str, rows: Sequence[PromptRow], suite: Suite, long: LongRows
    ) -> None:
        self.name, self._live, self._suite = arm, live, suite
        lengths = suite.config.item_lengths(live.tokenizer, suite)
        self.skipped = long.find(live, rows, lengths)

    def describe(self) -> Mapping[str, JsonValue]:
        """Return the questions, the model, and the labels."""
        return {
            "input": self._suite.items_fingerprint,
            "model": self._live.identity_as(self.name).as_dict(),
            "labels": self._suite.config.model_dump(mode="json", exclude={"items", "description"}),
        }

    def answer(self, done: Collection[int]) -> Iterator[tuple[int, list[JsonValue]]]:
        """Yield labels as a suite scores them, some rows at a time."""
        items = self._suite.items
        left = [p for p in range(len(items)) if p not in self.skipped and p not in done]
        scoring = Scoring(choose_token_budget(self._live.model))
        shown = progress_bar("predict", len(left), unit="rows")
        with as_arm(self._live, self.name) as live, shown as bar:
            for start in range(0, len(left), LABELLED_AT_ONCE):
                places = left[start : start + LABELLED_AT_ONCE]
                block = replace(self._suite, items=tuple(items[place] for place in places))
                scores = block.config.score(live, block, scoring)
                for place, score in zip(places, scores, strict=True):
                    shares = score.details["probabilities"]
                    labels = items[place].choices
                    yield place, [score.prediction, dict(zip(labels, shares, strict=True))]
                bar.update(start + len(places))


@dataclass
class Asker:
    """An endpoint: the columns are the text and whether it ended by itself."""

    endpoint: Endpoint
    rows: Sequence[PromptRow]
    path: Path
    max_new_tokens: int
    is_strict: bool = True
    """Whether a row that the endpoint refuses is an error; else it is left unanswered."""
    skipped: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [
            RowProblem(
                str(self.path),
                row.line,
                "is continued as it is, and an endpoint is asked chats; give it as a prompt or as "
                "messages",
            )
            for row in self.rows
            if row.question.kind != "chat"
        ]
        if problems:
            raise prompts_error(problems)

    @property
    def name(self) -> str:
        """The model's name there."""
        return self.endpoint.config.model

    def describe(self) -> Mapping[str, JsonValue]:
        """Return the chats, the endpoint and its model."""
        asked = [[row.question.messages, row.question.tools] for row in self.rows]
        config = self.endpoint.config.model_dump(mode="json", include={"url", "model", "extra"})
        return {"input": asked, "model": config, "length or temperature": [self.max_new_tokens]}

    def answer(self, done: Collection[int]) -> Iterator[tuple[int, list[JsonValue]]]:
        """Yield replies as they come.

        Raises:
            LlmtuneError: rows are refused (all of them by file and line, when the others are
                answered), or the endpoint fails.
        """
        left = {
            place: Question(row.question.messages, self.max_new_tokens, row.question.tools or ())
            for place, row in enumerate(self.rows)
            if place not in done
        }
        shown = progress_bar("predict", len(left), unit="rows")
        refused: dict[int, str] = {}
        num_answered = len(done)
        with closing(iter_replies(self.endpoint, left)) as replies, shown as bar:
            for number, (place, reply) in enumerate(replies, 1):
                if isinstance(reply, RefusedQuestion):
                    refused[place] = f"{self.endpoint.config.url} refuses it: {reply.reason}"
                else:
                    num_answered += 1
                    yield place, [reply.text, reply.stopped]
                bar.update(number)
                if self.is_strict and len(refused) == REFUSED_AT_FIRST and not num_answered:
                    break
        if refused and (self.is_strict or not num_answered):
            self._raise(refused, num_answered)
        self.skipped.update(refused)

    def _raise(self, refused: Mapping[int, str], num_answered: int) -> NoReturn:
        problems = [
            RowProblem(str(self.path), self.rows[place].line, refused[place])
            for place in sorted(refused)
        ]
        kept = ""
        if num_answered:
            kept = (
                f"\n{num_answered} answers are kept; the same command with --too-long skip leaves "
                "rows that are refused unanswered"
            )
        raise LlmtuneError(f"{prompts_error(problems)}{kept}")
