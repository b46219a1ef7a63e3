"""Single values of a row: text, a weight, JSON as the standard has it; each checked."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from llmtune.data.problems import RowError, shorten


def check_text(value: Any, where: str) -> str:
    """Return `value` where it is text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise RowError(f"{where} is {shorten(value)}; expected text", "content")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where} holds half of a character pair at position {error.start} "
            f"({shorten(value[error.start])}); expected valid Unicode",
            "unicode",
        ) from None
    return value


def write_answer(value: Any, where: str) -> str:
    """Return an answer as text: an object or a list as JSON, a whole number as its digits."""
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return check_text(value, where)


def read_weight(value: Any, where: str = "weight") -> float:
    """Return a loss weight: a number that is not negative."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RowError(f"{where}: weight is {shorten(value)}; expected a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise RowError(
            f"{where}: weight is {shorten(value)}; expected a number from 0 up", "weight"
        )
    return float(value)


def parse_json_text(value: Any, where: str) -> Any:
    """Return `value`, parsed where it is JSON text (CSV and Parquet often hold lists so)."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except (ValueError, RecursionError) as error:
            raise RowError(
                f"{where} is text that is not JSON ({json_reason(error)}): {shorten(value)}"
            ) from None
    return value


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {doubled!r} is there twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value; quote it if it is a text")


DECODER = json.JSONDecoder(object_pairs_hook=_refuse_doubles, parse_constant=_refuse_constant)
"""Where Python's own decoder would keep one of two values of a key, this one raises."""


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    return DECODER.decode(text)


def json_reason(error: Exception) -> str:
    """Return why a text is not JSON, in words."""
    return str(error) if isinstance(error, ValueError) else "nested too deeply"
