"""Items that are longer than the model has positions, found before anything is trained."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtune.errors import LlmtuneError
from llmtune.evaluation.question import build_chat
from llmtune.evaluation.tasks.base import PromptedSuite, Suite, SuiteItem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHOWN_PROBLEMS = 5
TEMPLATE_TOKENS = 512
"""More than a chat template writes around one question; only then are items tokenized to see."""


def refuse_long_items(
    tokenizer: "PreTrainedTokenizerFast", suites: Sequence[Suite], positions: int | None
) -> None:
    """Refuse suites with items that the model cannot read whole.

    Args:
        positions: the longest sequence that the model has positions for; None has no limit.

    Raises:
        LlmtuneError: names the items by file and line, with their tokens and the model's limit.
    """
    if positions is None:
        return
    problems = [line for suite in suites for line in _find_long(tokenizer, suite, positions)]
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        raise LlmtuneError(
            "\n".join(problems[:SHOWN_PROBLEMS] + [f"... and {more} more"] * (more > 0))
        )


def refuse_control_items(tokenizer: "PreTrainedTokenizerFast", suites: Sequence[Suite]) -> None:
    """Refuse chats in which a text holds what would end or open a turn, as training does.

    Raises:
        LlmtuneError: names the items by file and line.
    """
    from llmtune.data.conversation import Conversation
    from llmtune.data.masks import refuse_control_text
    from llmtune.data.problems import RowError, RowProblem
    from llmtune.data.prompts import prompts_error
    from llmtune.models.turns import control_pattern

    if not tokenizer.chat_template:
        return
    controls = control_pattern(tokenizer)
    problems = []
    for suite in suites:
        if not getattr(suite.config, "chat", True):
            continue
        system = getattr(suite.config, "system", None)
        for item in suite.items:
            choices = [{"role": "assistant", "content": choice} for choice in item.choices]
            messages = [*build_chat(item.messages, item.prompt, system=system), *choices]
            tools = [dict(tool) for tool in item.tools] or None
            try:
                refuse_control_text(Conversation("chat", messages, tools), controls)
            except RowError as error:
                problems.append(RowProblem(str(suite.items_path), item.line, str(error)))
    if problems:
        raise prompts_error(problems)


def _find_long(tokenizer: "PreTrainedTokenizerFast", suite: Suite, positions: int) -> list[str]:
    config = suite.config
    room = positions - TEMPLATE_TOKENS
    system = config.system or "" if isinstance(config, PromptedSuite) else ""
    # No token is shorter than a byte, so most items are known to fit without tokenizing them.
    doubtful = suite.select({item.id for item in suite.items if _num_bytes(item, system) > room})
    if not doubtful.items:
        return []
    lengths = config.item_lengths(tokenizer, doubtful)
    return [
        f"{suite.items_path}:{item.line}: takes {length:,} tokens, and the model has "
        f"{positions:,} positions; shorten the item or leave it out"
        for item, length in zip(doubtful.items, lengths, strict=True)
        if length > positions
    ]


def _num_bytes(item: SuiteItem, system: str) -> int:
    longest = max(item.choices, key=len, default="")
    beside = json.dumps([*item.messages, *item.tools]) if item.messages or item.tools else ""
    texts = (system, item.prompt, longest, item.text, beside)
    return sum(len(text.encode("utf-8", "replace")) for text in texts)
