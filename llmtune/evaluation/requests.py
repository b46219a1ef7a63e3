"""From a suite's items to token ids: the chat template's, or raw text split as lm-eval does."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from llmtune.data.render import render_messages
from llmtune.evaluation.tasks.base import Demonstration, PromptedSuite, Suite, SuiteItem
from llmtune.scoring.perplexity import leading_special_ids

RAW_SEPARATOR = "\n\n"


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
        texts = [raw_context(config, item, demonstrations) for item in suite.items]
        return [(*lead, *encode_text(tokenizer, text)) for text in texts]
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


def raw_context(
    config: PromptedSuite, item: SuiteItem, demonstrations: Sequence[Demonstration]
) -> str:
    """Return an item's prompt after the demonstrations, as text without a chat template."""
    shown = [demo.prompt + config.separator + demo.answer for demo in demonstrations]
    return RAW_SEPARATOR.join([*shown, item.prompt])


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
