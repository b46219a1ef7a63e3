"""Marks on a message that say whether it is trained, in the words that tools use for them."""

import re
from collections.abc import Mapping
from typing import Any

from llmtune.data.problems import RowError, shorten
from llmtune.data.row_values import read_weight

MARKS = {
    "train": "a turn that is trained",
    "training": "the same",
    "trainable": "the same",
    "loss": "the same",
    "masked": "a turn that is not trained",
    "weight": "what a turn's loss is multiplied by",
    "loss_weight": "the same",
}
"""Every key of a message that says what is trained, with its meaning."""

_FLAGS = {"train": True, "training": True, "trainable": True, "loss": True, "masked": False}
"""Key -> whether `true` means that the turn is trained."""
_WEIGHTS = ("weight", "loss_weight")
_LIKE_A_MARK = re.compile(
    r"(^|_)(loss|train|training|trained|trainable|mask|masked|weight|weights|ignore|ignored|label)(_|$)"
)


def looks_like_mark(key: str) -> bool:
    """Whether a key seems to say what is trained."""
    return _LIKE_A_MARK.search(key.lower()) is not None


def read_marks(message: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """Return a message's marks as `train` and `weight`, whatever they are called in the file.

    Raises:
        RowError: a mark's value is not one, two of them disagree, a mark is not known, or it asks
            to train a turn that is not the assistant's.
    """
    for key, value in message.items():
        if key not in MARKS and value is not None and looks_like_mark(str(key)):
            raise RowError(
                f"{where} has {key!r}, which may say whether it is trained and is not known; "
                f"expected one of {', '.join(MARKS)}",
                "train",
            )
    marks: dict[str, Any] = {}
    flags = {
        key: _read_flag(message[key], key, where) is trained
        for key, trained in _FLAGS.items()
        if message.get(key) is not None
    }
    if len(set(flags.values())) > 1:
        raise RowError(f"{where}: {' and '.join(flags)} disagree on whether it is trained", "train")
    if flags:
        marks["train"] = next(iter(flags.values()))
        if marks["train"] and role != "assistant":
            key = next(iter(flags))
            raise RowError(
                f"{where}: {key} is {str(_FLAGS[key]).lower()}; only assistant messages are "
                "trained",
                "train",
            )
    weights = {
        key: read_weight(message[key], where) for key in _WEIGHTS if message.get(key) is not None
    }
    if len(set(weights.values())) > 1:
        raise RowError(f"{where}: {' and '.join(weights)} are different numbers", "weight")
    if weights:
        marks["weight"] = next(iter(weights.values()))
        if role != "assistant" and marks["weight"] not in (0.0, 1.0):
            raise RowError(
                f"{where}: weight is {marks['weight']}; only assistant messages are trained",
                "weight",
            )
    return marks


def _read_flag(value: Any, key: str, where: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise RowError(f"{where}: {key} is {shorten(value)}; expected true or false", "train")
