"""From a suite's items to token ids: the chat template's, or raw text split as lm-eval does."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from llmtune.data.render import render_messages
from llmtune.errors import LlmtuneError
from llmtune.evaluation.items import SuiteItem
from llmtune.evaluation.suite import Suite
from llmtune.evaluation.suite_config import ChoiceSuite, PromptedSuite
from llmtune.models.turns import find_turn_ending
from llmtune.scoring.likelihood import ContinuationRequest
from llmtune.scoring.perplexity import leading_special_ids

logger = logging.getLogger(__name__)

RAW_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Demonstration:
    """A worked example shown before the question (few-shot): a prompt and its right answer."""

    prompt: str
    answer: str


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast,
    suite: Suite,
    demonstrations: Sequence[Demonstration] = (),
) -> list[tuple[int, ...]]:
    """Return each item's prompt as token ids, after the demonstrations.

    Raises:
        LlmtuneError: the suite is a chat and the tokenizer has no chat template.
    """
    config = suite.config
    assert isinstance(config, PromptedSuite)
    if not config.chat:
        lead = leading_special_ids(tokenizer)
        texts = [_raw_context(suite, item, demonstrations) for item in suite.items]
        return [(*lead, *_encode(tokenizer, text)) for text in texts]
    opening = [{"role": "system", "content": config.system}] if config.system else []
    for shown in demonstrations:
        opening.append({"role": "user", "content": shown.prompt})
        opening.append({"role": "assistant", "content": shown.answer})
    return [
        tuple(
            render_messages(
                tokenizer,
                [*opening, {"role": "user", "content": item.prompt}],
                add_generation_prompt=True,
            )
        )
        for item in suite.items
    ]


def build_choice_requests(
    tokenizer: PreTrainedTokenizerFast,
    suite: Suite,
    demonstrations: Sequence[Demonstration] = (),
) -> list[ContinuationRequest]:
    """Return each item's prompt and choices as token ids.

    Items where one choice begins another are warned of once: "4" is never less likely than "42".
    """
    assert isinstance(suite.config, ChoiceSuite)
    requests = encode_choices(tokenizer, suite, demonstrations)
    if suite.config.normalize == "none":
        _warn_of_head_starts(suite, requests)
    return requests


def encode_choices(
    tokenizer: PreTrainedTokenizerFast,
    suite: Suite,
    demonstrations: Sequence[Demonstration] = (),
) -> list[ContinuationRequest]:
    """Return what `build_choice_requests` does, without its warning."""
    config = suite.config
    assert isinstance(config, ChoiceSuite)
    if config.chat:
        return _chat_requests(tokenizer, suite, demonstrations)
    lead = leading_special_ids(tokenizer)
    requests = []
    for item in suite.items:
        context = _raw_context(suite, item, demonstrations)
        pairs = [
            split_continuation(tokenizer, context, config.delimiter + choice)
            for choice in item.choices
        ]
        requests.append(_one_context(suite, item, lead, pairs))
    return requests


def split_continuation(
    tokenizer: PreTrainedTokenizerFast, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Encode a context and its continuation as one text and split the ids between them.

    Spaces at the context's end move to the continuation, and the whole is cut after as many tokens
    as the context alone has: the rule of lm-evaluation-harness (api/model.py, `_encode_pair`).
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole = _encode(tokenizer, bare + continuation)
    head = _encode(tokenizer, bare)
    return head, whole[len(head) :]


def _chat_requests(
    tokenizer: PreTrainedTokenizerFast, suite: Suite, demonstrations: Sequence[Demonstration]
) -> list[ContinuationRequest]:
    """Put each choice where the template puts an answer, after what it writes before one.

    Some templates write an empty thinking block or a space between the generation prompt and the
    answer; its tokens belong to the prompt, except where they merge with the choice's first.
    """
    config = suite.config
    assert isinstance(config, ChoiceSuite)
    prompts = encode_prompts(tokenizer, suite, demonstrations)
    ending = find_turn_ending(tokenizer)
    tail = [ending.terminator_id] if config.end_of_answer else []
    lead = _encode(tokenizer, ending.lead)
    requests = []
    for item, prompt in zip(suite.items, prompts, strict=True):
        choices = [_encode(tokenizer, ending.lead + choice) + tail for choice in item.choices]
        shared = len(os.path.commonprefix([lead, *choices]))
        requests.append(
            ContinuationRequest(
                (*prompt, *lead[:shared]), tuple(tuple(ids[shared:]) for ids in choices)
            )
        )
    return requests


def _one_context(
    suite: Suite,
    item: SuiteItem,
    lead: tuple[int, ...],
    pairs: Sequence[tuple[list[int], list[int]]],
) -> ContinuationRequest:
    heads = {tuple(head) for head, _ in pairs}
    assert len(heads) == 1, "the context's ids do not depend on the continuation"
    prompt = (*lead, *heads.pop())
    if not prompt or not all(tail for _, tail in pairs):
        raise LlmtuneError(
            f"{suite.items_path}:{item.line}: prompt or a choice is empty after tokenization"
        )
    return ContinuationRequest(prompt, tuple(tuple(tail) for _, tail in pairs))


def _raw_context(suite: Suite, item: SuiteItem, demonstrations: Sequence[Demonstration]) -> str:
    between = suite.config.delimiter if isinstance(suite.config, ChoiceSuite) else " "
    shown = [demo.prompt + between + demo.answer for demo in demonstrations]
    return RAW_SEPARATOR.join([*shown, item.prompt])


def _warn_of_head_starts(suite: Suite, requests: Sequence[ContinuationRequest]) -> None:
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


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
