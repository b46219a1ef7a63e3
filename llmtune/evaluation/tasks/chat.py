"""Open prompts in chat form: how far a model has moved from what the untouched base answers."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmtune.data.problems import RowError
from llmtune.evaluation.answer_style import AnswerStyle
from llmtune.evaluation.question import read_question
from llmtune.evaluation.results import ItemScore, KeptAnswer
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
from llmtune.io.fingerprint import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.models.live import LiveModel
    from llmtune.scoring.generate import Generation


class ChatSuite(SuiteConfig):
    """Open prompts; the untouched base's own greedy answers are what every arm is held to.

    An item scores the loss on the base's answer, nats/token. Each arm also writes its own answer:
    how long it is, how many words of it differ, and whether it ends by itself are kept with the
    item and, over all items, with the result.
    """

    METRICS: ClassVar[tuple[Metric, ...]] = (Metric("nats_per_token", False, "nats per token"),)
    ABILITY: ClassVar[Ability] = "chat"
    NEEDS_BASE_ANSWERS: ClassVar[bool] = True

    WRITES_ANSWERS: ClassVar[bool] = True
    task: Literal["chat"]
    metric: Literal["nats_per_token"] = "nats_per_token"
    """What an item scores."""
    prompt: str = "prompt"
    """Field with what the user says."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Length of an answer in tokens, of the base and of every arm."""

    def read_item(self, fields: Fields, item: SuiteItem) -> SuiteItem:
        """Return `item` with its prompt; what the base answers comes later."""
        prompt = read_field(fields, self.prompt)
        if not isinstance(prompt, str) or not prompt.strip():
            raise BadItem(f"field {self.prompt!r} must be a text that is not empty")
        turns = [{"role": "user", "content": prompt}]
        try:
            return item.asking(read_question(fields, turns, {self.prompt}))
        except RowError as error:
            raise BadItem(str(error)) from None

    def write_answers(
        self, base: "LiveModel", suite: Suite, token_budget: int | None = None
    ) -> list[str]:
        """Return what the base answers, which `with_base_answers` takes."""
        return [answer.text for answer in self._write(base, suite, token_budget)]

    def score(self, scored: "LiveModel", suite: Suite, scoring: Scoring) -> list[ItemScore]:
        """Score the loss on the base's answers, and write this model's own.

        Without the base's answers they are written now, by the model without its adapter.
        """
        from llmtune.scoring.batches import adapter_disabled, has_adapter
        from llmtune.scoring.generate import Decoding
        from llmtune.scoring.likelihood import Writing, score_and_write
        from llmtune.scoring.requests import ContinuationRequest

        if not all(item.references for item in suite.items):
            if has_adapter(scored.model):
                with adapter_disabled(scored.model):
                    texts = self.write_answers(scored, suite, scoring.token_budget)
            else:
                texts = self.write_answers(scored, suite, scoring.token_budget)
            suite = suite.with_base_answers(texts)
        prompts = self._encode(scored.tokenizer, suite)
        requests = []
        for item, ids in zip(suite.items, prompts, strict=True):
            text = item.references[0]
            answer = scored.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            requests.append(
                ContinuationRequest(tuple(ids), (tuple(answer or scored.stop_token_ids[:1]),))
            )
        decoding = Decoding(self.max_new_tokens, scored.stop_token_ids)
        found, written = score_and_write(
            scored.model,
            requests,
            Writing(scored.tokenizer, decoding, lambda _: True),
            token_budget=scoring.token_budget,
            on_progress=scoring.on_items,
        )
        answers = [answer for answer in written if answer is not None]  # all are wanted
        return [
            item.scored(
                -score.log_likelihood / score.num_tokens,
                prediction=answer.text,
                answer=item.references[0],
                weight=float(score.num_tokens),
                details={"stopped": answer.stopped, "num_tokens": len(answer.token_ids)},
            )
            for item, (score,), answer in zip(suite.items, found, answers, strict=True)
        ]

    def kept_answer(self, score: ItemScore) -> KeptAnswer | None:
        """Return this arm's own answer."""
        if score.prediction is None:
            return None
        return KeptAnswer(score.prediction, self.max_new_tokens)

    def describe(self, scores: Sequence[ItemScore]) -> JsonObject:
        """Return what this arm's own answers are like, beside the base's."""
        return asdict(AnswerStyle.measure(scores))

    def count_tokens(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> int:
        """Return the tokens of the prompts, and of answers scored once and written once."""
        prompts = self._encode(tokenizer, suite)
        return sum(len(ids) + 2 * self.max_new_tokens for ids in prompts)

    def _encode(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> list[list[int]]:
        from llmtune.evaluation.requests import encode_chats

        return [list(ids) for ids in encode_chats(tokenizer, suite)]

    def _write(
        self, scored: "LiveModel", suite: Suite, token_budget: int | None
    ) -> "Sequence[Generation]":
        from llmtune.scoring.batches import choose_token_budget
        from llmtune.scoring.generate import Decoding, generate_texts

        return generate_texts(
            scored.model,
            scored.tokenizer,
            self._encode(scored.tokenizer, suite),
            Decoding(self.max_new_tokens, scored.stop_token_ids),
            token_budget=token_budget or choose_token_budget(scored.model),
        )
