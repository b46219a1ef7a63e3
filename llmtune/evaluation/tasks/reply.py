"""How well the model predicts the right answer to a chat: its loss on the reference, not a text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from llmtune.evaluation.results import ItemScore
from llmtune.evaluation.tasks.base import (
    Ability,
    BadItem,
    Fields,
    Metric,
    PromptedSuite,
    Scoring,
    Suite,
    SuiteItem,
    read_field,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.data.init_suite import SuiteDraft
    from llmtune.models.live import LiveModel
    from llmtune.scoring.requests import ContinuationRequest

WRITABLE_CHARACTERS = 768
"""Answers longer than this are not written out in a drafted suite: their loss says more."""


class ReplySuite(PromptedSuite):
    """The loss on a reference answer and its end, in the chat that it answers.

    For open answers, of which no two good ones are alike: a persona, long explanations.
    """

    METRICS: ClassVar[tuple[Metric, ...]] = (Metric("nats_per_token", False, "nats per token"),)
    ABILITY: ClassVar[Ability] = "chat"
    SCORES_TEXTS: ClassVar[bool] = False

    task: Literal["reply"]
    metric: Literal["nats_per_token"] = "nats_per_token"
    """What an item scores."""

    @classmethod
    def draft(cls, rows: "SuiteDraft") -> list[str] | None:
        """Ask for the turns of chats, and for answers too long to be written out."""
        if rows.has_turns:
            return ["messages: messages", "cluster: conversation   # its turns belong together"]
        if rows.asks and not rows.is_json and rows.longest_answer > WRITABLE_CHARACTERS:
            return cls.draft_prompt(rows)
        return None

    def read_answer(self, fields: Fields, item: SuiteItem) -> SuiteItem:
        """Return `item` with the reference answer."""
        answer = read_field(fields, self.answer)
        if not isinstance(answer, str) or not answer.strip():
            raise BadItem(f"field {self.answer!r} must be a text that is not empty")
        return replace(item, choices=(answer,), answer=0, references=(answer,))

    def score(self, scored: "LiveModel", suite: Suite, scoring: Scoring) -> list[ItemScore]:
        """Score the loss of every reference answer."""
        from llmtune.scoring.likelihood import score_continuations

        found = score_continuations(
            scored.model,
            self._encode(scored.tokenizer, suite),
            token_budget=scoring.token_budget,
            on_progress=scoring.on_items,
        )
        return [
            item.scored(
                -score.log_likelihood / score.num_tokens,
                prediction=None,
                answer=item.references[0],
                weight=float(score.num_tokens),
                details={"num_tokens": score.num_tokens},
            )
            for item, (score,) in zip(suite.items, found, strict=True)
        ]

    def count_tokens(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> int:
        """Return the tokens of chats and answers."""
        return sum(self.item_lengths(tokenizer, suite))

    def item_lengths(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> list[int]:
        """Return the tokens of each chat with its answer."""
        requests = self._encode(tokenizer, suite)
        return [len(each.prompt_ids) + len(each.choice_ids[0]) for each in requests]

    def _encode(
        self, tokenizer: "PreTrainedTokenizerFast", suite: Suite
    ) -> "Sequence[ContinuationRequest]":
        from llmtune.evaluation.requests import encode_chat_choices, encode_raw_choices

        if self.chat:
            return encode_chat_choices(tokenizer, suite, with_end=True)
        return encode_raw_choices(tokenizer, suite)
