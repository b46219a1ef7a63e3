"""The same prompts answered by base and tuned model, for people to read."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from llmtune.data.config import DataConfig
from llmtune.data.example import split_answer
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.data.prepare import prepare_examples
from llmtune.data.render import render_messages
from llmtune.evaluation.requests import encode_prompts
from llmtune.evaluation.tasks.base import Suite
from llmtune.models.live import LiveModel
from llmtune.scoring.batches import adapter_disabled, choose_token_budget
from llmtune.scoring.generate import Decoding, generate_texts

SHOWN_ROWS = 4
SHOWN_OPEN_PROMPTS = 4
SHOWN_NEW_TOKENS = 48


@dataclass(frozen=True)
class ShownPrompt:
    """One prompt for the side-by-side answers: as text, as ids, and the right answer if known."""

    text: str
    ids: Sequence[int]
    reference: str | None = None


@dataclass(frozen=True)
class ShownAnswers:
    """A prompt answered by both; `stopped` says whether the model ended by itself."""

    prompt: str
    base: str
    tuned: str
    base_stopped: bool
    tuned_stopped: bool
    reference: str | None


def answer_side_by_side(scored: LiveModel, prompts: Sequence[ShownPrompt]) -> list[ShownAnswers]:
    """Return the prompts, answered by the model with its adapter off and on."""
    decoding = Decoding(SHOWN_NEW_TOKENS, scored.stop_token_ids)
    answers = {}
    for arm in ("base", "tuned"):
        with adapter_disabled(scored.model) if arm == "base" else contextlib.nullcontext():
            answers[arm] = generate_texts(
                scored.model,
                scored.tokenizer,
                [shown.ids for shown in prompts],
                decoding,
                token_budget=choose_token_budget(scored.model),
            )
    return [
        ShownAnswers(
            prompt=shown.text,
            base=base.text,
            tuned=tuned.text,
            base_stopped=base.stopped,
            tuned_stopped=tuned.stopped,
            reference=shown.reference,
        )
        for shown, base, tuned in zip(prompts, answers["base"], answers["tuned"], strict=True)
    ]


def count_tokens(prompts: Sequence[ShownPrompt]) -> int:
    """Return the forward tokens that the answers cost at most."""
    return 2 * sum(len(shown.ids) + SHOWN_NEW_TOKENS for shown in prompts)


def find_prompts(
    tokenizer: PreTrainedTokenizerFast, suites: Sequence[Suite], data: DataConfig, seed: int
) -> list[ShownPrompt]:
    """Return held-out prompts of a target suite, or else of held-out rows, and open questions."""
    prompts = _suite_prompts(suites, tokenizer) or _row_prompts(data, tokenizer, seed)
    if tokenizer.chat_template:
        for question in OPEN_PROMPTS[:SHOWN_OPEN_PROMPTS]:
            messages = [{"role": "user", "content": question}]
            ids = render_messages(tokenizer, messages, add_generation_prompt=True)
            prompts.append(ShownPrompt(question, ids))
    return prompts


def _suite_prompts(
    suites: Sequence[Suite], tokenizer: PreTrainedTokenizerFast
) -> list[ShownPrompt]:
    """Return the first items of the first target suite that asks something."""
    asking = [suite for suite in suites if suite.role == "target" and suite.asks]
    if not asking:
        return []
    suite = asking[0]
    shown = []
    for item, ids in zip(suite.items, encode_prompts(tokenizer, suite), strict=True):
        shown.append(ShownPrompt(item.prompt, ids, item.right_answer))
    return shown[:SHOWN_ROWS]


def _row_prompts(
    data: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int
) -> list[ShownPrompt]:
    """Return the first rows of the evaluation split, as the model reads them.

    A document is shown by its first half, which the models continue.
    """
    held_out = prepare_examples(data, tokenizer, split="evaluation", seed=seed)
    shown = []
    for example in held_out.examples:
        pair = split_answer(example)
        if pair is not None:
            prompt, answer = pair
            text = tokenizer.decode(answer, skip_special_tokens=True)
            shown.append(ShownPrompt(tokenizer.decode(prompt), prompt, text))
        if len(shown) == SHOWN_ROWS:
            break
    return shown
