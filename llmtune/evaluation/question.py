"""What an item asks beside its prompt: a chat, its own system message, tools; read as rows are."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.data.conversation import Conversation, ask, put_system_first
from llmtune.data.problems import RowError
from llmtune.data.row_values import parse_json_text

if TYPE_CHECKING:
    from llmtune.evaluation.tasks.base import Suite, SuiteItem

CONTEXT_FIELDS = ("system", "tools")
"""What an item may say beside its question, as a training row does in the columns of that name."""


def read_question(
    fields: Mapping[str, Any],
    turns: Any,
    used: Container[str] = (),
    system: str | None = None,
) -> Conversation:
    """Return an item's chat, with its own system message and tools.

    Args:
        turns: the messages as they are there.
        used: fields that the prompt's template prints, and so are not context beside it.
        system: the suite's own system message.

    Raises:
        RowError: in the words in which training would refuse it.
    """
    own = {key: fields.get(key) for key in CONTEXT_FIELDS if key not in used}
    turns = parse_json_text(turns, "messages")
    if isinstance(turns, list):
        turns = put_system_first(turns, own.get("system"))
    question = ask(turns, own.get("tools"))
    if system and question.messages[0]["role"] == "system":
        put_system_first(question.messages, system)
    return question


def refuse_context(fields: Mapping[str, Any], used: Container[str]) -> None:
    """Refuse what would be lost in a suite of raw text: an item's own system message or tools.

    Raises:
        RowError: the item has one that the prompt does not print.
    """
    for key in CONTEXT_FIELDS:
        if fields.get(key) and key not in used:
            raise RowError(
                f"field {key!r} is read in chats only, and the suite has chat: false; print it in "
                "the prompt, or take it out"
            )


def question_of(
    suite: Suite, item: SuiteItem, shown: Sequence[tuple[str, str]] = ()
) -> Conversation:
    """Return an item's chat up to its question, behind demonstrations, with its tools."""
    system = getattr(suite.config, "system", None)
    messages = build_chat(item.messages, item.prompt, shown, system)
    return Conversation("chat", messages, [dict(tool) for tool in item.tools] or None)


def build_chat(
    messages: Sequence[Mapping[str, Any]],
    prompt: str,
    shown: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> list[dict[str, Any]]:
    """Return the messages up to a question.

    Args:
        messages: the item's own chat, which `prompt` ends; empty for a lone prompt.
        shown: demonstrations, a question and its answer each; behind the system message.
        system: the suite's own system message.
    """
    turns = [dict(message) for message in messages] or [{"role": "user"}]
    opening = [turns.pop(0)] if turns[0]["role"] == "system" else []
    if system and not opening:
        opening = [{"role": "system", "content": system}]
    for question, answer in shown:
        opening.append({"role": "user", "content": question})
        opening.append({"role": "assistant", "content": answer})
    turns[-1]["content"] = prompt
    return [*opening, *turns]
