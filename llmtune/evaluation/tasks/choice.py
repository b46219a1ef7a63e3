"""The most likely of some given answers."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from llmtune.errors import LlmtuneError
from llmtune.evaluation.results import ItemScore
from llmtune.evaluation.tasks.base import (
    BadItem,
    Demonstration,
    Fields,
    Metric,
    PromptedSuite,
    Scoring,
    Suite,
    SuiteItem,
    commonest_share,
    read_field,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.models.live import LiveModel
    from llmtune.scoring.likelihood import ContinuationRequest, ContinuationScore

logger = logging.getLogger(__name__)


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
    normalize: Literal["none", "length"] = "none"
    """Compare log-likelihoods, or their mean per token."""
    delimiter: str = " "
    """Between prompt and choice where chat is false."""
    end_of_answer: bool = False
    """Also score the end-of-turn token, so that '4' is not favoured over '42'."""
    metric: Literal["accuracy", "answer_probability"] = "accuracy"
    """What an item scores."""

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
        is_index = isinstance(answer, int) and not isinstance(answer, bool)
        if is_index and 0 <= answer < len(choices):
            return replace(item, choices=choices, answer=answer)
        raise BadItem(
            f"the answer {answer!r} is neither one of the choices {list(choices)} nor an index of "
            "them"
        )

    def score(self, scored: "LiveModel", suite: Suite, scoring: Scoring) -> list[ItemScore]:
        """Score every choice of every item."""
        from llmtune.scoring.likelihood import score_continuations

        requests = self.choice_requests(scored.tokenizer, suite, scoring.demonstrations)
        found = score_continuations(
            scored.model,
            requests,
            token_budget=scoring.token_budget,
            on_progress=scoring.on_items,
        )
        return [self._score_item(*pair) for pair in zip(suite.items, found, strict=True)]

    def count_tokens(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> int:
        """Return the tokens of prompts and choices, a shared beginning once."""
        from llmtune.scoring.likelihood import count_forward_tokens

        return count_forward_tokens(self.encode_choices(tokenizer, suite))

    def choice_requests(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        suite: Suite,
        demonstrations: Sequence[Demonstration] = (),
    ) -> "list[ContinuationRequest]":
        """Return each item's prompt and choices as token ids.

        Items where one choice begins another are warned of once: "4" is never less likely than
        "42".
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
        from llmtune.evaluation.requests import raw_context, split_continuation
        from llmtune.scoring.likelihood import ContinuationRequest
        from llmtune.scoring.perplexity import leading_special_ids

        if self.chat:
            return self._encode_in_chat(tokenizer, suite, demonstrations)
        lead = leading_special_ids(tokenizer)
        requests = []
        for item in suite.items:
            context = raw_context(self, item, demonstrations)
            pairs = [
                split_continuation(tokenizer, context, self.delimiter + choice)
                for choice in item.choices
            ]
            heads = {tuple(head) for head, _ in pairs}
            assert len(heads) == 1, "the context's ids do not depend on the continuation"
            prompt = (*lead, *heads.pop())
            if not prompt or not all(tail for _, tail in pairs):
                raise LlmtuneError(
                    f"{suite.items_path}:{item.line}: prompt or a choice is empty after "
                    "tokenization"
                )
            requests.append(ContinuationRequest(prompt, tuple(tuple(tail) for _, tail in pairs)))
        return requests

    def majority(self, items: Sequence[SuiteItem]) -> float | None:
        """Return the share of the commonest right choice, where all items have the same choices."""
        if self.choices is None:
            return None
        return commonest_share([item.right_answer for item in items])

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
        return item.scored(
            METRIC_FUNCTIONS[self.metric](values, item.answer),
            prediction=item.choices[values.index(max(values))],
            answer=item.right_answer,
            details={
                "log_likelihoods": [score.log_likelihood for score in scores],
                "num_tokens": [score.num_tokens for score in scores],
                "answer_is_greedy": scores[item.answer].is_greedy,
            },
        )

    def _encode_in_chat(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        suite: Suite,
        demonstrations: Sequence[Demonstration],
    ) -> "list[ContinuationRequest]":
        """Put each choice where the template puts an answer, after what it writes before one.

        Some templates write an empty thinking block or a space between the generation prompt and
        the answer; its tokens belong to the prompt, except where they merge with the choice's
        first.
        """
        from llmtune.evaluation.requests import encode_prompts, encode_text
        from llmtune.models.turns import find_turn_ending
        from llmtune.scoring.likelihood import ContinuationRequest

        prompts = encode_prompts(tokenizer, suite, demonstrations)
        ending = find_turn_ending(tokenizer)
        tail = [ending.terminator_id] if self.end_of_answer else []
        lead = encode_text(tokenizer, ending.lead)
        requests = []
        for item, prompt in zip(suite.items, prompts, strict=True):
            choices = [encode_text(tokenizer, ending.lead + each) + tail for each in item.choices]
            shared = len(os.path.commonprefix([lead, *choices]))
            requests.append(
                ContinuationRequest(
                    (*prompt, *lead[:shared]), tuple(tuple(ids[shared:]) for ids in choices)
                )
            )
        return requests


def accuracy(values: Sequence[float], answer: int) -> float:
    """1 where the right choice has the highest value; the first of equals counts as chosen."""
    return float(values.index(max(values)) == answer)


def answer_probability(values: Sequence[float], answer: int) -> float:
    """The right choice's share of probability among the choices: softmax of `values` (nats)."""
    import numpy as np

    shifted = np.exp(np.asarray(values, dtype=np.float64) - max(values))
    return float(shifted[answer] / shifted.sum())


METRIC_FUNCTIONS = {"accuracy": accuracy, "answer_probability": answer_probability}
"""What an item scores, by metric: the choices' values and which of them is right."""


def find_choice(text: str, choices: Sequence[str]) -> int | None:
    """Return which choice a text names: it is that choice, or holds just one as whole words."""
    plain = _plain(text)
    for place, choice in enumerate(choices):
        if plain == _plain(choice):
            return place
    named = [
        place
        for place, choice in enumerate(choices)
        if _plain(choice) and re.search(rf"(?<!\w){re.escape(_plain(choice))}(?!\w)", plain)
    ]
    return named[0] if len(named) == 1 else None


def _warn_of_head_starts(suite: Suite, requests: "Sequence[ContinuationRequest]") -> None:
    """Say which items have a choice whose tokens begin another's: the longer can never win."""
    lines = [
        item.line
        for item, request in zip(suite.items, requests, strict=True)
        if any(
            len(short) < len(long) and long[: len(short)] == short
            for short in request.choice_ids
            for long in request.choice_ids
        )
    ]
    if lines:
        logger.warning(
            "%s: in %d items (first: line %d) one choice begins another, so the longer one can "
            "never be more likely; set end_of_answer: true (chat) or normalize: length, or reword",
            suite.items_path,
            len(lines),
            lines[0],
        )


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())
