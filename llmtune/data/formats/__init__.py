"""One file per dataset format: a row becomes a conversation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.data.formats.base import DatasetFormat, Row
from llmtune.data.formats.completion import CompletionFormat
from llmtune.data.formats.instruction import InstructionFormat
from llmtune.data.formats.messages import MessagesFormat
from llmtune.data.formats.sharegpt import ShareGptFormat
from llmtune.data.formats.text import TextFormat
from llmtune.data.problems import RowError, did_you_mean
from llmtune.errors import LlmtuneError

if TYPE_CHECKING:
    from llmtune.data.config import SourceConfig

FORMATS: dict[str, type[DatasetFormat]] = {
    member.name: member
    for member in (
        MessagesFormat,
        ShareGptFormat,
        InstructionFormat,
        CompletionFormat,
        TextFormat,
    )
}


@dataclass(frozen=True)
class FormatChoice:
    """Which format a source has, and why, in words for the terminal."""

    format: DatasetFormat
    reason: str


def choose_format(source: "SourceConfig", rows: Sequence[Row]) -> FormatChoice:
    """Return the format of `source`: the one it names, or the one its first `rows` have.

    Raises:
        LlmtuneError: no format fits, or more than one does (all candidates are named).
    """
    if source.format != "auto":
        return FormatChoice(
            FORMATS[source.format].of(source), f"{source.format} (set in the config)"
        )
    renamed = [rename_columns(row, source.columns) for row in rows]
    # A bad row must not hide the format of the others, so the most frequent answer is taken.
    votes = {
        name: sum(FORMATS[name].of(source).recognizes(row) for row in renamed) for name in FORMATS
    }
    most = max(votes.values(), default=0)
    found = [name for name, count in votes.items() if count == most]
    if most == 0:
        raise LlmtuneError(_nothing_fits(source, renamed))
    if len(found) > 1:
        candidates = ", ".join(found)
        raise LlmtuneError(
            f"{source.path}: the rows fit more than one format: {candidates}. "
            f"Say which in the config, for example format: {found[0]}"
        )
    name = found[0]
    if source.render == "plain" and not FORMATS[name].has_plain_form:
        raise LlmtuneError(
            f"{source.path}: render: plain joins a prompt and a completion; the rows are {name}. "
            "Leave render out"
        )
    needed = ", ".join(FORMATS[name].required)
    return FormatChoice(
        FORMATS[name].of(source),
        f"{name} (found in the rows: {needed}; {most} of {len(rows)} looked at)",
    )


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Return `row` with each source column under the format's name for it."""
    if not columns:
        return row
    moved = set(columns.values())
    renamed = {key: value for key, value in row.items() if key not in moved}
    renamed |= {name: row[column] for name, column in columns.items() if column in row}
    return renamed


def name_columns(error: RowError, columns: Mapping[str, str]) -> RowError:
    """Return what is wrong with a row, under the file's own name of the column at its beginning."""
    name, space, rest = str(error).partition(" ")
    column = columns.get(name, name)
    if column == name:
        return error
    return RowError(f"{column} (read as {name}){space}{rest}", error.kind)


def check_columns(source: "SourceConfig", choice: FormatChoice, rows: Sequence[Row]) -> None:
    """Refuse a `columns` entry that the format does not have, or that none of `rows` has."""
    given = list(dict.fromkeys(str(key) for row in rows for key in row))
    for name, column in source.columns.items():
        if name not in choice.format.columns:
            known = choice.format.columns
            raise LlmtuneError(
                f"{source.path}: columns names {name!r}, which the format "
                f"{choice.format.name} does not have{did_you_mean(name, known)}; it reads "
                f"{', '.join(known)}"
            )
        if given and column not in given and name not in choice.format.required:
            raise LlmtuneError(
                f"{source.path}: columns takes {name} from {column!r}, which none of the first "
                f"{len(rows)} rows has{did_you_mean(column, given)}; found {', '.join(given)}"
            )


def unread_columns(source: "SourceConfig", choice: FormatChoice, rows: Sequence[Row]) -> list[str]:
    """Return the columns of `rows` that the format makes no use of."""
    renamed = {str(key) for row in rows for key in rename_columns(row, source.columns)}
    return sorted(renamed - set(choice.format.columns))


def missing_column(choice: FormatChoice, row: Row, source: "SourceConfig") -> str | None:
    """Return what to say when `row` (columns renamed) lacks one that the format needs."""
    for name in choice.format.required:
        if name not in row:
            column = source.columns.get(name, name)
            given = [source.columns.get(str(key), str(key)) for key in row]
            found = ", ".join(given) or "no columns"
            return (
                f"no column {column!r}; found {found}; format {choice.format.name} needs "
                f"{', '.join(choice.format.required)}{did_you_mean(column, given)}"
            )
    return None


def _nothing_fits(source: "SourceConfig", rows: Sequence[Row]) -> str:
    found = list(dict.fromkeys(str(key) for row in rows for key in row))
    if {"chosen", "rejected"} <= set(found):
        return (
            f"{source.path}: its rows are preference pairs (chosen, rejected), and llmtune trains "
            "on answers alone. To train on the chosen ones say what they are, for example "
            "format: completion, columns: {prompt: prompt, completion: chosen} and "
            "ignore: [rejected]"
        )
    lines = [
        f"{source.path}: no format fits its columns ({', '.join(found) or 'none'}).",
        "Expected one of:",
    ]
    lines += [f"  {name}: {', '.join(member.required)}" for name, member in FORMATS.items()]
    hints = [
        f"{name}: {column}"
        for member in FORMATS.values()
        for name in member.required
        for column in found
        if did_you_mean(column, [name])
    ]
    example = hints[0] if hints else "instruction: your_column"
    lines.append(f"Say which column is which, for example columns: {{{example}}} and format: ...")
    return "\n".join(lines)
