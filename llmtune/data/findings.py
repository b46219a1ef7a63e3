"""The kinds of fault that a data check can find, each with the rows it was found in."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llmtune.data.align import LabelledSequence
from llmtune.data.collect import Split, SplitCollector
from llmtune.data.config import DataConfig
from llmtune.data.conversation import Conversation
from llmtune.data.duplicates import find_near_duplicates, find_shared_ngrams
from llmtune.data.example import ExampleTable
from llmtune.data.length import MAX_LOST_RATIO, find_beyond
from llmtune.data.overlap import normalized_text, one_spaced, tool_texts
from llmtune.data.problems import RowProblem, shorten
from llmtune.data.report import DataReport
from llmtune.data.rows import LoadedRow
from llmtune.data.spool import JoinedTexts, PlaceList, SpooledTexts, first_of_equal
from llmtune.data.suspicion import SUSPICION_WORDS, find_suspicions, main_script

KEPT_PLACES = 1000
SHOWN_ROWS = 50
MOST_LABELS = 1000
LABEL_CHARACTERS = 200
KEY_BYTES = 16
RARE_SCRIPT_SHARE = 0.01
RARE_SCRIPT_ROWS = 100
"""Only with this many rows can a script be called rare."""
MIN_STOP_ROWS = 0.95

Severity = Literal["error", "warning"]

BAD_ROW_WORDS = {
    "json": "not a JSON object",
    "encoding": "not UTF-8",
    "csv": "wrong number of fields",
    "column": "a column is missing",
    "role": "unknown role",
    "content": "content is missing or not text",
    "empty": "empty text",
    "no-assistant": "nothing to train on",
    "messages": "messages is not a list of turns",
    "tool-call": "broken tool call",
    "tools": "broken tool schemas",
    "unicode": "half of a character pair",
    "control-token": "a control token inside the text",
    "template": "the chat template refuses or changes the row",
    "stop-token": "no stop token would be trained",
    "train": "wrong train mark",
    "weight": "wrong weight",
    "row": "wrong type",
}


@dataclass(frozen=True)
class Place:
    """One row a finding is about."""

    source: str
    line: int
    detail: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.detail}"


@dataclass(frozen=True)
class Finding:
    """One kind of fault. An `error` would stop a run; a `warning` would not."""

    kind: str
    severity: Severity
    message: str
    count: int
    places: tuple[Place, ...] = ()
    """The first thousand rows."""


@dataclass
class Suspects:
    """Rows of one suspicion: how many, and where the first ones are."""

    count: int = 0
    places: list[Place] = field(default_factory=list)
    last: tuple[str, int] | None = None

    def add(self, row: LoadedRow, detail: str) -> None:
        """Count a row once, whatever else is found in it."""
        if self.last == (row.source, row.line):
            return
        self.last = (row.source, row.line)
        self.count += 1
        if len(self.places) < KEPT_PLACES:
            self.places.append(Place(row.source, row.line, detail))


@dataclass(frozen=True)
class ShownRow:
    """One row for people: who says what in it, and its length."""

    source: str
    line: int
    turns: tuple[tuple[str, str], ...]
    num_tokens: int


@dataclass
class SeenRows:
    """What one split's rows showed as they passed: about 70 bytes a row, the texts in a file."""

    places: PlaceList = field(default_factory=PlaceList)
    keys: bytearray = field(default_factory=bytearray)
    """16 bytes a row."""
    texts: SpooledTexts = field(default_factory=SpooledTexts)
    row_scripts: list[str] = field(default_factory=list)
    questions: array[int] = field(default_factory=lambda: array("q"))
    """Hash of the last turn's context."""
    answers: array[int] = field(default_factory=lambda: array("q"))
    """Hash of the answer to it."""
    shown_answers: SpooledTexts = field(default_factory=SpooledTexts)
    tools: array[int] = field(default_factory=lambda: array("q"))
    """Hash of the tools that the model is given."""
    suspicions: dict[str, Suspects] = field(default_factory=dict)
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    first: list[ShownRow] = field(default_factory=list)
    """The first rows, for people."""
    answer_counts: Counter[str] | None = field(default_factory=Counter)
    """How many rows have which answer; None once there are too many for labels."""

    def look_at(self, row: LoadedRow, sequences: Sequence[LabelledSequence]) -> None:
        """Keep what the checks need to know of a row."""
        conversation = row.conversation
        self.places.append(row.source, row.line)
        self.keys += row.key
        text = _spoken_text(conversation)
        self.texts.append(text)
        self.row_scripts.append(main_script(text))
        self.scripts[self.row_scripts[-1] or "none"] += 1
        question, answer = _question_and_answer(conversation)
        self.questions.append(question)
        self.answers.append(hash(answer))
        self.shown_answers.append(shorten(answer, 40))
        self.tools.append(hash(tuple(tool_texts(conversation))))
        self.roles.update([message["role"] for message in conversation.messages])
        self.turns[len(conversation.messages)] += 1
        for kind, detail in find_suspicions(conversation):
            self.suspicions.setdefault(kind, Suspects()).add(row, detail)
        if len(self.first) < SHOWN_ROWS:
            num_tokens = sum(len(sequence.input_ids) for sequence in sequences)
            turns = tuple(_iter_turns(conversation))
            self.first.append(ShownRow(row.source, row.line, turns, num_tokens))
        if self.answer_counts is not None:
            self.answer_counts[answer] += 1
            if len(self.answer_counts) > MOST_LABELS or not 0 < len(answer) <= LABEL_CHARACTERS:
                self.answer_counts = None

    @property
    def labels(self) -> dict[str, int]:
        """How many rows have which answer, the commonest first; empty if they are no labels."""
        counts: dict[str, int] = self.answer_counts or {}
        if 2 * len(counts) > len(self.places):
            return {}
        return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))

    def key(self, row: int) -> bytes:
        """Return the key of the conversation in a row."""
        return bytes(self.keys[row * KEY_BYTES : (row + 1) * KEY_BYTES])

    def first_rows(self) -> np.ndarray:
        """Return for each row the first one with the same key, int64 [N]."""
        return first_of_equal(np.frombuffer(self.keys, dtype=np.uint64).reshape(-1, 2))


