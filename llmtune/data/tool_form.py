"""The form in which a chat template takes tools and calls, found by asking the template."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.models.chat_template import TEMPLATE_ERRORS, apply_chat_template, asked_once
from llmtune.models.turns import ANSWER, CALL, QUESTION, TOOL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
"""What the templates that look at a call's id accept (Mistral's)."""


@dataclass(frozen=True)
class ToolForm:
    """What one template takes: one form of calls prints them as JSON, others fail or lose them."""

    wraps_tools: bool = True
    """A schema is `{"type": "function", "function": {...}}`; else the inner object alone."""
    has_text_arguments: bool = False
    """A call's arguments are JSON text; else an object."""
    lacks_content: bool = False
    """A turn of calls alone has no content at all; else an empty text."""
    needs_ids: bool = False
    """Every call has an id of nine letters and digits, and its answer has the same."""

    def shape_tools(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a row's schemas as the template takes them."""
        inner = [dict(tool.get("function", tool)) for tool in tools]
        if not self.wraps_tools:
            return inner
        return [{"type": "function", "function": function} for function in inner]

    def shape_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return a chat with its calls as the template takes them."""
        shaped: list[Mapping[str, Any]] = []
        open_ids: deque[tuple[str | None, str]] = deque()
        for index, message in enumerate(messages):
            if message.get("tool_calls"):
                calls = [self._shape_call(call, index) for call in message["tool_calls"]]
                given = [call.get("id") for call in message["tool_calls"]]
                open_ids.extend(zip(given, (call.get("id", "") for call in calls), strict=True))
                message = {**message, "content": message.get("content") or "", "tool_calls": calls}
                if self.lacks_content and not message["content"]:
                    del message["content"]
            elif message.get("role") == "tool" and self.needs_ids and open_ids:
                wanted = message.get("tool_call_id")
                pair = next((p for p in open_ids if wanted is not None and p[0] == wanted), None)
                pair = pair or open_ids[0]
                open_ids.remove(pair)
                message = {**message, "tool_call_id": pair[1]}
            shaped.append(message)
        return shaped

    def _shape_call(self, call: Mapping[str, Any], index: int) -> dict[str, Any]:
        function = dict(call["function"])
        text = json.dumps(function["arguments"], ensure_ascii=False)
        if self.has_text_arguments and not isinstance(function["arguments"], str):
            function["arguments"] = text
        shaped = {**call, "function": function}
        if self.needs_ids and not SHORT_ID.fullmatch(str(call.get("id", ""))):
            name = f"{index} {call.get('id')} {function['name']} {text}"
            shaped["id"] = hashlib.blake2b(name.encode(), digest_size=5).hexdigest()[:9]
        return shaped


@asked_once
def find_tool_form(tokenizer: PreTrainedTokenizerFast) -> ToolForm:
    """Return the form of tools and calls that the tokenizer's template takes.

    A known tool and a known call are rendered in each form; the first that prints all of it
    is the template's. A template that prints none of them gets the usual form, and what it leaves
    out is refused where a row needs it.
    """
    wraps = next((w for w in (True, False) if _prints_tool(tokenizer, ToolForm(w))), True)
    for needs_ids, lacks, has_text in itertools.product((False, True), repeat=3):
        form = ToolForm(wraps, has_text, lacks, needs_ids)
        if _prints_call(tokenizer, form):
            return form
    return ToolForm(wraps)


def _prints_tool(tokenizer: PreTrainedTokenizerFast, form: ToolForm) -> bool:
    text = _render(tokenizer, [{"role": "user", "content": QUESTION}], form)
    function: Any = TOOL["function"]
    return all(part in text for part in (function["name"], function["description"]))


def _prints_call(tokenizer: PreTrainedTokenizerFast, form: ToolForm) -> bool:
    """Say whether a call and its answer are printed, with arguments that are JSON or one by one."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": QUESTION},
    ]
    texts = [_render(tokenizer, form.shape_messages(messages[:end]), form) for end in (2, 3)]
    function: Any = CALL["function"]
    arguments = function["arguments"]
    escaped = json.dumps(json.dumps(arguments))[1:-1]
    return all(
        ANSWER in text and str(arguments) not in text and escaped not in text for text in texts
    )


def _render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, Any]], form: ToolForm
) -> str:
    try:
        text: str = apply_chat_template(tokenizer, messages, tools=form.shape_tools([TOOL]))
    except TEMPLATE_ERRORS:
        return ""
    return text
