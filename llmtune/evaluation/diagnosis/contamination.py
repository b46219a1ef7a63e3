"""Train rows found again among the suites' items: such an item measures memory, not the task."""

import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from llmtune.data.duplicates import find_near_matches
from llmtune.evaluation.diagnosis.plan import Diagnosis
from llmtune.evaluation.diagnosis.results import (
    ContaminatedItem,
    ContaminationResult,
    SuiteContamination,
)
from llmtune.evaluation.diagnosis.rows import MIN_OWN_WORDS, RowTexts, find_frame
from llmtune.evaluation.tasks.base import Suite, SuiteItem
from llmtune.io.fingerprint import hash_json

LONG_NGRAM = 13
SHORT_NGRAM = 8
"""GPT-3's rule takes 8 to 13 words by the set's lengths (Brown et al. 2020, appendix C)."""
COMMON_ROWS = 10
COMMON_SHARE = 0.01
"""A word sequence in more than 10 and 1 % of the train rows is boilerplate."""
KEPT_EXAMPLES = 20

_WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class _Passage:
    """A train text with its row's number."""

    row: int
    text: str
    own: str


@dataclass(frozen=True)
class _Asked:
    """An item of a suite, and its text without the frame that all of the suite's items share."""

    suite: str
    item: SuiteItem
    own: str


def measure_contamination(rows: Sequence[RowTexts], suites: Sequence[Suite]) -> ContaminationResult:
    """Look for every suite item among the train rows.

    An item is `exact` where its text equals a train passage (case, spaces and Unicode forms
    aside), with or without the frame that all items (all rows of a source) share, as long as five
    words are left; `near` where MinHash finds a Jaccard index of 9-byte shingles of at least 0.8;
    `ngram` where 13 words in a row of it (8 for items of 8 to 12 words) stand in a train row.
    Shorter items can only be exact or near. The answer is not compared.

    Args:
        rows: of the train split, as `read_row_texts` gives them.
    """
    started = time.perf_counter()
    passages = [
        _Passage(number, text, own)
        for number, row in enumerate(rows)
        for text, own in zip(row.passages, row.own, strict=True)
    ]
    asked = [_Asked(suite.name, item, own) for suite in suites for item, own in _own_texts(suite)]
    own = [each.own for each in asked]
    exact = _find_exact(asked, passages)
    near = _find_near(own, passages)
    shared = _find_ngrams(own, passages, len(rows))
    found: dict[str, list[ContaminatedItem]] = {suite.name: [] for suite in suites}
    for place, each in enumerate(asked):
        if place in exact:
            kind, row, similarity, words = "exact", exact[place], None, None
        elif place in near:
            (row, similarity), kind, words = near[place], "near", None
        elif place in shared:
            (row, words), kind, similarity = shared[place], "ngram", None
        else:
            continue
        entry = ContaminatedItem(each.item.id, kind, rows[row].place, similarity, words)
        found[each.suite].append(entry)
    return ContaminationResult(
        inputs=contamination_inputs(rows, suites),
        seconds=time.perf_counter() - started,
        suites={suite.name: _count(found[suite.name], len(suite.items)) for suite in suites},
        n_train_rows=len(rows),
    )


def plan_contamination(
    rows: Sequence[RowTexts], suites: Sequence[Suite]
) -> Diagnosis[ContaminationResult]:
    """Plan to look for every suite item among the train rows; no model is needed."""
    return Diagnosis(
        ContaminationResult,
        contamination_inputs(rows, suites),
        0,
        partial(measure_contamination, rows, suites),
    )


def find_leaked(rows: Iterable[RowTexts], suites: Sequence[Suite]) -> dict[str, dict[str, str]]:
    """Return by suite which items are word for word a passage of a row, and the first such row.

    What can be said before training, row by row as they are read; `measure_contamination` also
    looks behind frames and for what is nearly the same.
    """
    asked: dict[str, list[tuple[str, str]]] = {}
    for suite in suites:
        for item in suite.items:
            asked.setdefault(_normalize(_text_of(item)), []).append((suite.name, item.id))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        for passage in row.passages:
            for name, item_id in asked.get(_normalize(passage), ()):
                found.setdefault(name, {}).setdefault(item_id, row.place)
    return found


def contamination_inputs(rows: Sequence[RowTexts], suites: Sequence[Suite]) -> dict[str, str]:
    """Return what the result depends on."""
    return {
        "rows": hash_json(sorted(row.key.hex() for row in rows)),
        "items": hash_json({suite.name: suite.items_fingerprint for suite in suites}),
    }


def _own_texts(suite: Suite) -> Iterable[tuple[SuiteItem, str]]:
    frame = find_frame([_text_of(item) for item in suite.items])
    return ((item, frame.own_words(_text_of(item))) for item in suite.items)


def _count(found: Sequence[ContaminatedItem], n: int) -> SuiteContamination:
    kinds = Counter(each.kind for each in found)
    return SuiteContamination(
        exact=kinds["exact"],
        ngram=kinds["ngram"],
        near=kinds["near"],
        n=n,
        item_ids=tuple(each.item_id for each in found),
        found=tuple(found[:KEPT_EXAMPLES]),
    )


def _text_of(item: SuiteItem) -> str:
    return item.prompt or item.text


def _find_exact(asked: Sequence[_Asked], passages: Sequence[_Passage]) -> dict[int, int]:
    """Return for each item that is a train passage the first such row."""
    whole = _first_rows((_normalize(passage.text), passage.row) for passage in passages)
    telling = _first_rows(
        (_normalize(passage.own), passage.row)
        for passage in passages
        if len(passage.own.split()) >= MIN_OWN_WORDS
    )
    found = {}
    for place, each in enumerate(asked):
        row = whole.get(_normalize(_text_of(each.item)))
        if row is None and len(each.own.split()) >= MIN_OWN_WORDS:
            row = telling.get(_normalize(each.own))
        if row is not None:
            found[place] = row
    return found


def _first_rows(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for text, row in pairs:
        rows.setdefault(text, row)
    return rows


def _find_near(own: Sequence[str], passages: Sequence[_Passage]) -> dict[int, tuple[int, float]]:
    train = [_normalize(passage.own) for passage in passages]
    pairs = find_near_matches(train, [_normalize(text) for text in own])
    return {pair.second: (passages[pair.first].row, round(pair.similarity, 4)) for pair in pairs}


def _find_ngrams(
    own: Sequence[str], passages: Sequence[_Passage], num_rows: int
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
    return tuple(_WORDS.findall(_normalize(text)))


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
