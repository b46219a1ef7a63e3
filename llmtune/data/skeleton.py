"""Where the turns of a chat lie, known from one rendering of its roles with placeholders."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from llmtune.data.answers import TextSpan
from llmtune.data.conversation import Conversation
from llmtune.data.problems import RowError
from llmtune.data.spans import RowSamples, TextSample

MAX_SKELETONS = 4096
CHECKED_TURNS = 64
"""Of a longer chat so many turns are rendered alone: the first, the last and some between. The
others must have the same text around them, so that the work grows with the chat, not its square."""

Signature = tuple[tuple[str, ...], tuple[tuple[int, float], ...]]
"""The roles of a chat, and which of its messages are trained with which weight."""

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Skeleton:
    """A chat's text without its contents: `literals[i]`, the content of `order[i]`, ..."""

    literals: tuple[str, ...]
    order: tuple[int, ...]
    spans: tuple[tuple[int, int, int, int], ...]
    """Of each trained span: contents before its start, literal characters before its start,
    contents before its terminator, literal characters before its terminator."""
    terminators: tuple[int, ...]
    """Length of each span's terminator."""
    weight: float

    def fill(self, contents: list[str], full: str) -> RowSamples | None:
        """Return the row's sample, or None if `full` is not what the skeleton says."""
        parts = [contents[index] for index in self.order]
        pieces: list[str] = [""] * (2 * len(parts) + 1)
        pieces[::2] = self.literals
        pieces[1::2] = parts
        if "".join(pieces) != full:
            return None
        before = [0, *itertools.accumulate(map(len, parts))]
        spans = tuple(
            TextSpan(
                before[start] + literal,
                before[last] + last_literal,
                before[last] + last_literal + length,
            )
            for (start, literal, last, last_literal), length in zip(
                self.spans, self.terminators, strict=True
            )
        )
        return RowSamples((TextSample(full, spans, self.weight),))


class SkeletonBook:
    """Skeletons by signature, made on first use by the careful way.

    Only for templates that `prints_contents_only` vouches for and that close each turn.
    """

    def __init__(self, plan: Callable[[Conversation], RowSamples | RowError]) -> None:
        self._plan = plan
        self._skeletons: dict[Signature, Skeleton | None] = {}

    def find(self, row: Conversation, turns: list[tuple[int, float]]) -> Skeleton | None:
        """Return the skeleton of a chat's roles, or None if the chat is not a plain one.

        Plain: no tools, calls or reasoning, and contents without outer spaces.
        """
        if row.tools is not None:
            return None
        for message in row.messages:
            content = message["content"]
            if len(message) != 2 or not content or content[0].isspace() or content[-1].isspace():
                return None
        signature = (tuple(message["role"] for message in row.messages), tuple(turns))
        if signature not in self._skeletons:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            self._skeletons[signature] = self._make(signature)
        return self._skeletons[signature]

    def _make(self, signature: Signature) -> Skeleton | None:
        roles, turns = signature
        trained = dict(turns)
        if len(set(trained.values())) != 1:
            return None
        checked = set(_spread(list(trained), CHECKED_TURNS))
        messages = [
            {"role": role, "content": f"\ue000{index}\ue001"}
            | ({"train": index in checked} if role == "assistant" else {})
            for index, role in enumerate(roles)
        ]
        planned = self._plan(Conversation("chat", messages, weight=turns[0][1]))
        if isinstance(planned, RowError) or planned.notes or len(planned.samples) != 1:
            return None
        (sample,) = planned.samples
        found = list(_PLACEHOLDER.finditer(sample.text))
        order = tuple(int(match.group(1)) for match in found)
        if sorted(order) != list(range(len(roles))):
            return None
        edges = [0, *(edge for match in found for edge in match.span()), len(sample.text)]
        literals = tuple(sample.text[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2))
        spans = _extend_spans(sample.spans, sorted(checked), sorted(trained), (found, literals))
        if spans is None:
            return None
        ends = [match.end() for match in found]
        lengths = [0, *itertools.accumulate(len(match.group()) for match in found)]

        def place(position: int) -> tuple[int, int]:
            passed = bisect_right(ends, position)
            return passed, position - lengths[passed]

        return Skeleton(
            literals,
            order,
            tuple((*place(span.start), *place(span.terminator)) for span in spans),
            tuple(span.end - span.terminator for span in spans),
            sample.weight,
        )


def _spread(turns: list[int], count: int) -> list[int]:
    """Return at most `count` turns: the first, the last and some between, evenly."""
    if len(turns) <= count:
        return turns
    quarter = count // 4
    middle = turns[quarter:-quarter]
    step = len(middle) / (count - 2 * quarter)
    chosen = [middle[int(number * step)] for number in range(count - 2 * quarter)]
    return [*turns[:quarter], *chosen, *turns[-quarter:]]


def _extend_spans(
    spans: tuple[TextSpan, ...],
    checked: list[int],
    trained: list[int],
    text: tuple[list[re.Match[str]], tuple[str, ...]],
) -> list[TextSpan] | None:
    """Return the spans of all `trained` turns from those of the `checked` ones.

    None if a turn has other text around it than every checked one has, or where two checked
    turns with the same text around them are trained differently.
    """
    if checked == trained:
        return list(spans)
    found, literals = text
    slots = {int(match.group(1)): slot for slot, match in enumerate(found)}
    known: dict[tuple[str, str], tuple[int, int, int]] = {}
    for index, span in zip(checked, spans, strict=True):
        slot = slots[index]
        offsets = (
            found[slot].start() - span.start,
            span.terminator - found[slot].end(),
            span.end - span.terminator,
        )
        if known.setdefault((literals[slot], literals[slot + 1]), offsets) != offsets:
            return None
    extended = []
    for index in trained:
        slot = slots[index]
        like = known.get((literals[slot], literals[slot + 1]))
        if like is None:
            return None
        terminator = found[slot].end() + like[1]
        extended.append(TextSpan(found[slot].start() - like[0], terminator, terminator + like[2]))
    return extended
