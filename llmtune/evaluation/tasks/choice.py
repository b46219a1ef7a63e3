"""The most likely of some given answers."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llmtune.data.problems import RowError
from llmtune.data.row_values import parse_json_text
from llmtune.errors import LlmtuneError
from llmtune.evaluation.answers import find_choice
from llmtune.evaluation.choices import NumberReading, settle_numbers
from llmtune.evaluation.classification import describe_choices
from llmtune.evaluation.results import ItemScore, KeptAnswer, commonest_share
from llmtune.evaluation.tasks.base import (
    BadItem,
    Demonstration,
    Fields,
    Metric,
    PromptedSuite,
    Scoring,
    Suite,
    SuiteItem,
    read_field,
)
from llmtune.io.fingerprint import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.data.init_suite import SuiteDraft
    from llmtune.models.live import LiveModel
    from llmtune.scoring.generate import Generation
    from llmtune.scoring.requests import ContinuationRequest, ContinuationScore

logger = logging.getLogger(__name__)

WRITTEN_TOKENS = 12
"""A written answer beside the likelihoods: a word or two, and what may lead to them."""
AROUND_TOKENS = 4
"""What may be written around a label, in a drafted suite."""


class ChoiceSuite(PromptedSuite):
    """The most likely of some given answers."""

    METRICS: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", True, "share of items"),
        Metric("answer_probability", True, "probability among the choices"),
    )

    task: Literal["choice"]
    choices: tuple[str, ...] | None = None
    """The same for every item."""
    choices_field: str | None = None
    """Field with an item's choices."""
    answer_is: NumberReading = "auto"
    """How a whole number in `answer` is read; auto: as a text if every one is, else a position."""
    normalize: Literal["none", "length", "characters"] = "none"
    """Compare log-likelihoods; length: per token; characters: as `acc_norm` of lm-eval."""
    delimiter: str = " "
    """Between prompt and choice where chat is false."""
    end_of_answer: bool = False
    """Also score the end-of-turn token, so that '4' is not favored over '42'."""
    written_tokens: int | None = Field(default=None, ge=0)
    """Length of the written answer that is scored beside; 0: none; null: 12 in chats, else none."""
    metric: Literal["accuracy", "answer_probability"] = "accuracy"
    """What an item scores."""

    @classmethod
    def draft(cls, rows: "SuiteDraft") -> list[str] | None:
        """Ask for one of the rows' labels."""
        if not rows.choices:
            return None
        lines = [f"choices: {json.dumps(rows.choices, ensure_ascii=False)}"]
        longest = rows.longest_choice_tokens + AROUND_TOKENS
        if longest > WRITTEN_TOKENS and not rows.is_plain:
            lines.append(f"written_tokens: {longest}   # the longest label")
        if has_head_starts(rows.choices) and not rows.is_plain:
            lines.append("end_of_answer: true   # one answer begins another")
        return cls.draft_prompt(rows) + lines

    @field_validator("choices", mode="before")
    @classmethod
    def _write_numbers(cls, choices: Any) -> Any:
        """Take `[1, 2]` as texts; `[yes, no]` must be quoted, since YAML reads it as true, false.

        Numbers keep their usual form: 1 is "1" and 0.5 is "0.5".
        """
        if not isinstance(choices, list | tuple):
            return choices
        return [
            str(each) if isinstance(each, int | float) and not isinstance(each, bool) else each
            for each in choices
        ]

    @model_validator(mode="after")
    def _require_choices(self) -> "ChoiceSuite":
        if (self.choices is None) == (self.choices_field is None):
            raise ValueError("give either choices: [..] or choices_field: <field>")
        if self.choices is not None and len(set(self.choices)) < max(2, len(self.choices)):
            raise ValueError(f"choices must be at least two different texts, not {self.choices}")
        if self.end_of_answer and not self.chat:
            raise ValueError("end_of_answer needs chat: true; raw text has no end-of-turn token")
        return self

    @property
    def separator(self) -> str:
        """The delimiter."""
        return self.delimiter

    @property
    def fixed_choices(self) -> tuple[str, ...]:
        """The choices of the declaration."""
        return self.choices or ()

    def read_answer(self, fields: Fields, item: SuiteItem) -> SuiteItem:
        """Return `item` with its choices and which of them is right."""
        choices = self.choices
        if choices is None:
            assert self.choices_field is not None
            listed = read_field(fields, self.choices_field)
            try:
                listed = parse_json_text(listed, f"field {self.choices_field!r}")
            except RowError as error:
                raise BadItem(str(error)) from None
            if not isinstance(listed, list) or not all(
                isinstance(c, str | int | float) for c in listed
            ):
                raise BadItem(f"field {self.choices_field!r} must be a list of texts")
            choices = tuple(str(choice) for choice in listed)
        if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
            raise BadItem(f"choices must be at least two different texts, not {list(choices)}")
        answer = read_field(fields, self.answer)
        if isinstance(answer, str) and answer in choices:
            return replace(item, choices=choices, answer=choices.index(answer))
        if self.answer_is == "position" and isinstance(answer, str) and answer.isdecimal():
            answer = int(answer)  # a cell of a CSV
        is_number = isinstance(answer, int) and not isinstance(answer, bool)
        if not is_number or not (str(answer) in choices or 0 <= answer < len(choices)):
            raise BadItem(
                f"the answer {answer!r} is neither one of the choices {list(choices)} nor a "
                "position among them, from 0"
            )
        return replace(item, choices=choices, number=answer)

    def settle_items(self, items: Sequence[SuiteItem]) -> tuple[SuiteItem, ...]:
        """Read the whole numbers among the answers in one way: as texts, or as positions from 0.

        Raises:
            BadItem: neither reading fits all of them, or both do and differ.
        """
        return settle_numbers(items, self.answer_is, has_own_choices=self.choices is None)

    def score(self, scored: "LiveModel", suite: Suite, scoring: Scoring) -> list[ItemScore]:
        """Score every choice of every item, and the written answer beside."""
        from llmtune.scoring.generate import Decoding
        from llmtune.scoring.likelihood import Writing, score_and_write

        requests = self.choice_requests(scored.tokenizer, suite, scoring.demonstrations)
        # Where the likeliest tokens spell a choice, that is what greedy decoding writes, so only
        # the other items are written out.
        writing = Writing(
            scored.tokenizer,
            Decoding(self.num_written, scored.stop_token_ids),
            lambda found: self.num_written > 0 and not any(one.is_greedy for one in found),
        )
        found, texts = score_and_write(
            scored.model,
            requests,
            writing,
            token_budget=scoring.token_budget,
            on_progress=scoring.on_items,
        )
        scores = [self._score_item(*pair) for pair in zip(suite.items, found, strict=True)]
        if not self.num_written:
            return scores
        return [
            self._add_written(item, score, self._answer_text(item, each, text))
            for item, score, each, text in zip(suite.items, scores, found, texts, strict=True)
        ]

    @property
    def num_written(self) -> int:
        """The tokens of a written answer; 0 if none is written."""
        if self.written_tokens is None:
            return WRITTEN_TOKENS if self.chat else 0
        return self.written_tokens

    def describe(self, scores: Sequence[ItemScore]) -> JsonObject:
        """Return classes, calibration, and the accuracy of the written answers."""
        return describe_choices(scores, self.fixed_choices)

    def _answer_text(
        self, item: SuiteItem, found: "Sequence[ContinuationScore]", text: "Generation | None"
    ) -> str:
        """Return what the model writes, up to the choice that it begins with."""
        if text is None:
            pairs = zip(item.choices, found, strict=True)
            return max((choice for choice, one in pairs if one.is_greedy), key=len)
        from llmtune.evaluation.requests import cut_at

        return text.text if self.chat else cut_at(text.text, ["\n"])

    def _add_written(self, item: SuiteItem, score: ItemScore, text: str) -> ItemScore:
        chosen = find_choice(text, item.choices)
        written = {
            "text": text,
            "choice": None if chosen is None else item.choices[chosen],
            "score": float(chosen == item.answer),
        }
        return replace(score, details={**score.details, "written": written})

    def kept_answer(self, score: ItemScore) -> KeptAnswer | None:
        """Return the written answer: where the likeliest tokens spell a choice, only that."""
        written = score.details.get("written")
        if not self.chat or not isinstance(written, dict) or not written.get("text"):
            return None
        return KeptAnswer(str(written["text"]), self.num_written, is_beginning=True)

    def count_tokens(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> int:
        """Return the tokens of prompts, choices and written answers, a shared beginning once."""
        from llmtune.scoring.likelihood import count_forward_tokens

        requests = self.encode_choices(tokenizer, suite)
        return count_forward_tokens(requests) + self.num_written * len(requests)

    def choice_requests(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        suite: Suite,
        demonstrations: Sequence[Demonstration] = (),
    ) -> "list[ContinuationRequest]":
        """Return each item's prompt and choices as token ids.

        Items in which a wrong choice begins the right one are warned of once: "4" is never less
        likely than "42".
        """
        requests = self.encode_choices(tokenizer, suite, demonstrations)
        if self.normalize == "none":
            _warn_of_head_starts(suite, requests)
        return requests

    def encode_choices(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        suite: Suite,
        demonstrations: Sequence[Demonstration] = (),
    ) -> "list[ContinuationRequest]":
        """Return what `choice_requests` does, without its warning.

        Raises:
            LlmtuneError: the suite is a chat and the tokenizer has no chat template, or a prompt or
                choice has no tokens.
        """
        from llmtune.evaluation.requests import encode_chat_choices, encode_raw_choices

        if self.chat:
            return encode_chat_choices(
                tokenizer, suite, demonstrations, with_end=self.end_of_answer
            )
        return encode_raw_choices(tokenizer, suite, demonstrations)

    def item_lengths(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> list[int]:
        """Return the tokens of each prompt with its longest choice."""
        requests = self.encode_choices(tokenizer, suite)
        return [len(each.prompt_ids) + max(map(len, each.choice_ids)) for each in requests]

    def majority(self, items: Sequence[SuiteItem]) -> float | None:
        """Return what always giving one answer scores: the commonest text, or place among them."""
        texts = commonest_share([item.right_answer for item in items])
        if self.choices is not None:
            return texts
        return max(texts, commonest_share([str(item.answer) for item in items]))

    def chance(self, items: Sequence[SuiteItem]) -> float | None:
        """Return the mean of one divided by the number of choices."""
        return sum(1 / len(item.choices) for item in items) / len(items)

    @property
    def loss_name(self) -> str:
        """A likelihood, which says more than right or wrong."""
        return "-log p(right choice), nats"

    def item_loss(self, item: SuiteItem, score: ItemScore) -> float | None:
        """Return -log p(right choice among the choices), in nats."""
        import numpy as np
        from scipy.special import log_softmax

        likelihoods = np.array(score.details["log_likelihoods"])
        return float(-log_softmax(likelihoods)[item.answer])

    def class_answers(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Demonstration, str]]:
        """Return the pairs whose answer is a fixed choice, spelled as the suite spells it."""
        if self.choices is None:
            return super().class_answers(pairs)
        spelling = {choice.strip().casefold(): choice for choice in self.choices}
        known = [(question, spelling.get(answer.strip().casefold())) for question, answer in pairs]
        return [(Demonstration(q, choice), choice) for q, choice in known if choice]

    def answer_tokens(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> int:
        """Return the tokens of the longest choice and of what may stand around it."""
        texts = {choice for item in suite.items for choice in item.choices}
        return max(len(tokenizer(text)["input_ids"]) for text in texts) + 2

    def require_text_metric(self, name: str) -> None:
        """Require `accuracy`: a text has no probabilities."""
        if self.metric != "accuracy":
            raise LlmtuneError(
                f"suite {name}: {self.metric} needs the probabilities of the choices, so "
                "predictions from a file cannot be scored; leave it out or use metric: accuracy"
            )

    def score_text(self, item: SuiteItem, text: str) -> ItemScore:
        """Score the choice that a text names."""
        chosen = find_choice(text, item.choices)
        return item.scored(
            float(chosen == item.answer),
            prediction=text if chosen is None else item.choices[chosen],
            answer=item.right_answer,
            parsed=chosen is not None,
        )

    def _score_item(self, item: SuiteItem, scores: "Sequence[ContinuationScore]") -> ItemScore:
        values = [score.log_likelihood for score in scores]
        if self.normalize == "length":
            values = [score.log_likelihood / score.num_tokens for score in scores]
        elif self.normalize == "characters":
            values = [
                score.log_likelihood / len(choice)
                for score, choice in zip(scores, item.choices, strict=True)
            ]
        return item.scored(
            METRIC_FUNCTIONS[self.metric](values, item.answer),
            prediction=item.choices[values.index(max(values))],
            answer=item.right_answer,
            details={
                "log_likelihoods": [score.log_likelihood for score in scores],
                "num_tokens": [score.num_tokens for score in scores],
                "answer_is_greedy": scores[item.answer].is_greedy,
                "probabilities": choice_probabilities(values),
                "right": item.answer,
            },
        )


def accuracy(values: Sequence[float], answer: int) -> float:
    """1 if the right choice has the highest value; the first of equals counts as chosen."""
    return float(values.index(max(values)) == answer)


def answer_probability(values: Sequence[float], answer: int) -> float:
    """The right choice's share of probability among the choices: softmax of `values` (nats)."""
    return choice_probabilities(values)[answer]


def choice_probabilities(values: Sequence[float]) -> list[float]:
    """Return the softmax of the choices' values (nats)."""
    shifted = [math.exp(value - max(values)) for value in values]
    total = math.fsum(shifted)
    return [each / total for each in shifted]


METRIC_FUNCTIONS = {"accuracy": accuracy, "answer_probability": answer_probability}
"""What an item scores, by metric: the choices' values and which of them is right."""


def has_head_starts(choices: Sequence[str]) -> bool:
    """Return whether one choice begins another, which can then never be more likely."""
    return any(a != b and b.startswith(a) for a in choices for b in choices)


def _warn_of_head_starts(suite: Suite, requests: "Sequence[ContinuationRequest]") -> None:
    """Say in which items a wrong choice's tokens begin the right one's, which then cannot win."""
    lines = [
        item.line
        for item, request in zip(suite.items, requests, strict=True)
        if any(
            len(wrong) < len(right) and right[: len(wrong)] == wrong
            for right in [request.choice_ids[item.answer]]
            for wrong in request.choice_ids
        )
    ]
    if lines:
        logger.warning(
            "%s: in %d items (first: line %d) a wrong choice begins the right one, which can then "
            "never be more likely; set end_of_answer: true (chat) or normalize: length, or reword",
            suite.items_path,
            len(lines),
            lines[0],
        )