class Notebook:
    """Collects findings; every `add_` method looks for one family of faults."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.findings: list[Finding] = []
        self._bad_rows: set[RowProblem] = set()
        self.splits: dict[Split, SeenRows] = {"train": SeenRows(), "evaluation": SeenRows()}

    def add(self, kind: str, severity: Severity, message: str, places: Iterable[Place]) -> None:
        """Add a finding; only its first places are kept."""
        count, kept = 0, []
        for place in places:
            count += 1
            if count <= KEPT_PLACES:
                kept.append(place)
        if count:
            self.findings.append(Finding(kind, severity, message, count, tuple(kept)))

    def add_bad_rows(self, collector: SplitCollector) -> None:
        """Note the rows that cannot be used; one of a file that both splits share counts once."""
        kinds: dict[str, list[Place]] = {}
        problems = [problem for problem in collector.problems if problem not in self._bad_rows]
        self._bad_rows.update(problems)
        for problem in problems:
            place = Place(problem.source, problem.line, problem.message)
            kinds.setdefault(problem.kind, []).append(place)
        is_error = self.config.on_bad_row == "error"
        advice = "" if is_error else "; left out (on_bad_row: drop)"
        for kind, places in kinds.items():
            message = f"rows that cannot be used: {BAD_ROW_WORDS.get(kind, kind)}{advice}"
            self.add(kind, "error" if is_error else "warning", message, places)

    def add_shared(self, collector: SplitCollector) -> None:
        """Add the train rows that are also in the evaluation data."""
        places = [
            Place(*_split_place(shared.place), f"the same row as {shared.other}")
            for shared in collector.shared
        ]
        self.add("leak", "error", "train rows that are also in the evaluation data", places)

    def add_lengths(self, collector: SplitCollector) -> None:
        """Add the rows that `max_length` cuts or drops."""
        count = collector.count
        lost = count.trained_tokens_lost / max(count.trained_tokens, 1)
        places = [
            Place(
                *_split_place(place), f"{length:,} tokens; max_length is {self.config.max_length:,}"
            )
            for length, place in count.longest
        ]
        if not places or (self.config.length_policy == "split" and not count.trained_tokens_lost):
            return  # pieces lose nothing
        is_error = self.config.length_policy != "drop" and lost > MAX_LOST_RATIO
        is_error = is_error or count.trained_tokens_lost == count.trained_tokens
        message = (
            f"rows longer than max_length ({collector.split}); {lost:.1%} of the trained tokens "
            f"would be lost (length_policy: {self.config.length_policy})"
        )
        severity: Severity = "error" if is_error else "warning"
        self.findings.append(
            Finding("too-long", severity, message, count.rows_too_long, tuple(places))
        )

    def add_positions(self, examples: ExampleTable, positions: int | None, split: Split) -> None:
        """Add the rows that are longer than the model has positions for."""
        found = find_beyond(examples, positions)
        if found:
            places = [
                Place(source, line, f"{length:,} tokens; the model has {positions:,} positions")
                for source, line, length in found[:KEPT_PLACES]
            ]
            message = (
                f"rows longer than the model's {positions:,} positions ({split}); set "
                f"data.max_length={positions} or less"
            )
            self.findings.append(Finding("positions", "error", message, len(found), tuple(places)))

    def add_items(self, problems: Sequence[RowProblem]) -> None:
        """Add the suites' items that the model cannot be asked."""
        if problems:
            places = [Place(one.source, one.line, one.message) for one in problems[:KEPT_PLACES]]
            message = "items of the config's suites that the model cannot be asked"
            self.findings.append(
                Finding("suite-items", "error", message, len(problems), tuple(places))
            )

    def add_signal(self, report: DataReport) -> None:
        """Add what leaves too little to learn: no stop tokens, or no rows."""
        if report.stop_row_ratio < MIN_STOP_ROWS:
            missing = round((1 - report.stop_row_ratio) * report.rows_kept)
            self.findings.append(
                Finding("stop-token", "error", "rows that train no stop token", missing)
            )
        if not report.num_examples:
            self.findings.append(
                Finding("no-rows", "error", f"{report.split}: no row is left to use", 1)
            )

    def add_suspicions(self) -> None:
        """Add the rows that look wrong in some way, and those in a rare script."""
        every = [seen for seen in self.splits.values() if len(seen.places)]
        for kind, words in SUSPICION_WORDS.items():
            found = [seen.suspicions[kind] for seen in every if kind in seen.suspicions]
            places = [place for suspects in found for place in suspects.places][:KEPT_PLACES]
            if places:
                count = sum(suspects.count for suspects in found)
                self.findings.append(Finding(kind, "warning", words, count, tuple(places)))
        num_rows = sum(len(seen.places) for seen in every)
        counts: Counter[str] = sum((seen.scripts for seen in every), Counter())
        rare = {
            script
            for script, count in counts.items()
            if script != "none" and count < RARE_SCRIPT_SHARE * num_rows
        }
        places_of_rare = (
            Place(*seen.places[row], f"mostly {script}")
            for seen in every
            for row, script in enumerate(seen.row_scripts)
            if script in rare
        )
        if num_rows >= RARE_SCRIPT_ROWS and rare:
            message = "rows in a script that is rare in this data"
            self.add("script", "warning", message, places_of_rare)

    def add_duplicates(self) -> None:
        """Add the rows that repeat an earlier row of their split."""
        for seen in self.splits.values():
            firsts = seen.first_rows()
            places = (
                Place(*seen.places[row], f"the same row as {_show(seen.places[firsts[row]])}")
                for row in np.flatnonzero(firsts != np.arange(len(firsts))).tolist()
            )
            self.add("duplicate", "warning", "rows that stand more than once", places)

    def add_conflicts(self) -> None:
        """Add the train rows that answer the same question differently."""
        train = self.splits["train"]
        answers = np.frombuffer(train.answers, dtype=np.int64)
        firsts = first_of_equal(np.frombuffer(train.questions, dtype=np.int64).reshape(-1, 1))
        differs = (answers != answers[firsts]) & (answers != hash(""))
        places = (
            Place(
                *train.places[row],
                f"answers {train.shown_answers[row]}; {_show(train.places[firsts[row]])} "
                f"{train.shown_answers[int(firsts[row])]}",
            )
            for row in np.flatnonzero(differs).tolist()
        )
        self.add("conflict", "warning", "rows that answer the same prompt differently", places)

    def add_near_duplicates(self) -> None:
        """Add the rows that are almost the same, within a split and across the two."""
        train, evaluation = self.splits["train"], self.splits["evaluation"]
        near: list[Place] = []
        leaks: list[Place] = []
        split = len(train.places)
        for pair in find_near_duplicates(JoinedTexts(train.texts, evaluation.texts)):
            first, second = (
                (train, row) if row < split else (evaluation, row - split)
                for row in (pair.first, pair.second)
            )
            if first[0].key(first[1]) == second[0].key(second[1]):
                continue  # reported as a duplicate or a leak
            if first[0].tools[first[1]] != second[0].tools[second[1]]:
                continue  # with other tools the same question has a different answer
            crosses = pair.first < split <= pair.second
            here, there = (first, second) if crosses else (second, first)
            detail = f"{pair.similarity:.0%} like {_show(there[0].places[there[1]])}"
            (leaks if crosses else near).append(Place(*here[0].places[here[1]], detail))
        self.add("near-duplicate", "warning", "rows that are nearly equal to another", near)
        self.add("near-leak", "warning", "train rows nearly equal to an evaluation row", leaks)
        shared = [
            Place(
                *train.places[row], f"shares {shorten(words)} with {_show(evaluation.places[at])}"
            )
            for row, at, words in find_shared_ngrams(train.texts, evaluation.texts)
            if train.key(row) != evaluation.key(at) and train.tools[row] == evaluation.tools[at]
        ]
        self.add(
            "ngram-overlap", "warning", "train rows that share 13 words with evaluation", shared
        )


