"""What a look at a user's own rows shows: the job, its columns, split, length and suite."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmtune.data.config import SourceConfig
from llmtune.data.formats import FORMATS
from llmtune.data.hub import is_hub_id
from llmtune.data.init_guess import explain, find_label_names, guess_source, open_file
from llmtune.data.init_job import JOBS, Job, JobName, JobSurvey, have_own_instruction
from llmtune.data.init_splits import find_splits
from llmtune.data.init_suite import CHARACTERS_PER_TOKEN, NoSuite, SuiteDraft, SuiteRows
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.problems import RowProblem, name_first
from llmtune.data.rows import LoadedRow, open_source
from llmtune.errors import LlmtuneError
from llmtune.io.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LOOKED_AT_ROWS = 1000
"""Of a hub set, which may be huge; a file is read to its end."""
LONGEST_ROWS = 256
"""Rows with most characters, of which the longest in tokens is taken."""
SHOWN_ROWS = 5
LENGTH_STEP = 64
DOCUMENT_TOKENS = 1024
"""Longer documents are split into pieces of this many tokens."""


@dataclass(frozen=True)
class DataDescription:
    """What a look at the user's data showed."""

    source: SourceConfig
    """What is trained on."""
    evaluation: SourceConfig | None
    """What the loss is watched on; None holds rows of the source out."""
    test: SourceConfig | None
    """What the suite asks, if it is a file (or a list) of its own."""
    left_out: tuple[str, ...]
    """Files of a directory, or lists of a file, that are not used."""
    job: Job
    reason: str
    num_rows: int
    """Of a hub id, those that were looked at."""
    characters: int
    bad_rows: int
    first_bad_row: str | None
    longest: int
    is_measured: bool
    """True if the lengths were counted with the base model's tokenizer."""
    positions: int | None
    """The longest sequence that the base has positions for, if it is known."""
    suite: SuiteDraft | NoSuite
    """What asks whether the tuning worked, over the rows that the config holds out."""
    evaluation_share: float | None
    """The share of the train rows to hold out; None if a different file holds them. 0 if the rows
    are so few that the share would take none of them, or all."""
    notes: tuple[str, ...] = ()
    """What was found and decided beside."""

    @property
    def train_path(self) -> str:
        """The file of the rows."""
        return self.source.path

    @property
    def evaluation_path(self) -> str | None:
        """The file of the held-out rows, if there is one."""
        return None if self.evaluation is None else self.evaluation.path

    @property
    def has_answers(self) -> bool:
        """Whether the rows hold answers; others are documents."""
        return FORMATS[self.source.format].has_answers

    @property
    def unit(self) -> str:
        """What one row is called."""
        return "row" if self.has_answers else "document"

    def count_rows(self) -> str:
        """Say how many there are."""
        return f"{self.num_rows:,} {self.unit}{'s' if self.num_rows != 1 else ''}"

    @property
    def is_split(self) -> bool:
        """Whether documents are longer than one example should be."""
        return not self.has_answers and self.longest > self._piece

    @property
    def is_too_long(self) -> bool:
        """Whether rows with answers are longer than the base has positions for."""
        return self.has_answers and self.positions is not None and self.longest > self.positions

    @property
    def max_length(self) -> int:
        """The longest row, rounded up to a multiple of 64 tokens; of split documents a piece.

        Never more than the base has positions for.
        """
        if self.is_split:
            return self._piece
        longest = max(LENGTH_STEP, math.ceil(self.longest / LENGTH_STEP) * LENGTH_STEP)
        return longest if self.positions is None else min(longest, self.positions)

    @property
    def num_trained_rows(self) -> int:
        """The examples that are trained on, about: rows, or pieces of documents."""
        rows = float(self.num_rows)
        if self.is_split:
            rows = max(rows, self.characters / CHARACTERS_PER_TOKEN / self._piece)
        return max(1, round(rows * (1 - (self.evaluation_share or 0))))

    @property
    def _piece(self) -> int:
        return DOCUMENT_TOKENS if self.positions is None else min(DOCUMENT_TOKENS, self.positions)


@dataclass
class _Survey:
    """What one pass over all rows of a source shows."""

    suite: SuiteRows
    jobs: JobSurvey = field(default_factory=JobSurvey)
    num_rows: int = 0
    num_bad: int = 0
    first_bad: RowProblem | None = None
    characters: int = 0
    keys: set[bytes] = field(default_factory=set)
    """Of every usable row, to find it in a second file."""
    reason: str = ""
    """How the format was found."""
    longest: list[tuple[int, int, LoadedRow]] = field(default_factory=list)
    """The rows with most characters: (characters, order of reading, row)."""

    def add(self, row: LoadedRow | RowProblem) -> None:
        self.num_rows += 1
        if isinstance(row, RowProblem):
            self.num_bad += 1
            self.first_bad = self.first_bad or row
            return
        self.characters += row.conversation.num_characters
        self.jobs.add(row.conversation)
        self.keys.add(self.suite.add(row, self.num_rows))
        entry = (row.conversation.num_characters, -self.num_rows, row)
        if len(self.longest) < LONGEST_ROWS:
            heapq.heappush(self.longest, entry)
        else:
            heapq.heappushpop(self.longest, entry)

    def lengths(self, tokenizer: PreTrainedTokenizerFast | None) -> list[tuple[LoadedRow, int]]:
        """Return the rows with most characters, each with the tokens of its longest example."""
        return _count_lengths([row for *_, row in self.longest], tokenizer)


