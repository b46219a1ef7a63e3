"""Finding and loading a suite: one YAML file that says what is asked, how it is scored, on what."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.data.duplicates import find_near_duplicates
from llmtune.errors import LlmtuneError
from llmtune.evaluation.config import EvaluateConfig
from llmtune.evaluation.diagnosis.rows import find_frame
from llmtune.evaluation.halves import choose_ids
from llmtune.evaluation.items import read_items
from llmtune.evaluation.results import NAME_RULE, is_suite_name
from llmtune.evaluation.tasks.base import (
    Suite,
    SuiteConfig,
    SuiteItem,
)
from llmtune.evaluation.tasks.config import TASKS
from llmtune.io.fingerprint import JsonObject, hash_json
from llmtune.io.validation import validate_section
from llmtune.io.yaml_source import read_yaml, shipped_files

if TYPE_CHECKING:
    from llmtune.data.init_suite import SuiteDraft


class _Groups:
    """Disjoint sets of places, each called by its smallest."""

    def __init__(self, count: int) -> None:
        self.parents = list(range(count))
        self.count = count

    def find(self, place: int) -> int:
        """Return the smallest place of a place's set."""
        while self.parents[place] != place:
            self.parents[place] = self.parents[self.parents[place]]
            place = self.parents[place]
        return place

    def join(self, one: int, other: int) -> None:
        """Make one set of two."""
        first, second = sorted((self.find(one), self.find(other)))
        if first != second:
            self.parents[second] = first
            self.count -= 1


def find_suite(name_or_path: str | Path) -> Path:
    """Return the file of a suite given by its path or, for a shipped one, by its bare name.

    Raises:
        LlmtuneError: neither exists; the message lists the suites that ship.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_files("evals")
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    near = difflib.get_close_matches(str(name_or_path), shipped, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise LlmtuneError(
        f"suite {str(name_or_path)!r}: no such file, and no shipped suite of that name "
        f"(shipped: {', '.join(sorted(shipped)) or 'none'}).{hint}"
    )


def load_suites(knobs: EvaluateConfig) -> list[Suite]:
    """Read the suites with all their items; what is wrong in them is found here."""
    return [load_suite(name, seed=knobs.seed, limit=knobs.limit) for name in knobs.suites]


def load_suite(name_or_path: str | Path, *, seed: int = 0, limit: int | None = None) -> Suite:
    """Read a suite and its items, whole and validated.

    Args:
        seed: chooses which items a limit keeps; the kept ones stay in file order.
        limit: a further limit beside the suite's own; the smaller one counts.

    Raises:
        LlmtuneError: every problem of the declaration, or of the items, with file and line.
    """
    path = find_suite(name_or_path)
    config = _read_config(path)
    name = _name_of(path, config)
    items_path = path.parent / config.items
    items = read_items(config, items_path)
    largest = min((n for n in (config.limit, limit) if n is not None), default=None)
    kept = choose_ids([item.id for item in items], largest, seed)
    items = tuple(item for item in items if item.id in kept)
    fingerprint = hash_json([_item_content(item) for item in items])
    return Suite(name, path, config, group_copies(items), items_path, fingerprint)


def render_suite(
    draft: "SuiteDraft", *, name: str, items_name: str, source: str, is_held_out: bool = True
) -> str:
    """Return a first suite over the user's rows as YAML, of the first task that suits them.

    Args:
        is_held_out: the rows are taken out of the training of a run.
    """
    drafts = ((task, config.draft(draft)) for task, config in TASKS.items())
    task, knobs = next((task, knobs) for task, knobs in drafts if knobs is not None)
    quoted = partial(json.dumps, ensure_ascii=False)
    lines = [
        f"# Written by llmtune init: {len(draft.items)} rows of {quoted(source)}"
        f"{' that the run holds out' if is_held_out else ''}.",
        f"name: {quoted(name)}",
        f"task: {task}",
        "role: target   # what was trained; a verdict needs such a suite",
        f"description: {quoted(f'Rows of {source} that are not trained on.')}",
        f"items: {quoted(items_name)}",
        *knobs,
    ]
    return "\n".join(lines) + "\n"


def _read_config(path: Path) -> SuiteConfig:
    tree = read_yaml(path)
    task = tree.values.get("task")
    if not isinstance(task, str) or task not in TASKS:
        place = tree.origin(("task",)) or path
        raise LlmtuneError(f"{place}: task must be one of {', '.join(TASKS)}, not {task!r}")
    return validate_section(TASKS[task], tree)


def _name_of(path: Path, config: SuiteConfig) -> str:
    """Return the declared name, or the file's stem where that may name result files."""
    if config.name is not None:
        return config.name
    if not is_suite_name(path.stem):
        raise LlmtuneError(
            f"{path}: {path.stem!r} cannot name the suite's results ({NAME_RULE}); rename the "
            "file or give the suite a `name`"
        )
    return path.stem


def _item_content(item: SuiteItem) -> JsonObject:
    content = asdict(item)
    del content["line"], content["number"], content["source"]
    for key in ("messages", "tools", "labels"):  # older results have no such keys
        if not content[key]:
            del content[key]
    return content


def group_copies(items: Sequence[SuiteItem]) -> tuple[SuiteItem, ...]:
    """Return the items, with copies of each other in one cluster; unchanged if there are none.

    Copies have the same question (and choices and tools) but for case and spaces, or nearly the
    same words outside the frame that all items share (Jaccard index of 9-byte pieces of 0.8 or
    more). Clusters that the suite declares are joined if a copy links them.
    """
    texts = [" ".join(item.asked_text.split()).casefold() for item in items]
    beside = [(item.choices, json.dumps(item.tools, sort_keys=True)) for item in items]
    asked = list(zip(texts, beside, strict=True))
    frame = find_frame(texts)
    groups = _Groups(len(items))
    first: dict[object, int] = {}
    for place, item in enumerate(items):
        groups.join(place, first.setdefault(asked[place], place))
        if item.cluster is not None:
            groups.join(place, first.setdefault(item.cluster, place))
    declared = len({item.cluster or item.id for item in items})
    for pair in find_near_duplicates([frame.own_words(text) for text in texts]):
        if beside[pair.first] == beside[pair.second]:
            groups.join(pair.first, pair.second)
    if groups.count == declared:
        return tuple(items)
    return tuple(
        replace(item, cluster=_cluster_of(items[groups.find(place)]))
        for place, item in enumerate(items)
    )


def _cluster_of(item: SuiteItem) -> str:
    return item.id if item.cluster is None else item.cluster
