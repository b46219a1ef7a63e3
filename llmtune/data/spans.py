"""Which characters of a rendered chat are trained: incremental rendering, strictly checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmtune.data.context import ContextGuard, call_texts, compact, json_forms
from llmtune.data.conversation import Conversation, Message
from llmtune.data.problems import RowError, shorten
from llmtune.models.turns import TurnEnding


@dataclass(frozen=True)
class TextSpan:
    """Characters `start` to `end` of a text are trained; the last token begins at `terminator`."""

    start: int
    terminator: int
    end: int


@dataclass(frozen=True)
class TextSample:
    """One text to tokenize, with the character spans that are trained."""

    text: str
    spans: tuple[TextSpan, ...]
    weight: float = 1.0
    is_all_trained: bool = False


@dataclass(frozen=True)
class Turn:
    """A trained assistant turn of a row and how the template renders it."""

    index: int
    weight: float
    prompt: str
    """The chat before the turn, with the generation prompt: what the model is given."""
    upto: str
    """The chat up to and with the turn, as its last."""


@dataclass(frozen=True)
class RowSamples:
    """What a row becomes, and what had to be done for it."""

    samples: tuple[TextSample, ...]
    notes: tuple[str, ...] = ()


NOTE_PER_TURN = "rendered as one example a turn, because the template changes earlier turns"
NOTE_NO_END = "rendered as one example a turn, each closed with the tokenizer's end of text"
NOTE_SPACES = "answers whose outer spaces the template strips"
NOTE_WEIGHTS = "rendered as one example a turn, because the turns' weights differ"


def trained_turns(conversation: Conversation, loss_on: str) -> list[tuple[int, float]]:
    """Return `(message index, weight)` of the assistant turns that are trained.

    A message's own `train` decides over `loss_on`; a `weight` of 0 is `train: false`.
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


def plan_samples(
    conversation: Conversation,
    full: str,
    turns: Sequence[Turn],
    ending: TurnEnding,
    specials: re.Pattern[str],
    guard: ContextGuard,
) -> RowSamples:
    """Return the samples of one chat: one where the template allows it, else one a turn.

    Raises:
        RowError: what is trained cannot be told exactly.
    """
    messages = conversation.messages
    notes: list[str] = []
    found = []
    for turn in turns:
        span, has_stripped = find_span(turn, messages[turn.index], ending, specials)
        found.append(span)
        if has_stripped:
            notes.append(NOTE_SPACES)
    together = None
    if ending.kind != "none" or len(turns) == 1:
        together = _spans_in_full(full, turns, found, ending, len(messages))
    has_one_weight = len({turn.weight for turn in turns}) == 1
    if together is not None and has_one_weight:
        text, spans = together
        guard.check(text, conversation)
        return RowSamples((TextSample(text, spans, turns[0].weight),), tuple(notes))
    reason = NOTE_NO_END if ending.kind == "none" else NOTE_PER_TURN
    notes.append(reason if together is None else NOTE_WEIGHTS)
    samples = []
    for turn, (start, content_end, closed) in zip(turns, found, strict=True):
        text, trained = _close(turn.upto, start, content_end, closed, ending)
        guard.check(text, conversation, turn.index)
        samples.append(TextSample(text, (trained,), turn.weight))
    return RowSamples(tuple(samples), tuple(dict.fromkeys(notes)))


ContentSpan = tuple[int, int, TextSpan | None]
"""Start of the trained text, end of the content, and the whole span where the turn is closed."""


def find_span(
    turn: Turn, message: Message, ending: TurnEnding, specials: re.Pattern[str]
) -> tuple[ContentSpan, bool]:
    """Return where the turn's trained text lies in `turn.upto`, and whether spaces were stripped.

    Raises:
        RowError: the prompt is not a prefix of the turn, or the answer is not there as given.
    """
    if not turn.upto.startswith(turn.prompt):
        raise RowError(
            f"message {turn.index + 1}: the template's generation prompt is not what it writes "
            f"before this answer ({_difference(turn.prompt, turn.upto)}); the model would be "
            "asked with another prompt than it was trained on",
            "template",
        )
    start = len(turn.prompt)
    content_end, has_stripped = _find_content(turn, message, ending, start)
    closing = specials.search(turn.upto, content_end)
    if message.get("tool_calls"):  # calls have control tokens of their own inside the turn
        stops = re.compile("|".join(map(re.escape, ending.stop_texts)))
        closing = stops.search(turn.upto, content_end)
    elif ending.kind != "closed":
        closing = None
    if closing is None:
        if ending.kind == "closed":
            raise RowError(f"message {turn.index + 1}: nothing ends this answer", "stop-token")
        return (start, content_end, None), has_stripped
    gap = turn.upto[content_end : closing.start()]
    if gap.strip() and not message.get("tool_calls"):
        raise RowError(
            f"message {turn.index + 1}: the template writes {shorten(gap)} between the answer and "
            "its end, which would be trained",
            "template",
        )
    return (start, content_end, TextSpan(start, closing.start(), closing.end())), has_stripped


