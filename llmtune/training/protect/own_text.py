"""Text that the base writes itself, to be trained on or held to while it is adapted."""

import math
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.data.example import Example
from llmtune.data.open_prompts import OPEN_PROMPTS, OPENERS
from llmtune.data.render import render_messages
from llmtune.scoring.batches import choose_token_budget
from llmtune.scoring.generate import Decoding, generate_texts

OWN_TEXT_SOURCE = "the base's own text"
TEMPERATURE = 1.0


def write_own_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_rows: int,
    num_tokens: int,
    seed: int,
) -> list[Example]:
    """Sample rows from the model: prose from short openers, and answers where it is a chat model.

    Every token of a row is trained or compared, its opener included. The rows are a function of
    the model and the seed.

    Args:
        num_tokens: length of each row, its opener included; a row may end earlier by itself.
    """
    openers = _openers(tokenizer)
    prompts = [openers[row % len(openers)] for row in range(num_rows)]
    longest = max(map(len, prompts))
    decoding = Decoding(
        max_new_tokens=max(num_tokens - longest, num_tokens // 2),
        stop_token_ids=tuple({tokenizer.eos_token_id} - {None}),
        temperature=TEMPERATURE,
        seed=seed,
    )
    written = generate_texts(
        model, tokenizer, prompts, decoding, token_budget=choose_token_budget(model)
    )
    rows = [[*prompt, *text.token_ids] for prompt, text in zip(prompts, written, strict=True)]
    return [as_example(ids, OWN_TEXT_SOURCE, line) for line, ids in enumerate(rows, start=1)]


def as_example(ids: Sequence[int], source: str, line: int) -> Example:
    """Return token ids as a row of which every token counts."""
    return Example(list(ids), list(ids), source, line)


def rows_for_share(num_rows: int, share: float) -> int:
    """Return how many rows make up `share` of all when added to `num_rows` others."""
    return math.ceil(num_rows * share / (1 - share))


def _openers(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return short beginnings of rows: prose, alternating with questions if there is a template."""
    lead = tokenizer("", add_special_tokens=True)["input_ids"]
    prose = [[*lead, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in OPENERS]
    if not tokenizer.chat_template:
        return prose
    chat = [
        render_messages(
            tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True
        )
        for question in OPEN_PROMPTS
    ]
    pairs = zip(prose, chat, strict=False)
    return [list(ids) for pair in pairs for ids in pair]
