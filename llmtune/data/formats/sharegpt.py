"""The `sharegpt` format: a list of from/value turns with human/gpt roles and their variants."""

from collections.abc import Mapping
from typing import Any, ClassVar

from llmtune.data.conversation import Conversation, ask, chat, put_system_first
from llmtune.data.formats.base import SYSTEM, DatasetFormat, Row, row_weight
from llmtune.data.problems import RowError, did_you_mean, shorten
from llmtune.data.row_values import parse_json_text

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class ShareGptFormat(DatasetFormat):
    """`{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}`."""

    name: ClassVar[str] = "sharegpt"
    columns: ClassVar[dict[str, str]] = {
        "conversations": "a list of turns, each with from and value",
        "system": "the system message",
        "tools": "a list of tool schemas",
        "weight": "what the row's loss is multiplied by",
    }
    required: ClassVar[tuple[str, ...]] = ("conversations",)
    asked: ClassVar[tuple[str, ...]] = ("conversations",)
    turn_columns: ClassVar[tuple[str, ...]] = ("conversations",)
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "conversations": ("conversations", "items"),
        "system": SYSTEM,
        "tools": ("tools", "functions"),
    }

    def recognizes(self, row: Row) -> bool:
        """Say whether a row has conversations."""
        return "conversations" in row

    def to_conversation(self, row: Row) -> Conversation:
        """Return the from/value turns as a chat."""
        return chat(_read_turns(row), row.get("tools"), weight=row_weight(row))

    def to_prompt(self, row: Row) -> Conversation:
        """Return the turns as a chat that waits for an answer."""
        return ask(_read_turns(row), row.get("tools"))


def _read_turns(row: Row) -> list[dict[str, Any]]:
    turns = parse_json_text(row["conversations"], "conversations")
    if not isinstance(turns, list):
        raise RowError(
            f"conversations is {shorten(turns)}; expected a list of "
            '{"from": ..., "value": ...} objects'
        )
    messages = [_to_message(turn, f"turn {index}") for index, turn in enumerate(turns, 1)]
    return put_system_first(messages, row.get("system"))


def _to_message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is {shorten(turn)}; expected an object with from and value")
    if "from" not in turn and "role" in turn:
        return dict(turn)  # role/content turns under a `conversations` column
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise RowError(
            f"{where}: from is {shorten(speaker)}; expected one of {', '.join(SPEAKERS)}"
            f"{did_you_mean(speaker, SPEAKERS)}",
            "role",
        )
    if "value" not in turn:
        others = ", ".join(str(key) for key in turn if key != "from") or "nothing else"
        raise RowError(f'{where} ({speaker}) has no "value"; found {others}', "content")
    kept = {key: item for key, item in turn.items() if key not in ("from", "value")}
    role = SPEAKERS[speaker.lower()]
    if speaker.lower() == "function_call":
        call = parse_json_text(turn["value"], where)
        calls = call if isinstance(call, list) else [call]
        return {**kept, "role": role, "content": None, "tool_calls": calls}
    return {**kept, "role": role, "content": turn["value"]}
