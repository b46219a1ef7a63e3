"""Nested results of other stages as flat rows of a label and a value, made readable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.data.problems import name_first
from llmtune.reporting.numbers import FRACTION, format_bytes, format_number, format_seconds

HASH_ENDINGS = ("fingerprint", "hash", "sha256")
MAX_LISTED = 6
ABBREVIATIONS = {"kl": "KL", "id": "ID", "sha256": "SHA-256", "top1": "top-1", "p50": "median"}


@dataclass(frozen=True)
class Fact:
    """One row: a label in words and a value as written."""

    label: str
    value: str


def list_facts(value: Mapping[str, Any], *, without: Sequence[str] = ()) -> tuple[Fact, ...]:
    """Return every single value of a nested mapping, labelled by its path of keys.

    Lists of single values become one row; lists of mappings are left to the caller, as are keys
    in `without`, and so are absent (None) values. Hashes are left out: they have their own table.
    """
    facts: list[Fact] = []
    for key, inner in value.items():
        if key in without or inner is None or str(key).endswith(HASH_ENDINGS):
            continue
        if isinstance(inner, Mapping):
            nested = list_facts(inner, without=without)
            facts += [Fact(f"{format_label(key)}: {f.label}", f.value) for f in nested]
        elif isinstance(inner, list | tuple):
            if inner and not any(isinstance(each, Mapping | list | tuple) for each in inner):
                facts.append(Fact(format_label(key), _format_list(inner)))
        else:
            facts.append(Fact(format_label(key, inner), format_value(key, inner)))
    return tuple(facts)


def format_label(key: str, value: Any = None) -> str:
    """Turn a key into words: `top1_agreement` becomes `top-1 agreement`; a unit's suffix goes."""
    words = str(key).removeprefix("num_").split("_")
    if len(words) > 1 and _unit(key, value) in ("bytes", "seconds"):
        words = words[:-1]
    return " ".join(ABBREVIATIONS.get(word, word) for word in words)


def format_value(key: str, value: Any) -> str:
    """Format a single value in the unit its key names (`_bytes`, `_seconds`, `agreement`)."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    unit = _unit(key, value)
    if unit == "bytes":
        return format_bytes(value)
    if unit == "seconds":
        return format_seconds(value)
    if unit == "share":
        return FRACTION.score(value)
    return format_number(value)


def _unit(key: str, value: Any) -> str | None:
    last = str(key).rpartition("_")[2]
    if last in ("bytes", "seconds"):
        return last
    is_share = last in ("agreement", "ratio", "share") and isinstance(value, float)
    return "share" if is_share and 0 <= value <= 1 else None


def _format_list(values: Sequence[Any]) -> str:
    return name_first([format_value("", each) for each in values], MAX_LISTED)
