"""From a suite's items to token ids: the chat template's, or raw text split as lm-eval does."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from llmtune.data.conversation import Conversation
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.problems import RowError
from llmtune.data.prompts import encode_questions
from llmtune.data.render import leading_special_ids
from llmtune.errors import LlmtuneError
from llmtune.evaluation.question import question_of
from llmtune.evaluation.tasks.base import Demonstration, PromptedSuite, Suite, SuiteItem
from llmtune.models.turns import TurnEnding, require_chat_template
from llmtune.scoring.requests import ContinuationRequest

logger = logging.getLogger(__name__)

RAW_SEPARATOR = "\n\n"


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast,
    suite: Suite,
    demonstrations: Sequence[Demonstration] = (),
) -> list[tuple[int, ...]]:
    """Return each item's prompt as token ids, after the demonstrations.

    Raises:
        LlmtuneError: the suite is a chat and the tokenizer has no chat template, or items that
            training would refuse, by file and line.
    """
    config = suite.config
    assert isinstance(config, PromptedSuite)
    if not config.chat:
        lead = leading_special_ids(tokenizer)
        texts = [raw_context(config, item, demonstrations) for item in suite.items]
        return [(*lead, *encode_text(tokenizer, text)) for text in texts]
    require_chat_template(tokenizer)
    return encode_chats(tokenizer, suite, demonstrations)


def encode_chats(
    tokenizer: PreTrainedTokenizerFast,
    suite: Suite,
    demonstrations: Sequence[Demonstration] = (),
) -> list[tuple[int, ...]]:
    """Return each item's chat as token ids; without a template a lone question is plain text.

    Raises:
        LlmtuneError: names the items that training would refuse, by file and line.
    """
    asked = zip(suite.items, _questions(suite, demonstrations), strict=True)
    questions = ((item.source, item.line, question) for item, question in asked)
    return [tuple(ids) for ids in encode_questions(tokenizer, questions)]


def encode_raw_choices(
    tokenizer: PreTrainedTokenizerFast,
    suite: Suite,
    demonstrations: Sequence[Demonstration] = (),
) -> list[ContinuationRequest]:
    """Return each item's raw prompt and choices, split as lm-evaluation-harness splits them.

    Raises:
        LlmtuneError: a prompt or a choice has no tokens.
    """
    config = suite.config
    assert isinstance(config, PromptedSuite)
    lead = leading_special_ids(tokenizer)
    requests = []
    for item in suite.items:
        context = raw_context(config, item, demonstrations)
        pairs = [
            split_continuation(tokenizer, context, config.separator + choice)
            for choice in item.choices
        ]
        heads = {tuple(head) for head, _ in pairs}
        assert len(heads) == 1, "the context's ids do not depend on the continuation"
        prompt = (*lead, *heads.pop())
        if not prompt or not all(tail for _, tail in pairs):
            raise LlmtuneError(
                f"{item.source}:{item.line}: prompt or a choice is empty after tokenization"
            )
        requests.append(ContinuationRequest(prompt, tuple(tuple(tail) for _, tail in pairs)))
    return requests


def encode_chat_choices(
    tokenizer: PreTrainedTokenizerFast,
    suite: Suite,
    demonstrations: Sequence[Demonstration] = (),
    *,
    with_end: bool,
) -> list[ContinuationRequest]:
    """Return each item's prompt and choices with the very ids that training gives such rows.

    Every choice is rendered as the answer of a whole conversation and labelled as a training row:
    the trained ids are the choice (the end of the turn only `with_end`), those before are the
    prompt. What all choices begin with because the template writes it (an empty thinking block)
    belongs to the prompt. Where training would refuse the template's rows, a choice is tokenized
    apart behind the generation prompt, as the model itself would write it; that is logged.

    Raises:
        LlmtuneError: the tokenizer has no chat template, or a choice has no tokens.
    """
    prompts = encode_prompts(tokenizer, suite, demonstrations)
    conversations = [
        replace(
            question,
            messages=[*question.messages, {"role": "assistant", "content": choice}],
            trained_from=len(question.messages),
        )
        for item, question in zip(suite.items, _questions(suite, demonstrations), strict=True)
        for choice in item.choices
    ]
    labeller = Labeller(tokenizer, "last-assistant")
    ending = labeller.ending
    lead = encode_text(tokenizer, ending.lead)
    rows = iter(labeller.label(conversations))
    requests = []
    refused = None
    for item, prompt in zip(suite.items, prompts, strict=True):
        found = [next(rows) for _ in item.choices]
        for row in found:
            if isinstance(row, RowError) and row.kind == "control-token":
                raise LlmtuneError(f"{item.source}:{item.line}: {row}")
        refused = refused or next((row for row in found if isinstance(row, RowError)), None)
        answers = [
            _trained_ids(row, prompt, with_end=with_end)
            or _apart_ids(tokenizer, ending, choice, with_end=with_end)
            for row, choice in zip(found, item.choices, strict=True)
        ]
        shared = len(os.path.commonprefix([lead, *answers]))
        if not all(ids[shared:] for ids in answers):
            raise LlmtuneError(f"{item.source}:{item.line}: a choice is empty after tokenization")
        requests.append(
            ContinuationRequest(
                (*prompt, *lead[:shared]), tuple(tuple(ids[shared:]) for ids in answers)
            )
        )
    if refused is not None:
        logger.warning(
            "%s: choices are scored right behind the prompt, because training could not learn from "
            "such answers: %s",
            suite.items_path,
            refused,
        )
    return requests


def _trained_ids(
    row: LabelledRow | RowError, prompt: tuple[int, ...], *, with_end: bool
) -> list[int]:
    """Return the ids that training would train of an answer; none if it asks with other ids."""
    if isinstance(row, RowError) or len(row.sequences) != 1:
        return []
    [sequence] = row.sequences
    [(start, end)] = sequence.spans
    if tuple(sequence.input_ids[:start]) != prompt:
        return []
    return sequence.input_ids[start : end if with_end else end - 1]


def _apart_ids(
    tokenizer: PreTrainedTokenizerFast, ending: TurnEnding, choice: str, *, with_end: bool
) -> list[int]:
    tail = [ending.terminator_id] if with_end else []
    return encode_text(tokenizer, ending.lead + choice) + tail


def _questions(suite: Suite, demonstrations: Sequence[Demonstration]) -> list[Conversation]:
    """Return each item's chat up to its question."""
    shown = [(each.prompt, each.answer) for each in demonstrations]
    return [question_of(suite, item, shown) for item in suite.items]


def raw_context(
    config: PromptedSuite, item: SuiteItem, demonstrations: Sequence[Demonstration]
) -> str:
    """Return an item's prompt after the demonstrations, as text without a chat template."""
    shown = [demo.prompt + config.separator + demo.answer for demo in demonstrations]
    return RAW_SEPARATOR.join([*shown, item.prompt])


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a written text up to the first stop that comes after its leading spaces."""
    text = text.lstrip()
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places, default=len(text))]


def split_continuation(
    tokenizer: PreTrainedTokenizerFast, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Encode a context and its continuation as one text and split the ids between them.

    Spaces at the context's end move to the continuation, and the whole is cut after as many tokens
    as the context alone has: the rule of lm-evaluation-harness (api/model.py, `_encode_pair`).
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole = encode_text(tokenizer, bare + continuation)
    head = encode_text(tokenizer, bare)
    return head, whole[len(head) :]


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return a text's token ids without the tokenizer's special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
