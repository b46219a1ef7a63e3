"""Finding suite items among train passages: the same text, nearly the same, or shared words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtune.evaluation.tasks.base import SuiteItem

LONG_NGRAM = 13
SHORT_NGRAM = 8
"""GPT-3's rule takes 8 to 13 words by the set's lengths (Brown et al. 2020, appendix C)."""
COMMON_ROWS = 10
COMMON_SHARE = 0.01
"""A word sequence in more than 10 and 1 % of the train rows is boilerplate."""
_WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class Passage:
    """A train text with its row's number."""

    row: int
    text: str
    own: str


@dataclass(frozen=True)
class AskedItem:
    """An item of a suite, and its text without the frame that all of the suite's items share."""

    suite: str
    item: SuiteItem
    own: str


def text_of(item: SuiteItem) -> str:
    """Return what an item asks, or its passage."""
    return item.prompt or item.text


def find_exact(asked: Sequence[AskedItem], passages: Sequence[Passage]) -> dict[int, int]:
    """Return for each item that is a train passage the first such row."""
    from llmtune.evaluation.diagnosis.rows import MIN_OWN_WORDS

    whole = _first_rows((normalize(passage.text), passage.row) for passage in passages)
    telling = _first_rows(
        (normalize(passage.own), passage.row)
        for passage in passages
        if len(passage.own.split()) >= MIN_OWN_WORDS
    )
    found = {}
    for place, each in enumerate(asked):
        row = whole.get(normalize(text_of(each.item)))
        if row is None and len(each.own.split()) >= MIN_OWN_WORDS:
            row = telling.get(normalize(each.own))
        if row is not None:
            found[place] = row
    return found


def _first_rows(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for text, row in pairs:
        rows.setdefault(text, row)
    return rows


def find_near(own: Sequence[str], passages: Sequence[Passage]) -> dict[int, tuple[int, float]]:
    """Return for each item nearly the same as a train passage that row, and how similar."""
    from llmtune.data.duplicates import find_near_matches

    train = [normalize(passage.own) for passage in passages]
    pairs = find_near_matches(train, [normalize(text) for text in own])
    return {pair.second: (passages[pair.first].row, round(pair.similarity, 4)) for pair in pairs}


def find_ngrams(
    own: Sequence[str], passages: Sequence[Passage], num_rows: int
) -> dict[int, tuple[int, str]]:
    """Return for each item with a word sequence of a train row that row and the words."""
    places: dict[tuple[str, ...], list[int]] = {}
    for place, text in enumerate(own):
        words = _split_words(text)
        size = LONG_NGRAM if len(words) >= LONG_NGRAM else SHORT_NGRAM
        for gram in _windows(words, size):
            places.setdefault(gram, []).append(place)
    sizes = sorted({len(gram) for gram in places})
    first_row: dict[tuple[str, ...], int] = {}
    rows_of: dict[tuple[str, ...], set[int]] = {}
    for passage in passages:
        words = _split_words(passage.own)
        for size in sizes:
            for gram in _windows(words, size):
                if gram in places:
                    first_row.setdefault(gram, passage.row)
                    rows_of.setdefault(gram, set()).add(passage.row)
    limit = max(COMMON_ROWS, int(COMMON_SHARE * num_rows))
    found: dict[int, tuple[int, str]] = {}
    for gram, row in first_row.items():
        if len(rows_of[gram]) <= limit:
            for place in places[gram]:
                found.setdefault(place, (row, " ".join(gram)))
    return found


def _windows(words: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    return [words[start : start + size] for start in range(len(words) - size + 1)]


def _split_words(text: str) -> tuple[str, ...]:
    return tuple(_WORDS.findall(normalize(text)))


def normalize(text: str) -> str:
    """Return a text without case, outer and double spaces, and forms of one character."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
