"""Does the tuned model end its answers by itself? Asked once, right after training."""

import logging
from collections.abc import Sequence
from typing import TypedDict

from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.scoring.batches import choose_token_budget, position_limit
from llmtune.scoring.generate import Decoding, generate_texts

log = logging.getLogger("llmtune")

NUM_PROMPTS = 8
NUM_LOOKED_AT = 64
"""Rows among which those with the shortest answers are asked."""
MAX_NEW_TOKENS = 256
SLACK_TOKENS = 16


class StopCheck(TypedDict):
    """How many answers ended by themselves."""

    stopped: int
    asked: int
    max_new_tokens: int


def check_stops(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    stop_ids: tuple[int, ...],
) -> StopCheck | None:
    """Ask the prompts of a few rows, greedily, and count the answers that end by themselves.

    A prompt is a row up to its last trained turn. An answer may be twice as long as the longest
    one of those rows, and no longer than `MAX_NEW_TOKENS` in all.

    Returns:
        `stopped`, `asked` and `max_new_tokens`; None if no row has a prompt (plain text).
    """
    asked = _choose(examples, position_limit(model))
    if not asked:
        return None
    max_new_tokens = _allowed(asked[-1][0])
    answers = generate_texts(
        model,
        tokenizer,
        [prompt for _, prompt in asked],
        Decoding(max_new_tokens, stop_ids),
        token_budget=choose_token_budget(model),
    )
    stopped = sum(answer.stopped for answer in answers)
    log.log(
        logging.WARNING if 2 * stopped < len(asked) else logging.INFO,
        "stop check: %d of %d answers ended by themselves within %d tokens",
        stopped,
        len(asked),
        max_new_tokens,
    )
    return {"stopped": stopped, "asked": len(asked), "max_new_tokens": max_new_tokens}


def _allowed(answer_length: int) -> int:
    return min(2 * answer_length + SLACK_TOKENS, MAX_NEW_TOKENS)


def _choose(examples: Sequence[Example], max_positions: int | None) -> list[tuple[int, list[int]]]:
    """Return (length of the answer, prompt) of the rows with the shortest answers, those first."""
    found: list[tuple[int, list[int]]] = []
    for index in range(min(NUM_LOOKED_AT, len(examples))):
        example = examples[index]
        trained = [label != IGNORE_INDEX for label in example.labels]
        end = len(trained) - trained[::-1].index(True)
        start = next((i + 1 for i in range(end - 1, -1, -1) if not trained[i]), 0)
        length = end - start
        room = max_positions is None or start + _allowed(length) <= max_positions
        if start and room:
            found.append((length, example.input_ids[:start]))
    found.sort(key=lambda one: one[0])
    chosen = found[:NUM_PROMPTS]
    longest = _allowed(chosen[-1][0]) if chosen else 0
    return [
        one for one in chosen if max_positions is None or len(one[1]) + longest <= max_positions
    ]
