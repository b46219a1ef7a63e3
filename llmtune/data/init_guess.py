"""Which format a user's own rows have, and which of their columns it reads, guessed from names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.data.columnar import read_class_names
from llmtune.data.config import SourceConfig
from llmtune.data.files import file_kind, sniff_reading
from llmtune.data.formats import FORMATS, choose_format, rename_columns
from llmtune.data.formats.base import LABELS
from llmtune.data.hub import is_hub_id
from llmtune.data.problems import RowProblem
from llmtune.data.row_values import parse_json
from llmtune.data.rows import find_files, iter_raw_rows
from llmtune.errors import LlmtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GUESSED_FROM_ROWS = 100
CONTENT_ROWS = 1000
"""Rows that are looked at if the columns' names say nothing."""
FEWEST_ROWS = 20
"""Fewer show too little of what a column holds."""
ROWS_A_VALUE = 3
"""A column whose values come so often on average may hold labels."""
LONGEST_VALUE = 80
SHORTEST_TEXT = 10
"""Characters, on average."""
NAME_ENDS = ("_text", "_name", "_str")
"""What is behind a label's column in the column of its name: `label_text` beside `label`."""
SHORT_TEXT = 1000
"""Characters, on average; longer ones are documents, whatever is beside them."""
METADATA = frozenset(
    {
        *("source", "lang", "language", "split", "subset", "dataset", "domain", "license"),
        *("id", "url", "file", "filename", "author", "date", "time", "timestamp"),
        *("meta", "metadata", "version"),
    }
)
"""What is written beside a document, of which many have the same."""
HINT = (
    "With init: say which column is which, as in --columns text=COLUMN,label=COLUMN (labels), "
    "--columns prompt=COLUMN,completion=COLUMN (questions and answers) or --columns text=COLUMN "
    "(documents); with --format NAME the names on the left are that format's"
)


PAIRS_HINT = (
    "With init: --columns prompt=prompt,completion=chosen --ignore rejected. There is no DPO, ORPO "
    "or KTO in llmtune"
)


def open_file(path: str, split: str = "train") -> SourceConfig:
    """Return a source with how its file is read: encoding, what is between fields, which list."""
    if is_hub_id(path):
        return SourceConfig(path=path)
    file = next((file for file in find_files(path) if file_kind(file)), None)
    if file is None:
        return SourceConfig(path=path)
    reading = sniff_reading(file, split)
    return SourceConfig(
        path=path, encoding=reading.encoding, delimiter=reading.delimiter, split=reading.split
    )


def guess_source(
    given: SourceConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    is_text: bool = False,
) -> SourceConfig:
    """Return a source with its format named, and its columns mapped if they have other names.

    Args:
        given: the path, and how its file is read.
        format: what the user says it is; None guesses.
        columns: what the user says is where, as `format's name: file's name`; `text` and `label`
            are a text and what it is an example of.
        is_text: the user says that they are documents.

    Raises:
        LlmtuneError: no format fits, or more than one does; the message names the options.
    """
    rows = _first_rows(given, GUESSED_FROM_ROWS)
    if format is not None:
        if format not in FORMATS:
            raise LlmtuneError(f"--format {format}: expected one of {', '.join(FORMATS)}")
        given = given.model_copy(update={"format": format, "columns": dict(columns or {})})
        return _with_render(given, tokenizer)
    if columns:
        return _with_render(_by_columns(given, columns, rows), tokenizer)
    if not rows:
        return _named(given, rows, tokenizer)
    candidates = {
        name: found
        for name, member in FORMATS.items()
        if (found := _match_columns(rows[0], name, member.aliases)) is not None
    }
    if _fits_as_it_is(rows):
        named = _named(given, rows, tokenizer)
        is_document = named.format in FORMATS and not FORMATS[named.format].has_answers
        if is_document and not is_text and any(len(row) > 1 for row in rows):
            _refuse_unread_labels(given)
        return named
    if not candidates:
        return _with_render(_by_content(given, rows, tokenizer), tokenizer)
    # The format that reads most of the columns; of equals, the likeliest.
    best = max(candidates, key=lambda name: len(candidates[name]))
    found = _with_names(best, dict(candidates[best]), rows)
    return _with_render(_renamed(given, best, found), tokenizer)


def explain(source: SourceConfig, reason: str, asked: str | None = None) -> str:
    """Say how the format was recognized; `asked` is what the user says it is."""
    if not source.columns:
        return reason.replace(
            "set in the config", "as --format says" if asked else "found in the rows"
        )
    names = ", ".join(f"{column} as {name}" for name, column in source.columns.items())
    return reason.replace("set in the config", f"guessed from the columns: {names}")


