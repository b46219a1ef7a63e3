"""The kinds of fault that a data check can find, each with the rows it was found in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmtune.data.align import LabelledSequence
from llmtune.data.collect import Split, SplitCollector
from llmtune.data.config import DataConfig
from llmtune.data.conversation import Conversation
from llmtune.data.duplicates import find_near_duplicates, find_shared_ngrams
from llmtune.data.length import MAX_LOST_RATIO
from llmtune.data.overlap import conversation_key, normalized_text
from llmtune.data.problems import shorten
from llmtune.data.report import DataReport
from llmtune.data.rows import LoadedRow
from llmtune.data.suspicion import SUSPICION_WORDS, find_suspicions, main_script

KEPT_PLACES = 1000
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
class SeenRows:
    """What one split's rows showed as they passed."""

    places: list[tuple[str, int]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    row_scripts: list[str] = field(default_factory=list)
    questions: list[tuple[int, str]] = field(default_factory=list)
    """Hash of the first trained turn's context, and its answer."""
    suspicions: dict[str, list[Place]] = field(default_factory=dict)
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)

    def look_at(self, row: LoadedRow, sequences: Sequence[LabelledSequence]) -> None:
        conversation = row.conversation
        self.places.append((row.source, row.line))
        self.keys.append(conversation_key(conversation))
        self.texts.append(_spoken_text(conversation))
        self.row_scripts.append(main_script(self.texts[-1]))
        self.scripts[self.row_scripts[-1] or "none"] += 1
        self.questions.append(_question_and_answer(conversation))
        self.roles.update(message["role"] for message in conversation.messages)
        self.turns[len(conversation.messages)] += 1
        for kind, detail in find_suspicions(conversation):
            found = self.suspicions.setdefault(kind, [])
            if not found or (found[-1].source, found[-1].line) != (row.source, row.line):
                found.append(Place(row.source, row.line, detail))


class Notebook:
    """Collects findings; every `add_` method looks for one family of faults."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.findings: list[Finding] = []
        self.splits: dict[Split, SeenRows] = {"train": SeenRows(), "evaluation": SeenRows()}

    def add(self, kind: str, severity: Severity, message: str, places: list[Place]) -> None:
        if places:
            kept = tuple(places[:KEPT_PLACES])
            self.findings.append(Finding(kind, severity, message, len(places), kept))

    def add_bad_rows(self, collector: SplitCollector) -> None:
        kinds: dict[str, list[Place]] = {}
        for problem in collector.problems:
            place = Place(problem.source, problem.line, problem.message)
            kinds.setdefault(problem.kind, []).append(place)
        is_error = self.config.on_bad_row == "error"
        advice = "" if is_error else "; left out (on_bad_row: drop)"
        for kind, places in kinds.items():
            message = f"rows that cannot be used: {BAD_ROW_WORDS.get(kind, kind)}{advice}"
            self.add(kind, "error" if is_error else "warning", message, places)

    def add_shared(self, collector: SplitCollector) -> None:
        places = [
            Place(*_split_place(shared.place), f"the same row as {shared.other}")
            for shared in collector.shared
        ]
        self.add("leak", "error", "train rows that are also in the evaluation data", places)

    def add_lengths(self, collector: SplitCollector) -> None:
        count = collector.count
        lost = count.trained_tokens_lost / max(count.trained_tokens, 1)
        places = [
            Place(
                *_split_place(place), f"{length:,} tokens; max_length is {self.config.max_length:,}"
            )
            for length, place in count.longest
        ]
        if not places:
            return
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

    def add_signal(self, report: DataReport) -> None:
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
        found: dict[str, list[Place]] = {}
        for seen in self.splits.values():
            for kind, places in seen.suspicions.items():
                found.setdefault(kind, []).extend(places)
        for kind, places in found.items():
            self.add(kind, "warning", SUSPICION_WORDS[kind], places)
        rows = [
            (place, script)
            for seen in self.splits.values()
            for place, script in zip(seen.places, seen.row_scripts, strict=True)
        ]
        counts = Counter(script for _, script in rows)
        rare = {
            script
            for script, count in counts.items()
            if script and count < RARE_SCRIPT_SHARE * len(rows) and len(rows) >= RARE_SCRIPT_ROWS
        }
        places = [Place(*place, f"mostly {script}") for place, script in rows if script in rare]
        self.add("script", "warning", "rows in a script that is rare in this data", places)

    def add_duplicates(self) -> None:
        for seen in self.splits.values():
            first: dict[bytes, tuple[str, int]] = {}
            places = []
            for place, key in zip(seen.places, seen.keys, strict=True):
                if key in first:
                    source, line = first[key]
                    places.append(Place(*place, f"the same row as {source}:{line}"))
                else:
                    first[key] = place
            self.add("duplicate", "warning", "rows that stand more than once", places)

    def add_conflicts(self) -> None:
        train = self.splits["train"]
        first: dict[int, tuple[str, tuple[str, int]]] = {}
        places = []
        for place, (question, answer) in zip(train.places, train.questions, strict=True):
            known = first.setdefault(question, (answer, place))
            if answer and known[0] != answer:
                source, line = known[1]
                detail = f"answers {shorten(answer, 40)}; {source}:{line} {shorten(known[0], 40)}"
                places.append(Place(*place, detail))
        self.add("conflict", "warning", "rows that answer the same prompt differently", places)

    def add_near_duplicates(self) -> None:
        train, evaluation = self.splits["train"], self.splits["evaluation"]
        places = train.places + evaluation.places
        keys = train.keys + evaluation.keys
        near: list[Place] = []
        leaks: list[Place] = []
        for pair in find_near_duplicates(train.texts + evaluation.texts):
            if keys[pair.first] == keys[pair.second]:
                continue  # told as a duplicate or a leak
            crosses = pair.first < len(train.places) <= pair.second
            here, there = (pair.first, pair.second) if crosses else (pair.second, pair.first)
            source, line = places[there]
            detail = f"{pair.similarity:.0%} like {source}:{line}"
            (leaks if crosses else near).append(Place(*places[here], detail))
        self.add("near-duplicate", "warning", "rows that are nearly equal to another", near)
        self.add("near-leak", "warning", "train rows nearly equal to an evaluation row", leaks)
        shared = [
            Place(
                *train.places[row], f"shares {shorten(words)} with {_show(evaluation.places[at])}"
            )
            for row, at, words in find_shared_ngrams(train.texts, evaluation.texts)
            if train.keys[row] != evaluation.keys[at]
        ]
        self.add(
            "ngram-overlap", "warning", "train rows that share 13 words with evaluation", shared
        )


def _spoken_text(conversation: Conversation) -> str:
    """Return the row's text without system messages, normalized."""
    spoken = [m for m in conversation.messages if m["role"] not in ("system", "developer")]
    parts = [message["content"] for message in spoken]
    text = "\n".join([*parts, conversation.prompt, conversation.text])
    return " ".join(text.casefold().split())


def _question_and_answer(conversation: Conversation) -> tuple[int, str]:
    messages = conversation.messages
    if conversation.kind == "text":
        return hash(conversation.text), ""
    if conversation.kind == "plain":
        return hash(conversation.prompt), conversation.text
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    context = Conversation("chat", messages[:last], trained_from=0)
    return hash(normalized_text(context)), messages[last]["content"].strip()


def _split_place(place: str) -> tuple[str, int]:
    source, line = place.rsplit(":", 1)
    return source, int(line)


def _show(place: tuple[str, int]) -> str:
    return f"{place[0]}:{place[1]}"
