"""A first config from a user's own file: its format, columns, split and length."""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmtune.adapters.config import DEFAULT_ADAPTER
from llmtune.data.config import SourceConfig
from llmtune.data.formats import FORMATS
from llmtune.data.hub import is_hub_id
from llmtune.data.init_guess import explain, guess_source
from llmtune.data.init_suite import (
    CHARACTERS_PER_TOKEN,
    NoSuite,
    SuiteDraft,
    SuiteRows,
)
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.problems import RowProblem
from llmtune.data.rows import LoadedRow, find_files, open_source
from llmtune.errors import LlmtuneError
from llmtune.models.quantization.config import DENSE, SMALLEST

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LOOKED_AT_ROWS = 1000
"""Of a hub set, which may be huge; a file is read to its end."""
LONGEST_ROWS = 32
"""Rows with most characters, of which the longest in tokens is taken."""
LENGTH_STEP = 64
DOCUMENT_TOKENS = 1024
"""Longer documents are split into pieces of this many tokens."""
FEW_ROWS = 200
SHOWN_KNOBS = ("method", "rank", "alpha", "target_modules")
"""What a first config says of its adapter, so that one sees what to change."""
DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

EVALUATION_NAME = re.compile(r"(?:^|[._-])(?:valid(?:ation)?|dev|eval(?:uation)?)(?:[._-]|$)", re.I)
TEST_NAME = re.compile(r"(?:^|[._-])test(?:[._-]|$)", re.I)


@dataclass(frozen=True)
class DataDescription:
    """What a look at the user's data showed."""

    train_path: str
    evaluation_path: str | None
    left_out: tuple[str, ...]
    """Files of a directory that look like test sets."""
    format: str
    reason: str
    columns: dict[str, str]
    render: str
    num_rows: int
    """Of a hub id, those that were looked at."""
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

    @property
    def has_answers(self) -> bool:
        """Whether the rows hold answers; others are documents."""
        return FORMATS[self.format].has_answers

    @property
    def is_split(self) -> bool:
        """Whether documents are longer than one example should be."""
        return not self.has_answers and self.longest > self._piece

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
    def _piece(self) -> int:
        return DOCUMENT_TOKENS if self.positions is None else min(DOCUMENT_TOKENS, self.positions)


@dataclass
class _Survey:
    """What one pass over all rows of a source shows."""

    suite: SuiteRows
    num_rows: int = 0
    num_bad: int = 0
    first_bad: RowProblem | None = None
    longest: list[tuple[int, int, LoadedRow]] = field(default_factory=list)
    """The rows with most characters: (characters, order of reading, row)."""

    def add(self, row: LoadedRow | RowProblem) -> None:
        self.num_rows += 1
        if isinstance(row, RowProblem):
            self.num_bad += 1
            self.first_bad = self.first_bad or row
            return
        self.suite.add(row, self.num_rows)
        entry = (row.conversation.num_characters, -self.num_rows, row)
        if len(self.longest) < LONGEST_ROWS:
            heapq.heappush(self.longest, entry)
        else:
            heapq.heappushpop(self.longest, entry)


