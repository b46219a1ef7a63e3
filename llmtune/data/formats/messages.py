"""The `messages` format: a list of role/content turns, as chat services take them."""

from collections.abc import Mapping
from typing import Any, ClassVar

from llmtune.data.conversation import Conversation, ask, chat, put_system_first
from llmtune.data.formats.base import SYSTEM, DatasetFormat, Row, row_weight
from llmtune.data.formats.sharegpt import ShareGptFormat
from llmtune.data.problems import RowError
from llmtune.data.row_values import parse_json_text


class MessagesFormat(DatasetFormat):
    """`{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}`."""

    name: ClassVar[str] = "messages"
    columns: ClassVar[dict[str, str]] = {
        "messages": "a list of turns, each with role and content",
        "system": "the system message",
        "tools": "a list of tool schemas",
        "weight": "what the row's loss is multiplied by",
    }
    required: ClassVar[tuple[str, ...]] = ("messages",)
    asked: ClassVar[tuple[str, ...]] = ("messages",)
    turn_columns: ClassVar[tuple[str, ...]] = ("messages",)
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "messages": ("messages", "conversation", "chat", "dialog", "dialogue"),
        "system": SYSTEM,
        "tools": ("tools", "functions"),
    }

    def recognizes(self, row: Row) -> bool:
        """Say whether a row has messages with roles."""
        value = row.get("messages")
        if isinstance(value, str):
            return '"role"' in value or value.lstrip().startswith("[")
        return "messages" in row and not _has_from_turns(value)

    def to_conversation(self, row: Row) -> Conversation:
        """Return the messages as a chat."""
        return chat(_read_turns(row), row.get("tools"), weight=row_weight(row))

    def to_prompt(self, row: Row) -> Conversation:
        """Return the messages as a chat that waits for an answer."""
        return ask(_read_turns(row), row.get("tools"))


def _read_turns(row: Row) -> Any:
    messages = parse_json_text(row["messages"], "messages")
    if _has_from_turns(messages):
        raise RowError(
            'its messages have "from" and no "role"; expected role and content, or set '
            f"format: {ShareGptFormat.name}, which reads from and value",
            "role",
        )
    if isinstance(messages, list):
        messages = put_system_first(messages, row.get("system"))
    return messages


def _has_from_turns(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], Mapping)
        and "from" in value[0]
        and "role" not in value[0]
    )
