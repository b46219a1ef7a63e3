"""Which format a user's own rows have, and which of their columns it reads, guessed from names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.data.config import SourceConfig
from llmtune.data.formats import FORMATS, choose_format, rename_columns
from llmtune.data.formats.base import LABELS
from llmtune.data.problems import RowProblem
from llmtune.data.rows import iter_raw_rows
from llmtune.errors import LlmtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GUESSED_FROM_ROWS = 100


def guess_source(
    path: str,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> SourceConfig:
    """Return a source with its format named, and its columns mapped if they have other names.

    Args:
        format: what the user says it is; None guesses.
        columns: what the user says is where, as `format's name: file's name`.

    Raises:
        LlmtuneError: no format fits, or more than one does; the message names the options.
    """
    given = SourceConfig(path=path, columns=dict(columns or {}))
    rows = [
        parsed[1]
        for _, parsed in itertools.islice(iter_raw_rows(given), GUESSED_FROM_ROWS)
        if not isinstance(parsed, RowProblem)
    ]
    if format is not None:
        if format not in FORMATS:
            raise LlmtuneError(f"--format {format}: expected one of {', '.join(FORMATS)}")
        return _with_render(given.model_copy(update={"format": format}), tokenizer)
    if columns or not rows:
        return _named(given, rows, tokenizer)
    candidates = {
        name: found
        for name, member in FORMATS.items()
        if (found := _match_columns(rows[0], name, member.aliases)) is not None
    }
    if not candidates or _fits_as_it_is(rows):
        return _named(given, rows, tokenizer)
    # The format that reads most of the columns; of equals, the likeliest.
    best = max(candidates, key=lambda name: len(candidates[name]))
    renamed = {name: column for name, column in candidates[best].items() if name != column}
    source = SourceConfig(path=path, format=best, columns=renamed)
    return _with_render(source, tokenizer)


def explain(source: SourceConfig, reason: str) -> str:
    """Say how the columns were recognized, if not by the format's own names."""
    if not source.columns:
        return reason
    names = ", ".join(f"{column} as {name}" for name, column in source.columns.items())
    return reason.replace("set in the config", f"guessed from the columns: {names}")


def _named(source: SourceConfig, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> SourceConfig:
    """Return the source with the format that its rows have by their own names."""
    if not rows:
        return source
    try:
        name = choose_format(source, rows).format.name
    except LlmtuneError as error:
        raise LlmtuneError(
            f"{error}\nWith init: --format NAME, and --columns instruction=problem,output=solution"
        ) from None
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