def find_label_names(source: SourceConfig, labels: Sequence[str]) -> tuple[str, ...]:
    """Return the names of whole-number labels, as a Parquet or Arrow file of a data set has them.

    Empty if the labels are not whole numbers from 0 up, or no names are there.
    """
    if not all(label.isdecimal() for label in labels) or is_hub_id(source.path):
        return ()
    answer = FORMATS[source.format].required[1]
    names = read_class_names(find_files(source.path)[0], source.columns.get(answer, answer))
    return names if max(map(int, labels)) < len(names) else ()


def _first_rows(source: SourceConfig, count: int) -> list[dict[str, Any]]:
    return [
        parsed[1]
        for _, parsed in itertools.islice(iter_raw_rows(source), count)
        if not isinstance(parsed, RowProblem)
    ]


def _renamed(source: SourceConfig, name: str, columns: Mapping[str, str]) -> SourceConfig:
    renamed = {key: column for key, column in columns.items() if key != column}
    return source.model_copy(update={"format": name, "columns": renamed})


def _by_columns(
    source: SourceConfig, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> SourceConfig:
    """Return the source in the format that has all the names on the left of `--columns`."""
    for read in (_own_name, _alias):
        for name, member in FORMATS.items():
            found = {read(member, key): column for key, column in columns.items()}
            if None in found or len(found) < len(columns):
                continue
            have = {*found, *(key for row in rows[:1] for key in row)}
            if all(key in have for key in member.required):
                return _renamed(source, name, {str(key): value for key, value in found.items()})
    missing = [column for column in columns.values() if rows and column not in rows[0]]
    named = source.model_copy(update={"columns": dict(columns)})
    if missing:
        found_names = ", ".join(map(str, rows[0]))
        raise LlmtuneError(f"--columns: {missing[0]!r} is not a column; found {found_names}")
    return _named(named, rows, None)


def _own_name(member: Any, key: str) -> str | None:
    return key if key in member.columns else None


def _alias(member: Any, key: str) -> str | None:
    return next((name for name, others in member.aliases.items() if key in others), None)


def _with_names(
    name: str, columns: dict[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Take the column of a label's names in place of its numbers: `label_text` beside `label`."""
    if not FORMATS[name].takes_instruction:
        return columns
    answer = FORMATS[name].required[1]
    label = columns.get(answer, answer)
    texts = (f"{label}{end}" for end in NAME_ENDS)
    text = next((column for column in texts if column in rows[0]), None)
    numbers = all(_is_number(row.get(label)) for row in rows)
    return columns | {answer: text} if text is not None and numbers else columns


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal())


def _by_content(
    source: SourceConfig, first: Sequence[Mapping[str, Any]], tokenizer: Any
) -> SourceConfig:
    """Return the source as a text with its label or its JSON, found by what the columns hold.

    Raises:
        LlmtuneError: which columns to take is not clear.
    """
    rows = _first_rows(source, CONTENT_ROWS)
    if len(rows) < FEWEST_ROWS:
        return _named(source, first, tokenizer)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts, labels, objects = (
        [column for column in columns if holds([row.get(column) for row in rows])]
        for holds in (_hold_texts, _hold_labels, _hold_json)
    )
    texts = [column for column in texts if column not in objects]
    asking = next(name for name, member in FORMATS.items() if member.takes_instruction)
    prompt, answer = FORMATS[asking].required[:2]
    if len(labels) > 1:
        labels = [column for column in labels if column.lower() in LABELS] or labels
    answers = objects or labels
    for column in answers:
        if any(row.get(column) == column for row in rows):
            raise LlmtuneError(
                f"{source.path}: the first line seems to be a row ({column!r} is a value of other "
                "rows, too); write the columns' names into a line above it, such as text,label"
            )
    if len(texts) == 1 and len(answers) == 1:
        return _renamed(source, asking, {prompt: texts[0], answer: answers[0]})
    if len(texts) > 1 and len(answers) == 1:
        raise LlmtuneError(
            f"{source.path}: the texts to read could be {' or '.join(texts)}; say which with "
            f"--columns text={texts[-1]},label={answers[0]}"
        )
    if len(texts) == 1 and len(answers) > 1:
        raise LlmtuneError(
            f"{source.path}: the answers to learn could be {' or '.join(answers)}; say which with "
            f"--columns text={texts[0]},label={answers[0]}"
        )
    return _named(source, first, tokenizer)


def _refuse_unread_labels(source: SourceConfig) -> None:
    """Ask what short texts are for if a column beside them holds objects or seems to hold labels.

    Raises:
        LlmtuneError: it names the columns, and the options that decide.
    """
    rows = _first_rows(source, CONTENT_ROWS)
    texts = [row["text"] for row in rows if isinstance(row.get("text"), str)]
    if len(rows) < FEWEST_ROWS or sum(map(len, texts)) > SHORT_TEXT * len(texts):
        return
    columns = dict.fromkeys(str(key) for row in rows for key in row)
    unread = {"text", *source.ignore}
    beside = [name for name in columns if name not in unread and name.lower() not in METADATA]
    objects, labels = (
        [name for name in beside if holds([row.get(name) for row in rows])]
        for holds in (_hold_json, _hold_labels)
    )
    if objects or labels:
        what = "objects to extract" if objects else "labels to learn"
        found = objects or labels
        raise LlmtuneError(
            f"{source.path}: {' or '.join(found)} beside text could be {what}; say so "
            f"with --columns text=text,label={found[0]}, or --task text to train on the texts "
            "alone"
        )


def _hold_texts(values: Sequence[Any]) -> bool:
    texts = [value for value in values if isinstance(value, str) and _is_prose(value)]
    if len(texts) < 0.9 * len(values):
        return False
    mean = sum(map(len, texts)) / len(texts)
    return mean >= SHORTEST_TEXT and len(set(texts)) > len(texts) / 2 and not _hold_json(values)


def _is_prose(value: str) -> bool:
    """Whether a value may be a text to read: no date, number, address or name of a record."""
    letters = sum(map(str.isalpha, value))
    is_one_word = value.isascii() and len(value.split()) == 1
    return 2 * letters > len("".join(value.split())) and not is_one_word


def _hold_labels(values: Sequence[Any]) -> bool:
    plain = [value for value in values if isinstance(value, str | int) and value != ""]
    if len(plain) < 0.9 * len(values) or any(len(str(each)) > LONGEST_VALUE for each in plain):
        return False
    return 2 <= len(set(plain)) <= len(plain) / ROWS_A_VALUE


def _hold_json(values: Sequence[Any]) -> bool:
    held = 0
    for value in values:
        if isinstance(value, str) and value.lstrip()[:1] == "{":
            try:
                value = parse_json(value)
            except (ValueError, RecursionError):
                continue
        held += isinstance(value, dict)
    return bool(values) and held >= 0.95 * len(values)


def _named(source: SourceConfig, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> SourceConfig:
    """Return the source with the format that its rows have by their own names."""
    if not rows:
        return source
    try:
        name = choose_format(source, rows).format.name
    except LlmtuneError as error:
        hint = PAIRS_HINT if {"chosen", "rejected"} <= set(rows[0]) else HINT
        raise LlmtuneError(f"{error}\n{hint}") from None
    return _with_render(source.model_copy(update={"format": name}), tokenizer)


def _with_render(source: SourceConfig, tokenizer: PreTrainedTokenizerFast | None) -> SourceConfig:
    """A base without a chat template takes a prompt and its completion as plain text."""
    has_template = tokenizer is None or bool(tokenizer.chat_template)
    if not has_template and source.format in FORMATS and FORMATS[source.format].has_plain_form:
        return source.model_copy(update={"render": "plain"})
    return source


def _fits_as_it_is(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a format recognizes the rows by their own names, and reads what may matter.

    A text with a label beside it is not a text, and a text column beside an instruction is it
    once more.
    """
    first = rows[:10]
    fitting = [name for name in FORMATS if any(_fits(name, row) for row in first)]
    if fitting == ["text"]:
        return not any(str(column).lower() in LABELS for row in first for column in row)
    renamed = ("system_prompt", "system_message", "functions")
    return bool(fitting) and not any(column in row for row in first for column in renamed)


def _fits(name: str, row: Mapping[str, Any]) -> bool:
    return FORMATS[name]().recognizes(row)


def _match_columns(
    row: Mapping[str, Any], name: str, wanted: Mapping[str, tuple[str, ...]]
) -> dict[str, str] | None:
    """Return `format's name: row's name` of every column found; None if a required one is not."""
    given = {str(key).lower(): str(key) for key in row}
    columns: dict[str, str] = {}
    for column, names in wanted.items():
        free = (given[n] for n in names if n in given and given[n] not in columns.values())
        match = next(free, None)
        if match is not None:
            columns[column] = match
        elif column in FORMATS[name].required:
            return None
    renamed = rename_columns(row, {name: key for name, key in columns.items() if name != key})
    return columns if _fits(name, renamed) else None
