"""Which characters of a rendered chat are trained: incremental rendering, strictly checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmtune.data.answers import (
    ContentSpan,
    PromptDiffersError,
    TextSpan,
    Turn,
    close_turn,
    find_span,
)
from llmtune.data.behind import find_behind
from llmtune.data.context import ContextGuard
from llmtune.data.conversation import Conversation, Message
from llmtune.models.turns import TurnEnding


@dataclass(frozen=True)
class TextSample:
    """One text to tokenize, with the character spans that are trained."""

    text: str
    spans: tuple[TextSpan, ...]
    weight: float = 1.0
    is_all_trained: bool = False


@dataclass(frozen=True)
class RowSamples:
    """What a row becomes, and what had to be done for it."""

    samples: tuple[TextSample, ...]
    notes: tuple[str, ...] = ()


NOTE_PER_TURN = "rendered as one example a turn, because the template changes earlier turns"
NOTE_NO_END = "rendered as one example a turn, each closed with the tokenizer's end of text"
NOTE_BEHIND = (
    "trained behind the generation prompt, one example a turn, because the template writes "
    "something else before an answer"
)
NOTE_SPACES = "answers whose outer spaces the template strips"
NOTE_WEIGHTS = "rendered as one example a turn, because the turns' weights differ"


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
        RowError: what is trained cannot be determined exactly.
    """
    messages = conversation.messages
    notes: list[str] = []
    found: list[ContentSpan] = []
    behind: dict[int, TextSample] = {}
    for turn in turns:
        message = messages[turn.index]
        try:
            span, has_stripped = find_span(turn, message, ending, specials)
        except PromptDiffersError:
            text, trained = find_behind(turn, message, ending, specials)
            behind[turn.index] = TextSample(text, (trained,), turn.weight)
            span, has_stripped = (trained.start, trained.terminator, trained), False
        found.append(span)
        if has_stripped:
            notes.append(NOTE_SPACES)
    together = None
    if not behind and (ending.kind != "none" or len(turns) == 1):
        together = _spans_in_full(full, turns, found, ending, messages)
    has_one_weight = len({turn.weight for turn in turns}) == 1
    if together is not None and has_one_weight:
        text, spans = together
        guard.check(text, conversation)
        return RowSamples((TextSample(text, spans, turns[0].weight),), tuple(notes))
    if behind:
        notes.append(NOTE_BEHIND)
    elif ending.kind == "none":
        notes.append(NOTE_NO_END)
    else:
        notes.append(NOTE_WEIGHTS if together is not None else NOTE_PER_TURN)
    samples = []
    for turn, (start, content_end, closed) in zip(turns, found, strict=True):
        if turn.index in behind:
            sample = behind[turn.index]
            guard.check_prompt(turn.prompt, conversation, turn.index)
        else:
            text, trained = close_turn(
                turn.upto,
                start,
                content_end,
                closed,
                ending,
                has_calls="tool_calls" in messages[turn.index],
            )
            sample = TextSample(text, (trained,), turn.weight)
            guard.check(text, conversation, turn.index)
        samples.append(sample)
    return RowSamples(tuple(samples), tuple(dict.fromkeys(notes)))


def _spans_in_full(
    full: str,
    turns: Sequence[Turn],
    found: Sequence[ContentSpan],
    ending: TurnEnding,
    messages: Sequence[Message],
) -> tuple[str, tuple[TextSpan, ...]] | None:
    """Return one text with all spans, or None if `full` shows a turn differently."""
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
        if turn.index == len(messages) - 1 or ending.kind == "none":
            text, span = close_turn(
                full,
                start,
                content_end,
                None,
                ending,
                has_calls="tool_calls" in messages[turn.index],
            )
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
