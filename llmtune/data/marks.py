"""The control tokens of a text, found in the text and again among its ids."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.spans import TextSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Anchor:
    """The last control token before a trained span, and the text from there to the span.

    Control tokens cut a text into parts that are tokenized apart, so this text is the only part
    of the prompt whose ids the answer could change: comparing it compares the whole prompt.
    """

    token: int
    tail: str
    terminator: int | None
    """The control token that ends the span; None if the span's end is not a token of its own."""


MAX_COMPARED = 100_000


class ControlMarks:
    """Finds the tokens at the ends of character spans without the tokenizer's offsets.

    Offsets are a third of the cost of tokenizing. They are not needed where a text's control
    tokens and those among its ids are the same sequence: then the n-th of one is the n-th of the
    other. `is_exact` says whether this tokenizer takes control tokens out of the text as they
    stand, so that the sequence can be distinguished from the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        added = tokenizer.added_tokens_decoder
        self.texts = {token_id: token.content for token_id, token in added.items()}
        self.ids = {text: token_id for token_id, text in self.texts.items()}
        self.is_exact = _are_taken_as_they_stand(tokenizer)
        longest_first = sorted(self.ids, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._is_control = np.zeros(max([len(tokenizer), *self.texts]) + 1, dtype=bool)
        self._is_control[list(self.texts)] = True

    def places(self, ids: Sequence[list[int]]) -> list[list[int]]:
        """Return where the control tokens of each row of ids are."""
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        ends = np.cumsum(lengths)
        flat = np.fromiter(
            itertools.chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum())
        )
        found = np.flatnonzero(self._is_control[flat])
        edges = np.searchsorted(found, ends)
        counts = np.diff(edges, prepend=0)
        relative = (found - np.repeat(ends - lengths, counts)).tolist()
        starts = [0, *edges.tolist()]
        return [relative[start:end] for start, end in itertools.pairwise(starts)]

    def anchors(self, sample: TextSample, ids: list[int], places: list[int]) -> list[Anchor] | None:
        """Return the anchor of each span, or None if only offsets can tell."""
        if not sample.spans:
            return []
        text = sample.text
        marks = [(match.start(), match.group()) for match in self._pattern.finditer(text)]
        if [self.ids[mark] for _, mark in marks] != [ids[place] for place in places]:
            return None
        starts = [start for start, _ in marks]
        anchors = []
        for span in sample.spans:
            last = bisect_left(starts, span.terminator)
            before = bisect_left(starts, span.start) - 1
            if marks[last : last + 1] != [(span.terminator, text[span.terminator : span.end])]:
                return None
            if before < 0:
                anchors.append(Anchor(0, text[: span.start], places[last]))
                continue
            begin, mark = marks[before]
            if begin + len(mark) > span.start:
                return None  # the control token is across the edge
            anchors.append(Anchor(places[before], text[begin : span.start], places[last]))
        return anchors


def _are_taken_as_they_stand(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Say whether the longest control tokens, from left to right, are those of every text.

    The tokenizer looks for the tokens that are not normalized first, and for the others in what
    is left and normalized. That is one search where nothing is normalized and no token of one
    kind can overlap one of the other.
    """
    tokens = tokenizer.added_tokens_decoder.values()
    if any(token.single_word or token.lstrip for token in tokens):
        return False
    later = [token.content for token in tokens if token.normalized]
    first = [token.content for token in tokens if not token.normalized]
    if later and tokenizer.backend_tokenizer.normalizer is not None:
        return False
    if len(later) * len(first) > MAX_COMPARED:
        return False
    return not any(_can_overlap(one, other) for one in later for other in first)


def _can_overlap(one: str, other: str) -> bool:
    return (
        one in other
        or other in one
        or any(
            one.endswith(other[:size]) or other.endswith(one[:size])
            for size in range(1, min(len(one), len(other)))
        )
    )
