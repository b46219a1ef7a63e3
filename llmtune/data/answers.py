"""Where the answer is in a turn as the template renders it, and what ends it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmtune.data.context import call_texts, compact, json_forms
from llmtune.data.conversation import Message
from llmtune.data.problems import RowError, shorten
from llmtune.models.turns import TurnEnding


@dataclass(frozen=True)
class TextSpan:
    """Characters `start` to `end` of a text are trained; the last token begins at `terminator`."""

    start: int
    terminator: int
    end: int


@dataclass(frozen=True)
class Turn:
    """A trained assistant turn of a row and how the template renders it."""

    index: int
    weight: float
    prompt: str
    """The chat before the turn, with the generation prompt: what the model is given."""
    upto: str
    """The chat up to and with the turn, as its last."""


class PromptDiffersError(RowError):
    """The template does not write a turn behind its own generation prompt."""


ContentSpan = tuple[int, int, TextSpan | None]
"""Start of the trained text, end of the content, and the whole span where the turn is closed."""


def find_span(
    turn: Turn, message: Message, ending: TurnEnding, specials: re.Pattern[str]
) -> tuple[ContentSpan, bool]:
    """Return where the turn's trained text is in `turn.upto`, and whether spaces were stripped.

    Raises:
        PromptDiffersError: the template writes the turn behind a different prompt.
        RowError: the answer is not there as given, or nothing ends it.
    """
    if not turn.upto.startswith(turn.prompt):
        raise PromptDiffersError(
            f"message {turn.index + 1}: the template's generation prompt is not what it writes "
            f"before this answer ({_difference(turn.prompt, turn.upto)})",
            "template",
        )
    start = len(turn.prompt)
    begin, content_end, has_stripped = find_content(turn, message, ending, start)
    if opens_turn(turn.upto[start:content_end], ending):
        raise PromptDiffersError(
            f"message {turn.index + 1}: the template opens a turn after its generation prompt",
            "template",
        )
    if begin is not None:
        _check_lead(turn, message, ending, begin)
    closed = find_end(turn, message, ending, specials, content_end)
    if closed is not None:
        return (start, content_end, TextSpan(start, *closed)), has_stripped
    return (start, end_of_text(turn, message, content_end), None), has_stripped


def find_end(
    turn: Turn,
    message: Message,
    ending: TurnEnding,
    specials: re.Pattern[str],
    content_end: int,
) -> tuple[int, int] | None:
    """Return where the token is that ends the turn; None if the template writes none.

    Raises:
        RowError: nothing ends the turn, or something is written before its end.
    """
    closing = specials.search(turn.upto, content_end)
    if message.get("tool_calls"):  # calls have control tokens of their own inside the turn
        stops = re.compile("|".join(map(re.escape, ending.stop_texts)))
        closing = stops.search(turn.upto, content_end)
    elif ending.kind != "closed":
        closing = None
    if closing is None:
        if ending.kind == "closed":
            raise RowError(f"message {turn.index + 1}: nothing ends this answer", "stop-token")
        return None
    gap = turn.upto[content_end : closing.start()]
    if gap.strip() and not message.get("tool_calls"):
        raise RowError(
            f"message {turn.index + 1}: the template writes {shorten(gap)} between the answer and "
            "its end, which would be trained",
            "template",
        )
    return closing.start(), closing.end()


def end_of_text(turn: Turn, message: Message, content_end: int) -> int:
    """Return where an open turn's text ends: with calls, after all that closes the calls."""
    return len(turn.upto.rstrip()) if message.get("tool_calls") else content_end


