"""JSON as the standard has it: no key twice, no NaN, and why a text is not JSON in words."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {doubled!r} stands twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


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
