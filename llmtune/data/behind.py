"""Training behind the generation prompt where the template writes something else there.

A reasoning model's generation prompt opens (or closes) a block of thinking that the template does
not write into a finished turn; other templates put a system message into the last user turn only.
What is trained is then the generation prompt, exactly as generation will see it, and behind it what
the template itself writes of the turn: its reasoning, its answer or calls, and its end.
"""

from __future__ import annotations

import re

from llmtune.data.answers import (
    TextSpan,
    Turn,
    close_turn,
    end_of_text,
    find_content,
    find_end,
    opens_turn,
)
from llmtune.data.context import compact
from llmtune.data.conversation import Message
from llmtune.data.problems import RowError, shorten
from llmtune.models.thinking import THINKING, Thinking, read_thinking, split_thinking
from llmtune.models.turns import TurnEnding


def find_behind(
    turn: Turn, message: Message, ending: TurnEnding, specials: re.Pattern[str]
) -> tuple[str, TextSpan]:
    """Return the prompt with the turn behind it, and the span of it that is trained.

    Raises:
        RowError: why the turn cannot stand behind the prompt.
    """
    message = split_thinking(message)
    start = _find_start(turn, ending)
    printed = message
    if message.get("reasoning_content", "").strip() not in turn.upto:  # a template that drops it
        printed = {**message, "reasoning_content": ""}
    begin, content_end, _ = find_content(turn, printed, ending, start)
    closed = find_end(turn, message, ending, specials, content_end)
    span = None if closed is None else TextSpan(start, *closed)
    has_calls = "tool_calls" in message
    if span is None:
        content_end = end_of_text(turn, message, content_end)
    upto, span = close_turn(turn.upto, start, content_end, span, ending, has_calls=has_calls)
    body, end = upto[start : span.terminator], upto[span.terminator : span.end]
    if begin is not None and not message.get("reasoning_content"):
        _check_written(upto[start:begin], ending, turn.index)
    trained = _join_thinking(read_thinking(turn.prompt), body, message, turn.index)
    wanted = [message.get("reasoning_content", ""), message["content"]]
    if opens_turn(trained, ending) or not all(compact(t) in compact(trained) for t in wanted):
        raise _refuse(turn.index, f"the template writes {shorten(body)}")
    first, last = len(turn.prompt), len(turn.prompt) + len(trained)
    return turn.prompt + trained + end, TextSpan(first, last, last + len(end))


def _find_start(turn: Turn, ending: TurnEnding) -> int:
    """Return where the turn's own text begins: after what opens it, else after its prompt's end."""
    opening = ending.opening
    if not opening.strip():
        marks = list(ending.controls.finditer(turn.prompt))
        opening = turn.prompt[marks[-1].start() :] if marks else ""
    elif not ending.controls.search(opening):
        opening = ""  # plain words, which a text may hold too
    position = turn.upto.rfind(opening) if opening else -1
    if position < 0:
        raise _refuse(turn.index, "where the turn begins cannot be determined")
    return position + len(opening)


def _check_written(written: str, ending: TurnEnding, index: int) -> None:
    if THINKING.sub("", written).strip() and written != ending.written_lead:
        raise _refuse(index, f"the template writes {shorten(written)} before the answer")


def _join_thinking(thinking: Thinking, body: str, message: Message, index: int) -> str:
    """Return what is generated behind a prompt that may have opened or closed the thinking."""
    reasoning: str = message.get("reasoning_content", "").strip()
    position = body.find(reasoning) if reasoning else -1
    if thinking.state == "none":
        return body
    if thinking.state == "closed":
        if reasoning:
            raise _refuse(
                index,
                "the prompt closes the block of thinking, so this turn's reasoning_content can "
                "never be generated; take it out",
            )
        return thinking.without_block(body)
    if position >= 0:
        return body[position:]
    if not reasoning:
        closing = thinking.find_closing(body)
        if closing is not None:
            return body[closing:]
    return reasoning + thinking.closing + thinking.without_block(body).lstrip()


def _refuse(index: int, reason: str) -> RowError:
    return RowError(
        f"message {index + 1}: the template's generation prompt is not what it writes before this "
        f"answer, and the answer cannot be put behind that prompt: {reason}",
        "template",
    )