def find_content(
    turn: Turn, message: Message, ending: TurnEnding, start: int
) -> tuple[int | None, int, bool]:
    """Return where the answer begins and ends from `start` on, and whether it lost outer spaces.

    Its beginning is None if only its end can be determined: calls, and text with other spaces.

    Raises:
        RowError: the template does not print the answer as given.
    """
    text, content = turn.upto, message["content"]
    body = content.strip()
    if message.get("tool_calls"):
        return None, _find_calls(turn, message, start), False
    if text.endswith(content + ending.tail) and len(text) - len(content + ending.tail) >= start:
        content_end, used = len(text) - len(ending.tail), content
    elif text.endswith(body + ending.tail):
        content_end, used = len(text) - len(ending.tail), body
    else:
        position = text.rfind(body, start)
        if position < 0:
            return None, _find_respaced(turn, content, ending, start), True
        content_end, used = position + len(body), body
    begin = content_end - len(used)
    if begin < start:
        raise PromptDiffersError(
            f"message {turn.index + 1}: the answer overlaps its prompt", "template"
        )
    return begin, content_end, used != content


def _find_respaced(turn: Turn, content: str, ending: TurnEnding, start: int) -> int:
    """Find an answer that the template prints with other spaces (a `<think>` block, mostly)."""
    content_end = len(turn.upto) - len(ending.tail)
    if turn.upto.endswith(ending.tail) and compact(turn.upto[start:content_end]).endswith(
        compact(content)
    ):
        return content_end
    raise RowError(
        f"message {turn.index + 1}: the template does not print this answer as given: "
        f"{shorten(turn.upto[start:])}",
        "template",
    )


def _find_calls(turn: Turn, message: Message, start: int) -> int:
    """Return the end of the last tool call's name and arguments in the rendered turn."""
    text, end = turn.upto, start
    content = message["content"].strip()
    reasoning = message.get("reasoning_content", "").strip()
    for part, what in ((reasoning, "reasoning"), (content, "content")):
        if part:
            position = text.find(part, end)
            if position < 0:
                raise RowError(
                    f"message {turn.index + 1}: the template does not print its {what}", "template"
                )
            end = position + len(part)
    for call in message["tool_calls"]:
        for part in call_texts(call["function"]):
            forms = {form: text.find(form, start) for form in json_forms(part)}
            ends = [place + len(form) for form, place in forms.items() if place >= 0]
            if not ends:
                raise RowError(
                    f"message {turn.index + 1}: the template does not print the tool call "
                    f"{call['function']['name']} ({shorten(part)} is missing); the model would "
                    "not learn it",
                    "template",
                )
            end = max(end, *ends)
    return end


def _check_lead(turn: Turn, message: Message, ending: TurnEnding, begin: int) -> None:
    """Check what the template writes between its prompt and the answer, which is trained."""
    lead = turn.upto[len(turn.prompt) : begin]
    reasoning = message.get("reasoning_content", "").strip()
    if reasoning:
        if compact(reasoning) not in compact(lead):
            raise RowError(
                f"message {turn.index + 1}: the template does not print this turn's "
                "reasoning_content; take it out, or put it into content",
                "template",
            )
        return
    if lead.strip() and lead != ending.lead:
        raise RowError(
            f"message {turn.index + 1}: the template writes {shorten(lead)} before this answer, "
            "which would be trained",
            "template",
        )


def opens_turn(text: str, ending: TurnEnding) -> bool:
    """Whether a text that would be trained begins with what opens an assistant's turn."""
    opening = ending.opening.strip()
    return bool(opening) and text.lstrip().startswith(opening)


def close_turn(
    text: str,
    start: int,
    content_end: int,
    span: TextSpan | None,
    ending: TurnEnding,
    *,
    has_calls: bool,
) -> tuple[str, TextSpan]:
    """Return `text` with a terminator after its content, and the span that is trained."""
    if span is not None:
        return text, span
    kept = text if ending.kind == "next-turn" else text[:content_end]
    if kept[content_end:].strip():
        raise RowError("the template writes text after the answer that nothing ends", "template")
    terminator = ending.call_terminator if has_calls else ending.terminator
    end = len(kept) + len(terminator)
    return kept + terminator, TextSpan(start, len(kept), end)


def _difference(prompt: str, upto: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, upto, strict=False)) if a != b),
        min(len(prompt), len(upto)),
    )
    return f"{shorten(prompt[same:], 40)} is not {shorten(upto[same : same + 30], 40)}"
