"""From a source in the config to checked conversations, each with its file and line."""

import difflib
import glob
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from llmtune.data.config import SourceConfig
from llmtune.data.conversation import Conversation
from llmtune.data.files import file_kind, iter_file
from llmtune.data.formats import (
    FormatChoice,
    check_columns,
    choose_format,
    missing_column,
    name_columns,
    rename_columns,
    unread_columns,
)
from llmtune.data.hub import is_hub_id, iter_hub_rows, refuse_hub_knobs
from llmtune.data.overlap import conversation_key
from llmtune.data.problems import Parsed, RowError, RowProblem
from llmtune.data.unread import UnreadColumns, unread_message_keys
from llmtune.errors import LlmtuneError

DETECTION_ROWS = 100


@dataclass(frozen=True)
class LoadedRow:
    """One usable row."""

    conversation: Conversation
    source: str
    line: int

    @cached_property
    def key(self) -> bytes:
        """16 bytes that two rows share exactly when they say the same (`conversation_key`)."""
        return conversation_key(self.conversation)


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source: `format` was chosen, `rows` are still to be read."""

    format: FormatChoice
    rows: Iterator[LoadedRow | RowProblem]


def open_source(source: SourceConfig) -> SourceRows:
    """Choose the source's format and return its rows as conversations or problems, lazily.

    Raises:
        LlmtuneError: the source is missing or empty, or its format cannot be determined.
    """
    raw = iter_raw_rows(source)
    first = list(itertools.islice(raw, DETECTION_ROWS))
    if not first:
        raise LlmtuneError(f"{source.path}: holds no rows; expected at least one")
    objects = [entry[1][1] for entry in first if not isinstance(entry[1], RowProblem)]
    if not objects and source.format == "auto":
        problems = [entry[1] for entry in first]
        listed = "\n".join(str(problem) for problem in problems[:3])
        raise LlmtuneError(f"{source.path}: no row can be read:\n{listed}")
    choice = choose_format(source, objects)
    check_columns(source, choice, objects)
    watch = UnreadColumns(source, choice.format)
    renamed = [rename_columns(row, source.columns) for row in objects]
    fault = next(filter(None, map(watch.fault, renamed)), None)
    if fault is not None:
        raise LlmtuneError(f"{source.path}: {fault}")
    unread = unread_columns(source, choice, objects)
    unread += [f"{key} of messages" for key in unread_message_keys(renamed, choice.format)]
    if unread:
        choice = replace(choice, reason=f"{choice.reason}; not read: {', '.join(unread)}")
    return SourceRows(choice, _convert(itertools.chain(first, raw), source, choice, watch))


def iter_raw_rows(source: SourceConfig) -> Iterator[tuple[str, Parsed]]:
    """Yield `(file as shown, (line, row) or RowProblem)` over a source's files, up to its limit."""
    return itertools.islice(_iter_all(source), source.limit)


def find_files(path: str) -> list[Path]:
    """Return the files that a path, a directory or a glob names, sorted.

    Raises:
        LlmtuneError: nothing is there, or nothing that can be read.
    """
    here = Path(path).expanduser()
    mode = _mode(here)
    if stat.S_ISREG(mode):
        return [here]
    if stat.S_ISDIR(mode):
        files = sorted(file for file in walk_files(here) if file_kind(file))
        if not files:
            raise LlmtuneError(f"{path}: the directory holds no data file (.jsonl, .csv, ...)")
        return files
    if glob.has_magic(path):
        base = Path(here.anchor) if here.is_absolute() else Path()
        files = sorted(base.glob(str(here.relative_to(here.anchor) if here.anchor else here)))
        files = [file for file in files if file.is_file()]
        if not files:
            raise LlmtuneError(f"{path}: no file matches this pattern")
        return files
    raise LlmtuneError(_missing(path, here))


def _mode(path: Path) -> int:
    """Return a file's type and rights; 0 if nothing is there, or nothing can be so called."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def walk_files(directory: Path) -> Iterator[Path]:
    """Yield the files below a directory, through links, without hidden ones (copies, mostly)."""

    def refuse(error: OSError) -> None:
        raise LlmtuneError(f"{error.filename}: cannot be read: {error.strerror}") from error

    seen: set[str] = set()
    for here, folders, names in os.walk(directory, onerror=refuse, followlinks=True):
        if os.path.realpath(here) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = (Path(here, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _iter_all(source: SourceConfig) -> Iterator[tuple[str, Parsed]]:
    if is_hub_id(source.path):
        for found in iter_hub_rows(source):
            yield source.path, found
        return
    refuse_hub_knobs(source)
    for file in find_files(source.path):
        for parsed in iter_file(file, str(file), source.reading):
            yield str(file), parsed


def _convert(
    entries: Iterator[tuple[str, Parsed]],
    source: SourceConfig,
    choice: FormatChoice,
    watch: UnreadColumns,
) -> Iterator[LoadedRow | RowProblem]:
    for file, parsed in entries:
        if isinstance(parsed, RowProblem):
            yield parsed
            continue
        line, given = parsed
        row = rename_columns(given, source.columns)
        missing = missing_column(choice, row, source)
        if missing is not None:
            yield RowProblem(file, line, missing, "column")
            continue
        fault = watch.fault(row)
        if fault is not None:
            yield RowProblem(file, line, fault, "column")
            continue
        try:
            yield LoadedRow(choice.format.to_conversation(row), file, line)
        except RowError as error:
            named = name_columns(error, source.columns)
            yield RowProblem(file, line, str(named), named.kind)


def _missing(path: str, here: Path) -> str:
    folder = here.parent
    if os.path.lexists(here):
        what = "a link that leads nowhere" if here.is_symlink() else "a pipe or a device"
        return f"{path}: {what}, not a file; rows are read more than once, so expected a file"
    if not folder.is_dir():
        return f"{path}: no such file; there is no directory {folder.absolute()}"
    names = [entry.name for entry in folder.iterdir()]
    near = difflib.get_close_matches(here.name, names, n=1, cutoff=0.6)
    hint = f" (did you mean {folder / near[0]}?)" if near else ""
    where = "" if here.is_absolute() else f" in {folder.absolute()}"
    return f"{path}: no such file{where}{hint}; expected a file, a directory, a glob or a hub id"