@dataclass(frozen=True)
class Asked:
    """What the user says of the rows; None and empty leave it to a guess."""

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    """Where the format's columns are, as `format's name: file's name`."""
    task: JobName | None = None
    ignore: tuple[str, ...] = ()
    """Columns that are left out on purpose."""
    labels: tuple[str, ...] = ()
    """Names of whole-number labels."""
    test: str | None = None
    """A file of rows for the suite."""

    def __post_init__(self) -> None:
        """Refuse a task that nobody knows.

        Raises:
            LlmtuneError: with the names of those that are.
        """
        if self.task is not None and self.task not in JOBS:
            raise LlmtuneError(
                f"task {self.task!r} is not known; expected one of {', '.join(JOBS)}"
            )


def describe_data(
    path: str,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    positions: int | None = None,
    asked: Asked | None = None,
) -> DataDescription:
    """Read the user's data, of a hub set the first thousand rows, and describe it.

    Raises:
        LlmtuneError: nothing is there, no format fits its columns, or no row can be used.
    """
    asked = asked or Asked()
    places = find_splits(path)
    most_rows = LOOKED_AT_ROWS if is_hub_id(places.train.path) else None
    source, survey = _understand(places.train, tokenizer, asked, most_rows)
    job = survey.jobs.job(asked.task)
    test = places.test if asked.test is None else open_file(asked.test)
    evaluation, watched = _read_beside(source, places.evaluation, most_rows)
    test, tested = _read_beside(source, test, most_rows)
    notes = list(places.notes)
    if watched is not None and (num_shared := len(watched.keys & survey.keys)):
        assert evaluation is not None
        notes.append(
            f"{num_shared} rows of {evaluation.name} are in the training rows too, so it is left "
            "out and rows are held out instead"
        )
        evaluation = watched = None
    if tested is not None and (num_shared := len(tested.keys & survey.keys)):
        assert test is not None
        notes.append(f"{num_shared} rows of {test.name} are trained on, so they are not asked")
    share = None if evaluation is not None else survey.suite.share_of(survey.num_rows)
    held_out = tested or watched
    lengths = [pair for each in (survey, watched) if each for pair in each.lengths(tokenizer)]
    asked_lengths = tested.lengths(tokenizer) if tested else []
    beyond: list[tuple[LoadedRow, int]] = []
    if FORMATS[source.format].has_answers and positions is not None and tokenizer is not None:
        beyond = [pair for pair in (*lengths, *asked_lengths) if pair[1] > positions]
        notes += _describe_beyond(beyond, positions)
        if len(beyond) >= survey.num_rows - survey.num_bad:
            raise LlmtuneError(f"{notes[-1]}; no row is left to train on")
    too_long = {row.key for row, _ in beyond}
    if held_out is None:
        suite = survey.suite.draft(share, job, without=too_long)
    else:
        suite = held_out.suite.draft(None, job, without=survey.keys | too_long)
    return DataDescription(
        source=source,
        evaluation=evaluation,
        test=test,
        left_out=places.left_out,
        job=job,
        reason=explain(source, survey.reason, asked.format),
        num_rows=survey.num_rows,
        characters=survey.characters,
        bad_rows=survey.num_bad,
        first_bad_row=None if survey.first_bad is None else str(survey.first_bad),
        longest=max(length for _, length in lengths),
        notes=tuple(notes),
        is_measured=tokenizer is not None,
        positions=positions,
        suite=suite,
        evaluation_share=share,
    )


def draft_suite(
    path: str, asked: Asked, tokenizer: PreTrainedTokenizerFast | None
) -> tuple[SuiteDraft | NoSuite, Job]:
    """Draft a suite over all rows of a source, which nobody trains on.

    Raises:
        LlmtuneError: the source is missing or empty, or its format is not known.
    """
    most_rows = LOOKED_AT_ROWS if is_hub_id(path) else None
    _, survey = _understand(open_file(path), tokenizer, asked, most_rows, holds_all=True)
    job = survey.jobs.job(asked.task)
    return survey.suite.draft(None, job), job


