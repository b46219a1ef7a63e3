"""An arm's result on one suite, with every item's score, in memory and on disk."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject, hash_json
from llmtune.io.json_files import read_json_object
from llmtune.io.run_dir import atomic_write_json
from llmtune.models.thinking import split_thinking

LM_EVAL_TASK = "lm-eval"
"""The `task` of a result that lm-evaluation-harness made."""

REUSED = "reused"
"""Key of a result's `about`: its scores were measured by an earlier run, of the same base."""

AGAIN = "remove the file and measure it again: llmtune eval RUN"
NAME_RULE = "letters, digits, `_`, `-` and `.`, no dot or dash first"
"""What the name of a suite may be made of: it is part of the names of result files."""


@dataclass(frozen=True)
class ItemScore:
    """One item's score.

    `parsed` is false where no answer could be read from what was generated. `weight` is what the
    item counts in a mean (perplexity: tokens or bytes; else 1). `details` holds what the score was
    computed from: log-likelihoods of the choices, or sums and counts.
    """

    id: str
    score: float
    prediction: str | None
    answer: str | None
    cluster: str | None = None
    weight: float = 1.0
    parsed: bool = True
    slices: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


class Recipe(TypedDict, total=False):
    """Everything that must be the same for two results to be comparable."""

    items: str
    num_items: int
    scoring: JsonObject
    """The suite's declaration, or the harness's task."""
    template: str
    demonstrations: str
    base: str
    precision: Mapping[str, str]
    versions: Mapping[str, str]
    selection: str
    """Of the items, if not all of the suite were asked."""
    metric: JsonObject
    """What decides scores beside the declaration: the user's own code."""
    prompt: str
    probe: JsonObject
    """Where in the model a probe reads."""


@dataclass(frozen=True)
class KeptAnswer:
    """What a model wrote to an item's chat, and how it was asked, so that it can be asked again."""

    text: str
    max_tokens: int
    stops: tuple[str, ...] = ()
    is_beginning: bool = False
    """Whether only the beginning of what it writes is known."""

    def is_said_by(self, text: str) -> bool:
        """Whether a model wrote the same."""
        said, kept = (
            str(split_thinking({"content": each})["content"]) for each in (text, self.text)
        )
        return said.strip().startswith(kept.strip()) if self.is_beginning else said == kept


@dataclass(frozen=True)
class ArmResult:
    """One model's scores on one suite.

    `mean` is weighted by the items' weights; `standard_error` is clustered where the suite is, and
    None for a single item. `majority` is the accuracy of always giving the commonest answer,
    `chance` that of guessing; None if a task has no such thing. `recipe` is everything that must
    be the same for two results to be comparable, `model` the identity of what was scored; `about`
    holds free facts of the arm (shots, strength, layer).
    """

    suite: str
    task: str
    role: str
    description: str
    arm: str
    metric: str
    higher_is_better: bool
    n: int
    mean: float
    standard_error: float | None
    unparseable: int
    majority: float | None
    chance: float | None
    recipe: Recipe
    recipe_hash: str
    model: JsonObject
    seconds: float
    items: tuple[ItemScore, ...]
    about: dict[str, Any] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)
    """Scores beside the suite's metric, as its task names them."""


def arm_result_path(results_dir: Path, suite: str, arm: str) -> Path:
    """Return where an arm's result on a suite is kept."""
    return results_dir / f"{suite}.{arm}.json"


def save_arm_result(result: ArmResult, results_dir: Path) -> Path:
    """Write a result whole or not at all and return its path."""
    path = arm_result_path(results_dir, result.suite, result.arm)
    atomic_write_json(path, asdict(result))
    return path


def read_arm_result(path: Path) -> ArmResult:
    """Read a result that `save_arm_result` wrote.

    Raises:
        LlmtuneError: the file is missing, is not JSON, lacks a key, has no items, or one of its
            numbers is not a number.
    """
    if not path.exists():
        raise LlmtuneError(f"{path}: no such result; run `llmtune eval` first")
    values = read_json_object(path, advice=AGAIN)
    _require_keys(path, values, ArmResult)
    items = read_items(path, values["items"])
    if values["n"] != len(items):
        raise LlmtuneError(f"{path}: says n = {values['n']} and holds {len(items)} items; {AGAIN}")
    if not _is_number(values["mean"]):
        raise LlmtuneError(f"{path}: mean is {values['mean']!r}, not a number; {AGAIN}")
    return ArmResult(**{**values, "items": items})


def read_items(path: Path, values: object) -> tuple[ItemScore, ...]:
    """Return the items' scores that a file holds.

    Raises:
        LlmtuneError: there are none, one lacks a key, or one of its numbers is not a number.
    """
    if not isinstance(values, list) or not values:
        raise LlmtuneError(f"{path}: holds no items; {AGAIN}")
    for item in values:
        _require_keys(path, item, ItemScore)
        for name in ("score", "weight"):
            if not _is_number(item.get(name, 1.0)):
                raise LlmtuneError(
                    f"{path}: item {item['id']!r}: {name} is {item[name]!r}, not a number; {AGAIN}"
                )
    return tuple(ItemScore(**item) for item in values)


def _require_keys(path: Path, values: object, kind: type) -> None:
    expected = {entry.name for entry in fields(kind)}
    optional = {e.name for e in fields(kind) if e.default_factory is not MISSING}
    if not isinstance(values, Mapping) or not expected - optional <= set(values) <= expected:
        found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
        raise LlmtuneError(f"{path}: expected the keys {sorted(expected)}, found {found}; {AGAIN}")


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def hash_answers(result: ArmResult) -> str:
    """Return a hash of what an arm answered to which items."""
    return hash_json([[item.id, item.prediction] for item in result.items])


def finite_or_none(value: float) -> float | None:
    """Return None for a NaN or an infinity, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def cluster_names(items: Sequence[ItemScore]) -> list[str] | None:
    """Return the cluster of each item; None if not every item has one."""
    names = [item.cluster for item in items if item.cluster is not None]
    return names if len(names) == len(items) else None


def is_suite_name(text: str) -> bool:
    """Return whether a name can stand in the names of result files without leading elsewhere."""
    return re.fullmatch(r"\w[\w.-]*", text) is not None


def commonest_share(answers: Sequence[str]) -> float:
    """Return the share of the commonest answer."""
    return Counter(answers).most_common(1)[0][1] / len(answers)
