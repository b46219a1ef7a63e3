"""Near-duplicate rows by MinHash, and long word sequences that two sets share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmtune.io.progress import iter_with_bar

NUM_HASHES = 64
HASHED_AT_ONCE = 1024
"""Shingles of one text whose hashes exist at once."""
BAND_ROWS = 4
"""Signatures are cut into 16 bands of 4: a pair of similarity 0.8 is found with 99.98 %."""
SHINGLE_BYTES = 9
HASHED_WINDOWS = 1 << 16
"""Windows hashed at once: a long text then takes little more than its hashes."""
LISTED_CHARACTERS = 1 << 18
"""Of a longer text no list of all words is made."""
MIN_SIMILARITY = 0.8
MIN_SHINGLES = 24
COMMON_SHARE = 0.1
"""A shingle in more than this share of rows is boilerplate (a prompt's frame) and is left out."""
COMMON_MIN_ROWS = 20
TABLE_BITS = 22
NGRAM_WORDS = 13
MOST_WORDS = NGRAM_WORDS // 2
"""As in the GPT-3 paper's contamination study (Brown et al. 2020, appendix C)."""
FRAME_WORDS = 4

Words = tuple[str, ...]

_WORDS = re.compile(r"\w+")
_GOLDEN = 0x9E3779B97F4A7C15
_FNV = 0x100000001B3
_GENERATOR = np.random.default_rng(20240229)
_FACTORS = _GENERATOR.integers(1, 2**63, NUM_HASHES, dtype=np.uint64) * 2 + 1
_SHIFTS = _GENERATOR.integers(0, 2**63, NUM_HASHES, dtype=np.uint64)
_ROOM = np.empty(NUM_HASHES * HASHED_AT_ONCE, dtype=np.uint64)
"""For the hashes of one part of a text: new memory each time costs as much as they do."""


@dataclass(frozen=True)
class NearPair:
    """Two row numbers whose texts are nearly equal; `similarity` is their Jaccard index."""

    first: int
    second: int
    similarity: float


def find_near_duplicates(texts: Sequence[str]) -> list[NearPair]:
    """Return the pairs of nearly equal texts, each later row with the earliest one it resembles.

    Shingles are 9-byte windows of the text; those of boilerplate are not counted. Texts that are
    equal are found too. MinHash with banded LSH (Broder 1997; Leskovec et al., ch. 3). Texts are
    read one by one; 132 bytes a text are kept.
    """
    if len(texts) < 2:
        return []
    common = _common_shingles(texts)
    kept = np.zeros(len(texts), dtype=np.int32)
    bands = np.zeros((len(texts), NUM_HASHES // BAND_ROWS), dtype=np.uint64)
    count = 0
    for row, text in enumerate(iter_with_bar(texts, "near-duplicates", unit="texts")):
        values = _own_shingles(text, common)
        if len(values) >= MIN_SHINGLES:
            kept[count] = row
            bands[count] = _band_keys(values)
            count += 1
    best: dict[int, NearPair] = {}
    for one, other in sorted(_candidates(bands[:count])):
        first, second = int(kept[one]), int(kept[other])
        # Made again, not kept: a pair is rare, and all shingles take 50 times the text's memory.
        similarity = _jaccard(*(_own_shingles(texts[row], common) for row in (first, second)))
        known = best.get(second)
        if similarity >= MIN_SIMILARITY and (known is None or similarity > known.similarity):
            best[second] = NearPair(first, second, similarity)
    return [best[second] for second in sorted(best)]


def find_near_matches(train: Sequence[str], items: Sequence[str]) -> list[NearPair]:
    """Return for each of `items` that is nearly equal to a train text the one it resembles most.

    `first` numbers the train text and `second` the item. The same shingles, boilerplate rule and
    bands as `find_near_duplicates`; memory grows with the items only.
    """
    common = _common_shingles([*train, *items])
    buckets: dict[tuple[int, int], list[int]] = {}
    for place, text in enumerate(items):
        for band in _bands(_own_shingles(text, common)):
            buckets.setdefault(band, []).append(place)
    best: dict[int, NearPair] = {}
    for row, text in enumerate(train):
        values = _own_shingles(text, common)
        near = {place for band in _bands(values) for place in buckets.get(band, ())}
        for place in near:
            similarity = _jaccard(values, _own_shingles(items[place], common))
            known = best.get(place)
            if similarity >= MIN_SIMILARITY and (known is None or similarity > known.similarity):
                best[place] = NearPair(row, place, similarity)
    return [best[place] for place in sorted(best)]


def find_shared_ngrams(
    train: Sequence[str], evaluation: Sequence[str]
) -> list[tuple[int, int, str]]:
    """Return `(train row, evaluation row, words)` where 13 words in a row stand in both.

    Words in a row of four that stand in more than 1 % of the train rows (and more than 10) are
    boilerplate; 13 words that are mostly such do not count. One entry for each train row.
    """
    known, rows = _hash_evaluation(evaluation)
    hits: dict[int, list[Words]] = {}
    for row, text in enumerate(train if len(known) else ()):
        found = np.flatnonzero(_is_in(_window_hashes(text), known)).tolist()
        if found:
            words = _words(text)
            hits[row] = [words[start : start + NGRAM_WORDS] for start in found]
    wanted = {f for found in hits.values() for w in found for f in _windows(w, FRAME_WORDS)}
    frames = _count_frames(train, wanted)
    limit = max(10, len(train) // 100)
    shared = []
    for row, windows in hits.items():
        telling = [words for words in windows if _own_words(words, frames, limit) > MOST_WORDS]
        if telling:
            place = np.searchsorted(known, _window_hashes(" ".join(telling[0]))[0])
            shared.append((row, int(rows[place]), " ".join(telling[0])))
    return shared


def _hash_evaluation(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes uint64 [H] of all word sequences, rising, and the first row of each."""
    hashes, rows = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int32)]
    for row, text in enumerate(texts):
        hashes.append(_window_hashes(text))
        rows.append(np.full(len(hashes[-1]), row, dtype=np.int32))
    known, first = np.unique(np.concatenate(hashes), return_index=True)
    return known, np.concatenate(rows)[first]


def _words(text: str) -> Words:
    return tuple(_WORDS.findall(text))


def _window_hashes(text: str) -> np.ndarray:
    """Return a hash (uint64) of every 13 words in a row; no list is made of them all."""
    found: Iterable[int]
    if len(text) <= LISTED_CHARACTERS:
        found = map(hash, _WORDS.findall(text))
    else:
        found = (hash(word.group()) for word in _WORDS.finditer(text))
    return _hash_windows(np.fromiter(found, dtype=np.int64).view(np.uint64), NGRAM_WORDS, _GOLDEN)


def _hash_windows(values: np.ndarray, size: int, factor: int) -> np.ndarray:
    """Return a hash (uint64) of every `size` of `values` in a row: a polynomial in `factor`."""
    hashes = np.empty(max(len(values) - size + 1, 0), dtype=np.uint64)
    for start in range(0, len(hashes), HASHED_WINDOWS):
        part = hashes[start : start + HASHED_WINDOWS]
        piece = values[start : start + len(part) + size - 1]
        part[:] = _hash_piece(piece.astype(np.uint64, copy=False), size, factor)
    return hashes


def _hash_piece(values: np.ndarray, size: int, factor: int) -> np.ndarray:
    """Hash windows of 1, 2, 4, ... values and join them, from the highest bit of `size` down."""
    parts = {1: values}
    width = 1
    while 2 * width <= size:
        parts[2 * width] = _join_windows(parts[width], parts[width], width, width, factor)
        width *= 2
    hashes, done = parts.pop(width), width
    while done < size:
        width //= 2
        if done + width <= size:
            hashes = _join_windows(hashes, parts[width], done, width, factor)
            done += width
    return hashes


def _join_windows(
    left: np.ndarray, right: np.ndarray, start: int, width: int, factor: int
) -> np.ndarray:
    """Return the hashes of windows that go on with those of `width` values, `start` further on."""
    count = len(right) - start
    joined: np.ndarray = left[:count] * np.uint64(pow(factor, width, 1 << 64))
    joined += right[start:]
    return joined


def _is_in(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Say of each value whether it is in `known`, which rises."""
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    found: np.ndarray = known[places] == values
    return found


def _count_frames(texts: Iterable[str], wanted: set[Words]) -> Counter[Words]:
    """Return in how many texts each of the `wanted` word sequences is."""
    rows_of: Counter[Words] = Counter()
    if wanted:
        for text in texts:
            words = _words(text)
            rows_of.update(wanted.intersection(_windows(words, FRAME_WORDS)))
    return rows_of


def _own_words(words: Words, frames: Counter[Words], limit: int) -> int:
    """Return how many of `words` are in no frequent sequence of four."""
    framed = {
        start + offset
        for start, frame in enumerate(_windows(words, FRAME_WORDS))
        if frames[frame] > limit
        for offset in range(FRAME_WORDS)
    }
    return len(words) - len(framed)


def _shingle(text: str) -> np.ndarray:
    """Return the distinct hashes (uint64) of every window of the text's bytes."""
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    hashes = _hash_windows(data, SHINGLE_BYTES, _FNV)
    for start in range(0, len(hashes), HASHED_WINDOWS):
        part = hashes[start : start + HASHED_WINDOWS]
        part ^= part >> np.uint64(29)
        part *= np.uint64(0xBF58476D1CE4E5B9)
        part ^= part >> np.uint64(32)
    return _distinct(hashes)


def _distinct(values: np.ndarray) -> np.ndarray:
    """Return the sorted distinct values, sorting them in place.

    np.unique hashes, which is several times slower here.
    """
    values.sort()
    is_first = np.empty(len(values), dtype=bool)
    is_first[:1] = True
    np.not_equal(values[1:], values[:-1], out=is_first[1:])
    return values[is_first]


def _slot(values: np.ndarray) -> np.ndarray:
    return (values & np.uint64((1 << TABLE_BITS) - 1)).astype(np.int64)


def _own_shingles(text: str, common: np.ndarray) -> np.ndarray:
    values = _shingle(text)
    own: np.ndarray = values[~common[_slot(values)]]
    return own


def _common_shingles(texts: Sequence[str]) -> np.ndarray:
    """Return which table slots are boilerplate, judged on up to 5,000 rows spread over all."""
    sample = range(0, len(texts), max(1, len(texts) // 5000))
    counts = np.zeros(1 << TABLE_BITS, dtype=np.int32)
    for row in sample:
        counts[_distinct(_slot(_shingle(texts[row])))] += 1
    return counts > max(COMMON_MIN_ROWS, COMMON_SHARE * len(sample))


def _band_keys(values: np.ndarray) -> np.ndarray:
    """Return the MinHash signature of a set of shingles as one key a band, uint64 [16]."""
    signature = np.full(NUM_HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(values), HASHED_AT_ONCE):
        part = values[start : start + HASHED_AT_ONCE]
        # a row a hash function: contiguous minima
        hashed = _ROOM[: NUM_HASHES * len(part)].reshape(NUM_HASHES, -1)
        np.multiply(_FACTORS[:, None], part, out=hashed)
        hashed += _SHIFTS[:, None]
        np.minimum(signature, hashed.min(axis=1), out=signature)
    bands = signature.reshape(-1, BAND_ROWS)
    keys = np.zeros(len(bands), dtype=np.uint64)
    for column in range(BAND_ROWS):
        keys = keys * np.uint64(_GOLDEN) + bands[:, column]
    return keys


def _bands(values: np.ndarray) -> list[tuple[int, int]]:
    """Return the keys of a text's bands; none for a text with too few shingles."""
    return list(enumerate(_band_keys(values).tolist())) if len(values) >= MIN_SHINGLES else []


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    if min(len(one), len(other)) < MIN_SIMILARITY * max(len(one), len(other)):
        return 0.0
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _candidates(bands: np.ndarray) -> set[tuple[int, int]]:
    """Return pairs of rows that agree in a whole band: each with the band's first and the last."""
    pairs: set[tuple[int, int]] = set()
    for key in bands.T:
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        is_same = np.zeros(len(order), dtype=bool)
        is_same[1:] = ordered[1:] == ordered[:-1]
        starts = np.maximum.accumulate(np.where(is_same, 0, np.arange(len(order))))
        here = np.flatnonzero(is_same)
        pairs.update(zip(order[starts[here]].tolist(), order[here].tolist(), strict=True))
        pairs.update(zip(order[here - 1].tolist(), order[here].tolist(), strict=True))
    return pairs


def _windows(words: Words, size: int) -> list[Words]:
    return [words[start : start + size] for start in range(len(words) - size + 1)]