def _understand(
    given: SourceConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    asked: Asked,
    most_rows: int | None,
    *,
    holds_all: bool = False,
) -> tuple[SourceConfig, _Survey]:
    """Return the source with all that its rows need to be trained on, and a pass over them.

    They are read again if the first pass shows that they need an instruction or names of labels.
    """
    given = given.model_copy(update={"ignore": asked.ignore})
    guessed = guess_source(
        given,
        tokenizer,
        format=asked.format,
        columns=asked.columns,
        is_text=asked.task == "text",
    )
    survey = _read(guessed, most_rows, holds_all=holds_all)
    source = _settle(guessed, survey, asked)
    if source != guessed:
        survey = _read(source, most_rows, holds_all=holds_all)
    return source, survey


def _settle(source: SourceConfig, survey: _Survey, asked: Asked) -> SourceConfig:
    """Return the source with names for numbers and an instruction, where rows need them."""
    job = survey.jobs.job(asked.task)
    member = FORMATS[source.format]
    if not member.takes_instruction:
        if asked.labels:
            raise LlmtuneError(f"--labels: the rows are {member.name}, which names no numbers")
        return source
    if job.name == "classify":
        names = asked.labels or find_label_names(source, job.labels)
        if names:
            source = source.model_copy(update={"labels": tuple(names)})
            numbers = [int(label) for label in job.labels if label.isdecimal()]
            if len(numbers) < len(job.labels) or max(numbers) >= len(names):
                raise LlmtuneError(
                    f"--labels: names {len(names)} labels, 0 to {len(names) - 1}; the rows have "
                    f"{', '.join(job.labels[:10])}"
                )
            job = Job("classify", tuple(names[number] for number in sorted(numbers)))
    is_bare = member.required[0] in source.columns and not have_own_instruction(
        survey.suite.prompts()
    )
    if is_bare and (instruction := job.instruction()):
        source = source.model_copy(update={"instruction": instruction})
    return source


def _like(source: SourceConfig, other: SourceConfig) -> SourceConfig:
    """Return a second file of the same rows: read as it is, understood as the first."""
    update = {"path": other.path, "encoding": other.encoding, "delimiter": other.delimiter}
    return source.model_copy(update=update | {"split": other.split})


def _read_beside(
    source: SourceConfig, other: SourceConfig | None, most_rows: int | None
) -> tuple[SourceConfig, _Survey] | tuple[None, None]:
    """Read evaluation or test rows as the training rows are understood."""
    if other is None:
        return None, None
    found = _like(source, other)
    return found, _read(found, most_rows, holds_all=True)


def _read(source: SourceConfig, most_rows: int | None, *, holds_all: bool = False) -> _Survey:
    opened = open_source(source)
    survey = _Survey(SuiteRows(holds_all=holds_all), reason=opened.format.reason)
    with progress_bar(source.path, unit="rows") as bar:
        for row in itertools.islice(opened.rows, most_rows):
            survey.add(row)
            bar.advance()
    if not survey.longest:
        raise LlmtuneError(f"{source.path}: no row can be used; the first: {survey.first_bad}")
    return survey


def _count_lengths(
    rows: list[LoadedRow], tokenizer: PreTrainedTokenizerFast | None
) -> list[tuple[LoadedRow, int]]:
    """Return the usable rows, each with the tokens of its longest example."""
    if tokenizer is None:
        return [(row, math.ceil(_characters(row) / CHARACTERS_PER_TOKEN)) for row in rows]
    labelled = Labeller(tokenizer, "assistant").label([row.conversation for row in rows])
    lengths = [
        (row, max(len(sequence.input_ids) for sequence in found.sequences))
        for row, found in zip(rows, labelled, strict=True)
        if isinstance(found, LabelledRow)
    ]
    if not lengths:
        raise LlmtuneError(f"no row can be rendered with this base; the first: {labelled[0]}")
    return lengths


def _characters(row: LoadedRow) -> int:
    said = sum(len(message["content"]) + 16 for message in row.conversation.messages)
    return said + len(row.conversation.prompt) + len(row.conversation.text)


def _describe_beyond(beyond: list[tuple[LoadedRow, int]], positions: int) -> Iterator[str]:
    """Say which rows are longer than the base has positions for."""
    if not beyond:
        return
    ordered = sorted(beyond, key=lambda pair: (pair[0].source, pair[0].line))
    places = [f"{row.source}:{row.line} ({length:,} tokens)" for row, length in ordered]
    count = f"{len(beyond)}{' or more' if len(beyond) >= LONGEST_ROWS else ''}"
    are = "row is" if len(beyond) == 1 else "rows are"
    left = "is" if len(beyond) == 1 else "are"
    yield (
        f"{count} {are} longer than the base's {positions:,} positions and {left} left out: "
        f"{name_first(places, SHOWN_ROWS)}"
    )