def describe_data(
    path: str,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    positions: int | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> DataDescription:
    """Read the user's data once, of a hub set the first thousand rows, and describe it.

    Args:
        format: what the user says the rows are; None guesses.
        columns: where the format's columns are, as `format's name: file's name`.

    Raises:
        LlmtuneError: nothing is there, no format fits its columns, or no row can be used.
    """
    train_path, evaluation_path, left_out = _split_files(path)
    source = guess_source(train_path, tokenizer, format=format, columns=columns)
    most_rows = LOOKED_AT_ROWS if is_hub_id(train_path) else None
    opened = open_source(source)
    survey = _read(opened.rows, most_rows, SuiteRows(holds_all=False))
    if not survey.longest:
        raise LlmtuneError(f"{path}: no row can be used; the first: {survey.first_bad}")
    held_out = survey.suite
    if evaluation_path is not None:
        rows = open_source(source.model_copy(update={"path": evaluation_path})).rows
        held_out = _read(rows, most_rows, SuiteRows(holds_all=True)).suite
    share = held_out.share_of(survey.num_rows)
    return DataDescription(
        train_path=train_path,
        evaluation_path=evaluation_path,
        left_out=left_out,
        format=opened.format.format.name,
        reason=explain(source, opened.format.reason),
        columns=source.columns,
        render=source.render,
        num_rows=survey.num_rows,
        bad_rows=survey.num_bad,
        first_bad_row=None if survey.first_bad is None else str(survey.first_bad),
        longest=_longest([row for *_, row in survey.longest], tokenizer),
        is_measured=tokenizer is not None,
        positions=positions,
        suite=held_out.draft(share),
        evaluation_share=share,
    )


def draft_suite(source: SourceConfig) -> SuiteDraft | NoSuite:
    """Draft a suite over all rows of a source, which nobody trains on.

    Raises:
        LlmtuneError: the source is missing or empty, or its format is not known.
    """
    most_rows = LOOKED_AT_ROWS if is_hub_id(source.path) else None
    survey = _read(open_source(source).rows, most_rows, SuiteRows(holds_all=True))
    return survey.suite.draft(None)


def _read(
    rows: Iterable[LoadedRow | RowProblem], most_rows: int | None, suite: SuiteRows
) -> _Survey:
    survey = _Survey(suite)
    for row in itertools.islice(rows, most_rows):
        survey.add(row)
    return survey


def render_config(
    found: DataDescription, *, base: str | None = None, suite: str | None = None
) -> str:
    """Return a commented YAML config for the data, ready for `llmtune run`.

    `suite` is where the drafted suite is written; None if there is none.
    """
    name = re.sub(r"[^\w-]+", "-", Path(found.train_path).name.split(".")[0]).strip("-") or "run"
    knobs = DEFAULT_ADAPTER.model_dump(mode="json")
    adapter = {name: knobs[name] for name in SHOWN_KNOBS if name in knobs}
    measured = "counted with the base's tokenizer" if found.is_measured else "guessed from the text"
    lines = [
        _comment(
            f"Written by llmtune init from {found.train_path}: {found.num_rows:,} rows, "
            f"{found.reason}."
        ),
        "# Look at what is trained with: llmtune data show THIS_FILE",
        f"run_dir: {_yaml(f'runs/{name}')}",
        "seed: 0",
        "",
        "model:",
        f"  base: {_yaml(base or DEFAULT_BASE)}   # a directory, a .gguf file or a hub id",
        f"  quantization: {{method: {SMALLEST.method}}}   # the frozen base in {SMALLEST.bits} "
        f"bits; null keeps {DENSE.bits}",
        "",
        f"adapter: {_yaml(adapter)}",
        "",
        "data:",
        "  train:",
        f"    - {_source_yaml(found, found.train_path)}",
    ]
    if found.evaluation_path is not None:
        lines += ["  evaluation:", f"    - {_source_yaml(found, found.evaluation_path)}"]
    else:
        share = found.evaluation_share
        lines.append(
            f"  evaluation_share: {share}   # held out by a hash of each row"
            if share
            else "  evaluation_share: 0   # too few rows to hold some out; give a file of them"
        )
    lines += [
        "  " + _comment(f"left out, it looks like a test set: {name}") for name in found.left_out
    ]
    lines += [
        f"  max_length: {found.max_length}   # tokens; the longest row has {found.longest:,} "
        f"({measured})",
        *(["  length_policy: split   # longer documents, into pieces"] if found.is_split else []),
        f"  loss_on: {'assistant' if found.has_answers else 'all'}",
    ]
    if found.bad_rows:
        lines += [
            f"  on_bad_row: drop   # {found.bad_rows} of {found.num_rows} rows cannot be used, see "
            "llmtune data check; the first:",
            "  " + _comment(found.first_bad_row or ""),
        ]
    epochs = 3 if found.num_rows < FEW_ROWS * 10 else 1
    lines += [
        "",
        "train:",
        "  learning_rate: 2.0e-4",
        f"  num_epochs: {epochs}",
        f"  batch_size: {8 if found.num_rows < FEW_ROWS else 16}",
        "",
        "protect:",
        "  kl_to_base: {weight: 1.0}   # hold the model near its base, so that it still chats",
        "",
        "evaluate:",
        "  suites:",
        *_suite_lines(found.suite, suite),
        "    - general   # general knowledge that ships with llmtune: what was forgotten?",
        "    - chat   # open chat, held to the base's own answers: does it still answer?",
    ]
    return "\n".join(lines) + "\n"


def _suite_lines(draft: SuiteDraft | NoSuite, path: str | None) -> list[str]:
    if isinstance(draft, NoSuite) or path is None:
        reason = f" ({draft.reason})" if isinstance(draft, NoSuite) else ""
        return [
            f"    # your own task's suite is missing{reason}: without one there is no verdict;",
            "    # a suite is a short YAML file, see docs/evaluation.md",
        ]
    return [f"    - {_yaml(path)}   # {len(draft.items)} held-out rows: did it learn the task?"]


def _split_files(path: str) -> tuple[str, str | None, tuple[str, ...]]:
    """Return the train path, an evaluation file beside it, and test files to leave out."""
    here = Path(path).expanduser()
    if is_hub_id(path) or not (here.is_dir() or here.is_file()):
        if not is_hub_id(path):
            find_files(path)  # raises where nothing is there
        return path, None, ()
    if here.is_file():
        return path, None, ()
    files = find_files(path)
    evaluation = [file for file in files if EVALUATION_NAME.search(file.stem)]
    tests = [file for file in files if TEST_NAME.search(file.stem)]
    train = [file for file in files if file not in evaluation and file not in tests]
    if len(train) == len(files):
        return path, None, ()
    if len(train) != 1:
        listed = ", ".join(str(file) for file in files)
        raise LlmtuneError(
            f"{path}: which of its files to train on is not clear ({listed}); name one, or a glob"
        )
    left_out = tuple(str(file) for file in [*tests, *evaluation[1:]])
    return str(train[0]), str(evaluation[0]) if evaluation else None, left_out


def _longest(rows: list[LoadedRow], tokenizer: PreTrainedTokenizerFast | None) -> int:
    if tokenizer is None:
        texts = (
            sum(len(m["content"]) + 16 for m in row.conversation.messages)
            + len(row.conversation.prompt)
            + len(row.conversation.text)
            for row in rows
        )
        return math.ceil(max(texts) / CHARACTERS_PER_TOKEN)
    labelled = Labeller(tokenizer, "assistant").label([row.conversation for row in rows])
    lengths = [
        len(sequence.input_ids)
        for row in labelled
        if isinstance(row, LabelledRow)
        for sequence in row.sequences
    ]
    if not lengths:
        raise LlmtuneError(f"no row can be rendered with this base; the first: {labelled[0]}")
    return max(lengths)


def _source_yaml(found: DataDescription, path: str) -> str:
    source: dict[str, Any] = {"path": path, "format": found.format}
    if found.columns:
        source["columns"] = dict(found.columns)
    if found.render != "chat":
        source["render"] = found.render
    return _yaml(source)


def _yaml(value: Any) -> str:
    """Return a value as YAML on one line, whatever characters it holds."""
    text = yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
    )
    return text.removesuffix("...\n").strip()


def _comment(text: str) -> str:
    """Return text as one comment: what would end the line is a space in it."""
    return "# " + " ".join("".join(c if c.isprintable() else " " for c in text).split())
