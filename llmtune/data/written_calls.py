"""Tool calls read back from what a model writes, in the form in which its template writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.data.problems import RowError
from llmtune.data.render import render_text
from llmtune.data.row_values import DECODER
from llmtune.data.tools import read_tool_calls
from llmtune.errors import LlmtuneError
from llmtune.models.chat_template import asked_once
from llmtune.models.thinking import THINKING
from llmtune.models.turns import CALL, QUESTION, TOOL, find_turn_ending, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FRAME = re.compile(rf"(?:(?!{THINKING.pattern})(?:\[/?[A-Z_]+\]|</?[^<>\s{{}}]+>|[\s\[\],;]))*")
"""What a template may write around and between calls that are JSON objects."""
MARK = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\])[\s\[]*\Z")


@dataclass(frozen=True)
class WrittenCall:
    """One call: the tool's name and its arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CallForm:
    """Calls are JSON objects with the name and the arguments under these keys, behind a mark."""

    mark: str
    """What comes before the first call; empty: the object is all that the answer holds."""
    name_key: str
    arguments_key: str

    def read(
        self, text: str, names: Sequence[str] | None = None
    ) -> tuple[str, tuple[WrittenCall, ...]]:
        """Return an answer's text and its calls; one that cannot be read is all text.

        Args:
            names: the tools that there are, which decide whether an object without a mark is a
                call; None: any.
        """
        thought = max((found.end() for found in THINKING.finditer(text)), default=0)
        starts = [thought]
        if self.mark:  # an argument may hold a mark of thinking, and a thought may mention this one
            starts = [text.find(self.mark), text.find(self.mark, thought)]
        for start in starts:
            calls = self._read_all(text[start:]) if start >= 0 else ()
            if calls and (names is None or self.mark or all(call.name in names for call in calls)):
                return text[:start].rstrip(), calls
        return text, ()

    def _read_all(self, text: str) -> tuple[WrittenCall, ...]:
        """Return the calls if the text holds nothing else."""
        found, position = [], _behind_frame(text, 0)
        while position < len(text):
            try:
                value, end = DECODER.raw_decode(text, position)
            except (ValueError, RecursionError):
                return ()
            call = self._read_one(value)
            if call is None:
                return ()
            found.append(call)
            position = _behind_frame(text, end)
        return tuple(found)

    def _read_one(self, value: Any) -> WrittenCall | None:
        if not isinstance(value, Mapping):
            return None
        name, arguments = value.get(self.name_key), value.get(self.arguments_key)
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            return None
        try:
            read_tool_calls([{"function": {"name": name, "arguments": arguments}}], "")
        except RowError:
            return None  # infinity, half a character, nesting without end: it could not be sent
        return WrittenCall(name, arguments)


def _behind_frame(text: str, position: int) -> int:
    found = FRAME.match(text, position)
    return found.end() if found else position


@asked_once
def find_call_form(tokenizer: PreTrainedTokenizerFast) -> CallForm | None:
    """Return how the tokenizer's template writes calls; None if they are not read back here.

    A known call is rendered, and the form is taken only if it reads that call from what the
    template wrote.
    """
    asked: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    try:
        prompt = render_text(tokenizer, asked, tools=[TOOL], add_generation_prompt=True)
        text = render_text(tokenizer, [*asked, calling], tools=[TOOL])
        stops = find_turn_ending(tokenizer).stop_texts
    except (RowError, LlmtuneError):
        return None
    # neither a mark that the prompt ends with nor one that the call begins with is cut in two
    turn = text[min(shared_length(tokenizer, *pair) for pair in ((prompt, text), (text, prompt))) :]
    for start in (found.start() for found in re.finditer("{", turn)):
        try:
            value, end = DECODER.raw_decode(turn, start)
        except ValueError:
            continue
        form = _form_of(value, turn[:start])
        if form is None:
            continue
        rest = turn[end:]
        ends = [place for stop in stops if (place := rest.find(stop)) >= 0]
        wanted = WrittenCall(**CALL["function"])  # type: ignore[arg-type]
        written = turn[: end + min(ends, default=len(rest))]
        return form if form.read(written)[1] == (wanted,) else None
    return None


def _form_of(value: Any, before: str) -> CallForm | None:
    """Return the form of the known call, if it is this object, behind this text."""
    assert isinstance(CALL["function"], dict)
    function = CALL["function"]
    keys = {}
    for part in ("name", "arguments"):
        at = [key for key, held in value.items() if held == function[part]]
        if len(at) != 1:
            return None
        keys[part] = at[0]
    mark = MARK.search(before)
    if mark is not None and THINKING.fullmatch(mark.group(1)) is None:
        return CallForm(mark.group(1), keys["name"], keys["arguments"])
    is_bare = not THINKING.sub("", before).strip(" \n[")
    return CallForm("", keys["name"], keys["arguments"]) if is_bare else None
