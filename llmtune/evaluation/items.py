"""Reading a suite's items: JSONL, JSON, CSV, Parquet, or a folder of files."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmtune.data.files import file_kind, iter_file, sniff_reading
from llmtune.data.problems import RowProblem, list_first
from llmtune.data.rows import find_files
from llmtune.errors import LlmtuneError
from llmtune.evaluation.tasks.base import BadItem, SuiteConfig, SuiteItem, read_field

JSON_LINES = ("", ".ndjson", ".jsonl")
TEXTS = (".txt", ".md")
DOCUMENT = "document"
"""The field that a row of a folder gets beside its own: its file, as seen from the folder."""

Row = tuple[int, Mapping[str, Any]] | RowProblem


def read_items(config: SuiteConfig, path: Path) -> tuple[SuiteItem, ...]:
    """Read and check every row of a suite's items.

    Raises:
        LlmtuneError: the file is missing or empty, or rows are wrong (`file:line: what`, up to
            ten of them and how many more).
    """
    if not path.exists():
        raise LlmtuneError(f"{path}: the suite's items are not there")
    config.check_templates(path)
    items: list[SuiteItem] = []
    problems: list[str] = []
    for row in _iter_rows(path):
        if isinstance(row, RowProblem):
            problems.append(str(row))
            continue
        line, fields = row
        source = path if DOCUMENT not in fields or path.is_file() else path / fields[DOCUMENT]
        try:
            items.append(_read_item(config, fields, line, source))
        except BadItem as error:
            problems.append(f"{source}:{line}: {error}")
    names = Counter(item.id for item in items)
    for item in items:
        if names[item.id] > 1:
            problems.append(f"{item.source}:{item.line}: the id {item.id!r} is not unique")
    if problems:
        raise LlmtuneError("\n".join(list_first(problems)))
    if not items:
        raise LlmtuneError(f"{path}: the suite has no items")
    try:
        return config.settle_items(items)
    except BadItem as error:
        raise LlmtuneError(f"{path}: {error}") from None


def _iter_rows(path: Path) -> Iterator[Row]:
    """Yield each row with its line; a row of a folder has its file and an id by it."""
    if path.is_file():
        yield from _iter_one(path)
        return
    for file in find_files(str(path)):
        name = file.relative_to(path).as_posix()
        for row in _iter_one(file):
            if isinstance(row, RowProblem):
                yield row
                continue
            line, fields = row
            id = name if file_kind(file) in TEXTS else f"{name}:{line}"
            yield line, {"id": id, **fields, DOCUMENT: name}


def _iter_one(path: Path) -> Iterator[Row]:
    if path.suffix.lower() in JSON_LINES:
        return iter_file(path, str(path), kind=JSON_LINES[-1])
    return iter_file(path, str(path), sniff_reading(path))


def _read_item(
    config: SuiteConfig, fields: Mapping[str, Any], line: int, source: Path
) -> SuiteItem:
    item = SuiteItem(
        id=str(fields.get(config.id, line)),
        line=line,
        source=str(source),
        cluster=None if config.cluster is None else str(read_field(fields, config.cluster)),
        slices=tuple((name, str(read_field(fields, name))) for name in config.slices),
    )
    return config.read_item(fields, item)
