"""The same prompts answered by base and tuned model, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmtune.config import RunConfig
from llmtune.data.example import IGNORE_INDEX
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.data.prepare import prepare_examples
from llmtune.data.render import render_messages
from llmtune.evaluation.requests import encode_prompts
from llmtune.evaluation.tasks.base import Suite
from llmtune.scoring.batches import choose_token_budget
from llmtune.scoring.generate import Decoding, generate_texts
from llmtune.serving.live import LiveTarget

SHOWN_ROWS = 4
SHOWN_OPEN_PROMPTS = 4
SHOWN_NEW_TOKENS = 48


@dataclass(frozen=True)
class _Shown:
    """One prompt for the side-by-side answers: as text, as ids, and the right answer if known."""

    text: str
    ids: Sequence[int]
    reference: str | None = None


def answer_side_by_side(
    live: LiveTarget, config: RunConfig, suites: Sequence[Suite]
) -> list[dict[str, Any]]:
    """Return held-out prompts and open questions, answered by base and by tuned model."""
    tokenizer = live.loaded.tokenizer
    prompts = _prompts(live, config, suites)
    decoding = Decoding(SHOWN_NEW_TOKENS, live.loaded.stop_token_ids)
    answers = {}
    for arm in ("base", "tuned"):
        with live.answering_as(arm) as model:
            answers[arm] = generate_texts(
                model,
                tokenizer,
                [shown.ids for shown in prompts],
                decoding,
                token_budget=choose_token_budget(model),
            )
    return [
        {
            "prompt": shown.text,
            "base": base.text,
            "tuned": tuned.text,
            "base_stopped": base.stopped,
            "tuned_stopped": tuned.stopped,
            "reference": shown.reference,
        }
        for shown, base, tuned in zip(prompts, answers["base"], answers["tuned"], strict=True)
    ]


def count_tokens(live: LiveTarget, config: RunConfig, suites: Sequence[Suite]) -> int:
    """Return the forward tokens that the answers cost at most."""
    prompts = _prompts(live, config, suites)
    return 2 * sum(len(shown.ids) + SHOWN_NEW_TOKENS for shown in prompts)


def _prompts(live: LiveTarget, config: RunConfig, suites: Sequence[Suite]) -> list[_Shown]:
    tokenizer = live.loaded.tokenizer
    prompts = _suite_prompts(suites, tokenizer) or _row_prompts(config, tokenizer)
    if tokenizer.chat_template:
        for question in OPEN_PROMPTS[:SHOWN_OPEN_PROMPTS]:
            messages = [{"role": "user", "content": question}]
            ids = render_messages(tokenizer, messages, add_generation_prompt=True)
            prompts.append(_Shown(question, ids))
    return prompts


def _suite_prompts(suites: Sequence[Suite], tokenizer: PreTrainedTokenizerFast) -> list[_Shown]:
    """Return the first items of the first target suite that asks something."""
    asking = [suite for suite in suites if suite.role == "target" and suite.asks]
    if not asking:
        return []
    suite = asking[0]
    shown = []
    for item, ids in zip(suite.items, encode_prompts(tokenizer, suite), strict=True):
        shown.append(_Shown(item.prompt, ids, item.right_answer))
    return shown[:SHOWN_ROWS]


def _row_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> list[_Shown]:
    """Return the first rows of the evaluation split, as the model reads them."""
    held_out = prepare_examples(config.data, tokenizer, split="evaluation", seed=config.seed)
    shown = []
    for index in range(min(SHOWN_ROWS, len(held_out.examples))):
        example = held_out.examples[index]
        first = next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
        answer = [label for label in example.labels if label != IGNORE_INDEX]
        shown.append(
            _Shown(
                tokenizer.decode(example.input_ids[:first]),
                list(example.input_ids[:first]),
                tokenizer.decode(answer, skip_special_tokens=True),
            )
        )
    return shown
