"""Where the turns of a chat lie, known from one rendering of its roles with placeholders."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from llmtune.data.answers import TextSpan
from llmtune.data.conversation import Conversation
from llmtune.data.problems import RowError
from llmtune.data.spans import RowSamples, TextSample

MAX_SKELETONS = 4096

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
        """Return the row's sample, or None where `full` is not what the skeleton says."""
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
        """Return the skeleton of a chat's roles, or None where the chat is not a plain one.

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
        messages = [
            {"role": role, "content": f"\ue000{index}\ue001"}
            | ({"train": index in trained} if role == "assistant" else {})
            for index, role in enumerate(roles)
        ]
        if len(set(trained.values())) != 1:
            return None
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
        spans, terminators = [], []
        for span in sample.spans:
            place = []
            for position in (span.start, span.terminator):
                passed = [match for match in found if match.end() <= position]
                place += [len(passed), position - sum(len(m.group()) for m in passed)]
            spans.append((place[0], place[1], place[2], place[3]))
            terminators.append(span.end - span.terminator)
        return Skeleton(literals, order, tuple(spans), tuple(terminators), sample.weight)
