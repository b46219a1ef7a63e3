"""Nested parts of the rows that training saw, written as files for a learning curve."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.data.config import SourceConfig
from llmtune.data.example import ExampleTable
from llmtune.data.problems import RowProblem
from llmtune.data.rows import iter_raw_rows, open_source
from llmtune.io.fingerprint import hash_text
from llmtune.io.run_dir import atomic_write_text

Place = tuple[int, str, int]
"""A row by its source's number, its file and its line."""


@dataclass(frozen=True)
class SeenRow:
    """A row as its file holds it, and how often one epoch shows it."""

    source_index: int
    content: str
    times: int


def seen_places(table: ExampleTable, trained: Sequence[int], *, is_split: bool) -> Counter[Place]:
    """Return how often training saw each row in an epoch.

    Args:
        trained: the examples it saw, by their place.
        is_split: one row may have become several examples; it is then counted once.
    """
    places: Counter[Place] = Counter()
    files = table.columns["files"]
    for index in trained:
        file = table.file_names[files[index]]
        line = int(table.columns["lines"][index])
        places[int(table.source_indices[index]), file, line] += 1
    return Counter(dict.fromkeys(places, 1)) if is_split else places


def order_rows(sources: Sequence[SourceConfig], places: Counter[Place]) -> list[SeenRow]:
    """Read the rows at `places` and order them by a hash of their content: any prefix is nested.

    Raises:
        LlmtuneError: a source cannot be read any more.
    """
    rows = []
    for index, source in enumerate(sources):
        for file, parsed in iter_raw_rows(source):
            if isinstance(parsed, RowProblem):
                continue
            line, values = parsed
            if times := places[index, file, line]:
                rows.append(SeenRow(index, _as_json(values), times))
    return sorted(rows, key=lambda row: (hash_text(row.content), row.source_index))


def write_part(
    sources: Sequence[SourceConfig], rows: Sequence[SeenRow], directory: Path
) -> list[SourceConfig]:
    """Write rows as one JSONL a source and return the sources that name them, read whole.

    What mixing did is in the rows: one that an epoch showed twice is there twice.
    """
    written = []
    for index, source in enumerate(sources):
        lines = [row.content for row in rows if row.source_index == index for _ in range(row.times)]
        if not lines:
            continue
        path = directory / f"source-{index}.jsonl"
        atomic_write_text(path, "\n".join(lines) + "\n")
        written.append(
            SourceConfig(
                path=str(path),
                format=open_source(source).format.format.name,
                columns=source.columns,
                render=source.render,
            )
        )
    return written


def _as_json(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=str)
