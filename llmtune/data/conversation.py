"""One row's content before it is tokenized, and the rules that a chat has to meet."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmtune.data.problems import RowError, did_you_mean, shorten
from llmtune.data.row_values import check_text, parse_json_text, read_weight
from llmtune.data.tools import read_tool_calls, read_tools
from llmtune.data.training_marks import read_marks

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_HINTS = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
PLAIN_ROLES = frozenset({"system", "user", "assistant"})
SURROGATES = re.compile("[\ud800-\udfff]")
MESSAGE_KEYS = frozenset(
    {
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "reasoning_content",
    }
)
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
UNREADABLE_KEYS = {
    "function_call": "the old form of tool_calls; put the call there",
    "reasoning_details": "one provider's form of reasoning; put its text into reasoning_content",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "not text"),
}
"""What would be lost without a word, and what it is."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""What the parts of a content list are called that hold text."""

THINKING_PARTS = ("thinking", "reasoning")
"""What the parts are called that hold an assistant's reasoning."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """What a row says. `chat` goes through the template; `plain` and `text` do not."""

    kind: Literal["chat", "plain", "text"]
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    """`plain`: the text that is not trained."""
    text: str = ""
    """`plain`: the completion; `text`: the document."""
    trained_from: int = 0
    """Assistant turns before this message index are context only."""
    weight: float = 1.0

    @property
    def num_characters(self) -> int:
        """Characters of all contents."""
        contents = sum(len(message["content"]) for message in self.messages)
        return contents + len(self.prompt) + len(self.text)


def chat(
    messages: Any, tools: Any = None, *, trained_from: int = 0, weight: Any = 1.0
) -> Conversation:
    """Return a checked chat `Conversation`.

    Raises:
        RowError: naming the message, what was found in it and what was expected.
    """
    checked = read_messages(messages)
    if not any(message["role"] == "assistant" for message in checked[trained_from:]):
        roles = ", ".join(message["role"] for message in checked)
        raise RowError(
            f"no assistant turn to train on; found the roles {roles}; expected at least one "
            "assistant message",
            "no-assistant",
        )
    return Conversation(
        kind="chat",
        messages=checked,
        tools=read_tools(tools),
        trained_from=trained_from,
        weight=read_weight(weight),
    )


def trained_turns(conversation: Conversation, loss_on: str) -> list[tuple[int, float]]:
    """Return `(message index, weight)` of the assistant turns that are trained.

    A message's own `train` decides over `loss_on`; a `weight` of 0 is `train: false`.

    Raises:
        RowError: there is none.
    """
    candidates = [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
        and (index >= conversation.trained_from or message.get("train"))
    ]
    chosen = []
    for index in candidates:
        message = conversation.messages[index]
        weight = conversation.weight * message.get("weight", 1.0)
        default = loss_on != "last-assistant" or index == candidates[-1]
        if message.get("train", default) and weight > 0:
            chosen.append((index, weight))
    if not chosen:
        raise RowError(
            "no assistant turn is left to train on: every one has train: false or weight: 0",
            "no-assistant",
        )
    return chosen


def ask(messages: Any, tools: Any = None) -> Conversation:
    """Return a checked chat that waits for an answer: its last message is not the assistant's.

    Raises:
        RowError: naming the message, what was found in it and what was expected.
    """
    checked = read_messages(messages)
    if checked[-1]["role"] == "assistant":
        raise RowError(
            "the last message is the assistant's, so nothing is left to answer; take it out",
            "answered",
        )
    return Conversation(kind="chat", messages=checked, tools=read_tools(tools))


def put_system_first(messages: list[Any], system: Any) -> list[Any]:
    """Return `messages` with a row's system column as the first of them, where it has one."""
    if system is None or system == "":
        return messages
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise RowError(
            "two system messages: in the column system and as message 1; take one out",
            "messages",
        )
    return messages


def read_messages(value: Any) -> list[Message]:
    """Return the messages of one chat with known roles, text contents and parsed tool calls."""
    value = parse_json_text(value, "messages")
    if not isinstance(value, list):
        raise RowError(
            f"messages is {shorten(value)}; expected a list of "
            '{"role": ..., "content": ...} objects',
            "messages",
        )
    if not value:
        raise RowError("messages is empty; expected at least a user and an assistant turn", "empty")
    return [_read_message(message, index) for index, message in enumerate(value, 1)]


