"""Single values of a row: text, a weight, JSON inside text; each checked and told apart."""

from __future__ import annotations

from typing import Any

from llmtune.data.problems import RowError, shorten
from llmtune.data.strict_json import json_reason, parse_json


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
