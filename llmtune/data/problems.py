"""What is wrong with a row, said so that the user can find it and mend it."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.errors import LlmtuneError

LISTED_PROBLEMS = 10


@dataclass(frozen=True)
class RowProblem:
    """A row that cannot be used: where it is, and what was found and expected there."""

    source: str
    line: int
    message: str
    kind: str = "row"
    """A short name of the fault, for grouping: `role`, `content`, `json`, ..."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.message}"


Parsed = tuple[int, dict[str, Any]] | RowProblem
"""A row of a file with its line, or why it cannot be read."""


class RowError(Exception):
    """Raised while one row is converted; the reader turns it into a `RowProblem`."""

    def __init__(self, message: str, kind: str = "row") -> None:
        super().__init__(message)
        self.kind = kind


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return ` (did you mean "user"?)` for a near miss, else an empty string."""
    near = difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=0.6)
    return f' (did you mean "{near[0]}"?)' if near else ""


def shorten(value: object, limit: int = 60) -> str:
    """Return `value` as short one-line text for a message."""
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."


def list_first(
    lines: Sequence[object], shown: int = LISTED_PROBLEMS, *, count: int = 0, indent: str = ""
) -> list[str]:
    """Return the first lines, and one that counts the rest.

    Args:
        count: how many there are, if `lines` does not hold them all.
    """
    more = max(count, len(lines)) - min(shown, len(lines))
    tail = [f"... and {more:,} more"] if more > 0 else []
    return [f"{indent}{line}" for line in (*lines[:shown], *tail)]


def name_first(names: Sequence[str], shown: int, separator: str = ", ") -> str:
    """Return the first names in one line, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{separator.join(names[:shown])}{more}"


def bad_rows_error(problems: Sequence[RowProblem], num_bad: int, num_read: int) -> LlmtuneError:
    """Return the error that names the first bad rows and counts the rest."""
    lines = list_first(problems, count=num_bad)
    advice = "Mend them, or leave them out with data.on_bad_row=drop (they are counted and listed)."
    return LlmtuneError(
        "\n".join([f"{num_bad} of {num_read} rows cannot be used:", *lines, advice])
    )