def _read_message(value: Any, index: int) -> Message:
    if _is_plain(value):
        plain: Message = value
        return plain
    where = f"message {index}"
    if not isinstance(value, Mapping):
        raise RowError(f"{where} is {shorten(value)}; expected an object with role and content")
    message = {key: item for key, item in value.items() if item is not None and key in MESSAGE_KEYS}
    role = value.get("role")
    if role not in ROLES:
        raise _unknown_role(value, role, where)
    message["role"] = str(role)
    for key, what in UNREADABLE_KEYS.items():
        if value.get(key):
            raise RowError(f"{where} ({role}) has {key}, which is {what}", "content")
    reasoning = [value[key] for key in REASONING_KEYS if value.get(key)]
    if role == "assistant" and isinstance(value.get("content"), list):
        thought, value = _take_thinking(value, f"{where} ({role})")
        if thought and reasoning:
            raise RowError(
                f"{where} ({role}) has its reasoning twice: as a part of content and beside it; "
                "take one out",
                "content",
            )
        reasoning = [thought] if thought else reasoning
    if reasoning:
        message["reasoning_content"] = check_text(reasoning[0], f"{where} ({role}): reasoning")
    if value.get("tool_calls"):
        message["tool_calls"] = read_tool_calls(value["tool_calls"], where)
    else:
        message.pop("tool_calls", None)
    where = f"{where} ({role})"
    has_more = "tool_calls" in message or bool(reasoning and role == "assistant")
    message["content"] = _read_content(value, where, has_more=has_more)
    return message | read_marks(value, message["role"], where)


def _is_plain(value: Any) -> bool:
    """Say whether nothing is left to check: the case of nearly every message of every file."""
    if type(value) is not dict or len(value) != 2:
        return False
    role, content = value.get("role"), value.get("content")
    return (
        type(role) is str
        and role in PLAIN_ROLES
        and type(content) is str
        and content != ""
        and not content.isspace()
        and (content.isascii() or not SURROGATES.search(content))
    )


def _unknown_role(value: Mapping[str, Any], role: Any, where: str) -> RowError:
    if role is None and "from" in value:
        return RowError(f'{where} has "from" and no "role"; expected role and content', "role")
    found = f"role {shorten(role)} is not known" if role is not None else 'has no "role"'
    lowered = str(role).lower()
    hint = did_you_mean(lowered, ROLES)
    if lowered in ROLE_HINTS:
        hint = f' (did you mean "{ROLE_HINTS[lowered]}"?)'
    elif lowered in ("usr", "me"):
        hint = ' (did you mean "user"?)'
    return RowError(f"{where}: {found}; expected one of {', '.join(ROLES)}{hint}", "role")


def _read_content(value: Mapping[str, Any], where: str, *, has_more: bool) -> str:
    """Return a message's text, which may be empty if the message has calls or reasoning."""
    content = value.get("content")
    if isinstance(content, list):
        content = _join_parts(content, where)
    if content is None:
        if has_more:
            return ""
        if "content" not in value:
            others = ", ".join(str(key) for key in value if key != "role") or "nothing else"
            raise RowError(f'{where} has no "content"; found {others}', "content")
        raise RowError(f"{where}: content is null; expected text", "content")
    content = check_text(content, f"{where}: content")
    if not content.strip() and not has_more and value["role"] in ("user", "assistant"):
        raise RowError(f"{where}: content is empty; expected text", "empty")
    return content


def _take_thinking(value: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """Return the text of an answer's thinking parts, and the message without them."""
    thought, rest = [], []
    for part in value["content"]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in THINKING_PARTS:
            rest.append(part)
            continue
        inner = next((part[key] for key in (kind, "text", "value", "content") if key in part), None)
        if isinstance(inner, list):
            inner = _join_parts(inner, where)
        thought.append(check_text(inner, f"{where}: the text of a {kind} part"))
    return "".join(thought), {**value, "content": rest or None}


def _join_parts(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        is_text = isinstance(part, Mapping) and part.get("type", "text") in TEXT_PARTS
        text = part.get("text", part.get("value")) if is_text else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise RowError(
                f"{where}: content holds a {shorten(kind)} part; expected text parts only",
                "content",
            )
        texts.append(text)
    return "".join(texts)