def _spoken_text(conversation: Conversation) -> str:
    """Return the row's text without system messages, normalized."""
    spoken = [m for m in conversation.messages if m["role"] not in ("system", "developer")]
    parts = [message["content"] for message in spoken]
    texts = [*parts, conversation.prompt, conversation.text]
    return one_spaced("\n".join(text for text in texts if text))


def _question_and_answer(conversation: Conversation) -> tuple[int, str]:
    messages = conversation.messages
    if conversation.kind == "text":
        return hash(conversation.text), ""
    if conversation.kind == "plain":
        return hash(conversation.prompt), conversation.text
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    context = Conversation("chat", messages[:last], conversation.tools)
    return hash(normalized_text(context)), messages[last]["content"].strip()


def _iter_turns(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Yield who says what: the messages, or a text with what comes before it."""
    for message in conversation.messages:
        calls = message.get("tool_calls")
        said = str(message.get("content") or "")
        yield (
            message["role"],
            said
            if not calls
            else f"{said} {json.dumps(calls, ensure_ascii=False, default=str)}".strip(),
        )
    if conversation.prompt:
        yield "prompt", conversation.prompt
    if conversation.text:
        yield "text", conversation.text


def _split_place(place: str) -> tuple[str, int]:
    source, line = place.rsplit(":", 1)
    return source, int(line)


def _show(place: tuple[str, int]) -> str:
    return f"{place[0]}:{place[1]}"
