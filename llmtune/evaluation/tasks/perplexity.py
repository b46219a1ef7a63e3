"""How well the model predicts passages of text."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmtune.errors import LlmtuneError
from llmtune.evaluation.results import ItemScore
from llmtune.evaluation.tasks.base import (
    Ability,
    BadItem,
    Fields,
    Metric,
    Scoring,
    Suite,
    SuiteConfig,
    SuiteItem,
    read_field,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.data.init_suite import SuiteDraft
    from llmtune.models.live import LiveModel
    from llmtune.scoring.perplexity import TextScore


class PerplexitySuite(SuiteConfig):
    """How well the model predicts passages of text."""

    METRICS: ClassVar[tuple[Metric, ...]] = (
        Metric("nats_per_token", False, "nats per token"),
        Metric("bits_per_byte", False, "bits per byte"),
    )

    ABILITY: ClassVar[Ability] = "text"

    task: Literal["perplexity"]
    text: str = "text"
    """Field with the passage."""
    max_length: int = Field(default=512, ge=2)
    """Window in tokens."""
    metric: Literal["nats_per_token", "bits_per_byte"] = "nats_per_token"
    """What an item scores."""

    @classmethod
    def draft(cls, rows: "SuiteDraft") -> list[str] | None:
        """Take documents as passages."""
        if rows.asks:
            return None
        return ["cluster: document   # passages of one belong together"] if rows.is_cut else []

    def read_item(self, fields: Fields, item: SuiteItem) -> SuiteItem:
        """Return `item` with its passage."""
        passage = read_field(fields, self.text)
        if not isinstance(passage, str) or not passage.strip():
            raise BadItem(f"field {self.text!r} must be a text that is not empty")
        return replace(item, text=passage)

    def score(self, scored: "LiveModel", suite: Suite, scoring: Scoring) -> list[ItemScore]:
        """Score the loss of every passage.

        Raises:
            LlmtuneError: a passage is one token.
        """
        from llmtune.scoring.perplexity import score_texts

        found: Sequence[TextScore] = score_texts(
            scored.model,
            scored.tokenizer,
            [item.text for item in suite.items],
            max_length=self.max_length,
            token_budget=scoring.token_budget,
            on_progress=scoring.on_items,
        )
        for item, score in zip(suite.items, found, strict=True):
            if score.num_tokens == 0:
                raise LlmtuneError(
                    f"{item.source}:{item.line}: the passage is one token, nothing can be predicted"
                )
        return [self._score_item(*pair) for pair in zip(suite.items, found, strict=True)]

    def count_tokens(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> int:
        """Return the tokens of all windows."""
        from llmtune.scoring.requests import cut_windows, encode_passage

        passages = [encode_passage(tokenizer, item.text) for item in suite.items]
        return sum(len(window) for p in passages for window in cut_windows(p, self.max_length))

    def item_lengths(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> list[int]:
        """Return the tokens of each passage's longest window."""
        from llmtune.scoring.requests import encode_passage

        passages = [encode_passage(tokenizer, item.text) for item in suite.items]
        return [min(len(passage.token_ids), self.max_length) for passage in passages]

    def _score_item(self, item: SuiteItem, found: "TextScore") -> ItemScore:
        per_token = self.metric == "nats_per_token"
        weight = found.num_tokens if per_token else found.num_bytes
        unit = 1.0 if per_token else math.log(2)
        return item.scored(
            found.negative_log_likelihood / unit / weight,
            prediction=None,
            answer=None,
            weight=float(weight),
            details={
                "negative_log_likelihood": found.negative_log_likelihood,
                "num_tokens": found.num_tokens,
                "num_bytes": found.num_bytes,
            },
        )
