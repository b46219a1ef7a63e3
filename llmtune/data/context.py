"""Does the template print all that a chat holds? What it leaves out, the model never sees."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llmtune.data.problems import RowError, shorten
from llmtune.data.render import render_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.data.conversation import Conversation, Message

TELLING_CHARACTERS = 24
"""A text this long is not in a second one by chance."""
MAX_KNOWN = 4096

Shape = tuple[tuple[tuple[str, tuple[bool, ...]], ...], bool, bool]
"""Of each message its role and what it has beside it; whether there are tools, and a prompt."""
Place = int | tuple[int, str] | Literal["tools"]
"""What a mark stood for: a message's content, its reasoning, or the tools."""


class ContextGuard:
    """Refuses rows of which the template leaves something out.

    A long text is looked for in what was rendered. A short one ("yes") may stand there by chance,
    so marks are rendered in the place of the contents, once for each sequence of roles.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._unprinted: dict[Shape, set[Place]] = {}

    def check(self, text: str, row: Conversation, before: int | None = None) -> None:
        """Refuse `row` where `text`, rendered from its messages up to `before`, lacks something.

        Assistant turns are not looked at: what is trained of them is checked by itself.

        Raises:
            RowError: which message or tool is not printed.
        """
        rendered = row.messages if before is None else row.messages[: before + 1]
        self._check(text, row, row.messages[:before], rendered)

    def _check(
        self,
        text: str,
        row: Conversation,
        messages: list[Message],
        rendered: list[Message],
        *,
        is_prompt: bool = False,
    ) -> None:
        given = [i for i, m in enumerate(messages) if m["role"] != "assistant"]
        for index in given:
            if not _holds(text, messages[index]["content"].strip()):
                raise _not_printed(messages[index], index)
        short = [i for i in given if len(messages[i]["content"].strip()) < TELLING_CHARACTERS]
        if not short and not row.tools:
            return
        unprinted = self._find_unprinted(rendered, row.tools, is_prompt=is_prompt)
        for index in short:
            if index in unprinted:
                raise _not_printed(messages[index], index)
        for tool in row.tools or []:
            name = tool.get("function", tool)["name"]
            if name not in text or "tools" in unprinted:
                raise RowError(
                    f"tools: the chat template does not print the tool {name!r}; the model would "
                    "learn to call what it was never shown",
                    "template",
                )

    def check_prompt(self, prompt: str, row: Conversation, before: int) -> None:
        """Refuse `row` where `prompt`, what the turn `before` is asked with, lacks something.

        Raises:
            RowError: which message or tool is not printed.
        """
        self._check(prompt, row, row.messages[:before], row.messages[:before], is_prompt=True)

    def check_all(self, text: str, row: Conversation) -> None:
        """Refuse `row` where `text` lacks anything, the assistant's turns included.

        Raises:
            RowError: which message, tool, reasoning or call is not printed.
        """
        self.check(text, row)
        unprinted = self._find_unprinted(row.messages, row.tools)
        for index, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            reasoning = message.get("reasoning_content", "")
            calls = [call["function"] for call in message.get("tool_calls", [])]
            if index in unprinted or not _holds(text, message["content"].strip()):
                raise _not_printed(message, index)
            if (index, "reasoning") in unprinted or compact(reasoning) not in compact(text):
                raise RowError(
                    f"message {index + 1}: the template leaves out this turn's reasoning; with "
                    "loss_on: assistant each turn is an example of its own, reasoning included",
                    "template",
                )
            for part in (part for call in calls for part in call_texts(call)):
                if not _holds(text, part):
                    raise RowError(
                        f"message {index + 1}: the template does not print the tool call "
                        f"({shorten(part)} is missing)",
                        "template",
                    )

    def _find_unprinted(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        is_prompt: bool = False,
    ) -> set[Place]:
        """Return the places whose marks the template does not print."""
        parts = ("content", "reasoning_content", "tool_calls")
        roles = tuple((m["role"], tuple(bool(m.get(key)) for key in parts)) for m in messages)
        shape = (roles, bool(tools), is_prompt)
        if shape not in self._unprinted:
            if len(self._unprinted) >= MAX_KNOWN:
                self._unprinted.clear()
            self._unprinted[shape] = self._render_marks(messages, tools, is_prompt=is_prompt)
        return self._unprinted[shape]

    def _render_marks(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        is_prompt: bool,
    ) -> set[Place]:
        marked, places = [], list[Place]()
        for index, message in enumerate(messages):
            keys: dict[str, Place] = {"content": index, "reasoning_content": (index, "reasoning")}
            wanted = {key: place for key, place in keys.items() if message.get(key)}
            marked.append({**message, **{key: _mark(place) for key, place in wanted.items()}})
            places += wanted.values()
        marked_tools = [_rename(tool, _mark("tools")) for tool in tools or []]
        if marked_tools:
            places.append("tools")
        try:
            text = render_text(
                self._tokenizer, marked, tools=marked_tools or None, add_generation_prompt=is_prompt
            )
        except RowError:
            return set()  # a template that reads contents; the row itself was rendered
        return {place for place in places if not _holds(text, _mark(place))}


def compact(text: str) -> str:
    """Return `text` without any space or line break."""
    return "".join(text.split())


def call_texts(function: Mapping[str, Any]) -> Iterator[str]:
    """Yield the name, every key and every text in the arguments of a tool call."""
    yield function["name"]
    yield from _leaves(function["arguments"])


def json_forms(text: str) -> tuple[str, str, str]:
    """Return the forms in which a template may print a text: as it is, or inside JSON."""
    return text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str) and value:
        yield value


def _rename(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a tool's schema with a different name and everything else as it is."""
    if "function" in tool:
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}


def _mark(place: Place) -> str:
    name = "-".join(map(str, place)) if isinstance(place, tuple) else place
    return f"\ue000{name}\ue001"


def _holds(text: str, part: str) -> bool:
    return part in text or any(form in text for form in json_forms(part))


def _not_printed(message: Message, index: int) -> RowError:
    return RowError(
        f"message {index + 1} ({message['role']}): the template does not print its content as "
        "given; the model would not see it",
        "template",
    )