def _find_content(turn: Turn, message: Message, ending: TurnEnding, start: int) -> tuple[int, bool]:
    text, content = turn.upto, message["content"]
    body = content.strip()
    reasoning = message.get("reasoning_content", "").strip()
    if message.get("tool_calls"):
        return _find_calls(turn, message, start), False
    if text.endswith(content + ending.tail) and len(text) - len(content + ending.tail) >= start:
        content_end, used = len(text) - len(ending.tail), content
    elif text.endswith(body + ending.tail):
        content_end, used = len(text) - len(ending.tail), body
    else:
        position = text.rfind(body, start)
        if position < 0:
            return _find_respaced(turn, content, ending, start), True
        content_end, used = position + len(body), body
    lead = text[start : content_end - len(used)]
    if content_end - len(used) < start:
        raise RowError(f"message {turn.index + 1}: the answer overlaps its prompt", "template")
    _check_lead(lead, reasoning, ending, turn.index)
    return content_end, used != content


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


def _check_lead(lead: str, reasoning: str, ending: TurnEnding, index: int) -> None:
    if reasoning:
        if compact(reasoning) not in compact(lead):
            raise RowError(
                f"message {index + 1}: the template does not print this turn's reasoning_content; "
                "take it out, or put it into content",
                "template",
            )
        return
    if lead.strip() and lead != ending.lead:
        raise RowError(
            f"message {index + 1}: the template writes {shorten(lead)} before this answer, which "
            "would be trained",
            "template",
        )


def _spans_in_full(
    full: str,
    turns: Sequence[Turn],
    found: Sequence[ContentSpan],
    ending: TurnEnding,
    num_messages: int,
) -> tuple[str, tuple[TextSpan, ...]] | None:
    """Return one text with all spans, or None where `full` shows a turn differently."""
    text = full
    spans: list[TextSpan] = []
    for turn, (start, content_end, span) in zip(turns, found, strict=True):
        if span is not None:
            if not full.startswith(turn.upto[: span.end]):
                return None
            spans.append(span)
            continue
        if not full.startswith(turn.upto[:content_end]):
            return None
        if turn.index == num_messages - 1 or ending.kind == "none":
            text, span = _close(full, start, content_end, None, ending)
        else:
            opening = _next_opening(full, start, content_end, ending)
            if opening is None:
                return None
            span = opening
        spans.append(span)
    return text, tuple(spans)


def _next_opening(full: str, start: int, content_end: int, ending: TurnEnding) -> TextSpan | None:
    rest = full[content_end:]
    position = content_end + len(rest) - len(rest.lstrip())
    for token in ending.stop_texts:
        if full.startswith(token, position):
            return TextSpan(start, position, position + len(token))
    return None


def _close(
    text: str, start: int, content_end: int, span: TextSpan | None, ending: TurnEnding
) -> tuple[str, TextSpan]:
    """Return `text` with a terminator after its content, and the span that is trained."""
    if span is not None:
        return text, span
    kept = text if ending.kind == "next-turn" else text[:content_end]
    if kept[content_end:].strip():
        raise RowError("the template writes text after the answer that nothing ends", "template")
    end = len(kept) + len(ending.terminator)
    return kept + ending.terminator, TextSpan(start, len(kept), end)


def _difference(prompt: str, upto: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, upto, strict=False)) if a != b),
        min(len(prompt), len(upto)),
    )
    return f"{shorten(prompt[same:], 40)} is not {shorten(upto[same : same + 30], 40)}"
