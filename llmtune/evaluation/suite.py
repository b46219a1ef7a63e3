"""Finding and loading a suite: one YAML file that says what is asked, how it is scored, on what."""

import difflib
import hashlib
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.evaluation.items import SuiteItem, read_items
from llmtune.evaluation.suite_config import (
    NAME_RULE,
    TASKS,
    AnySuiteConfig,
    Role,
    is_suite_name,
)
from llmtune.io.fingerprint import hash_json
from llmtune.io.shipped import shipped_files
from llmtune.io.validation import validate_section
from llmtune.io.yaml_source import read_yaml


@dataclass(frozen=True)
class Suite:
    """A suite read whole: its declaration, its items in file order, and their fingerprint."""

    name: str
    path: Path
    config: AnySuiteConfig
    items: tuple[SuiteItem, ...]
    items_path: Path
    items_fingerprint: str
    whole: int | None = None
    """Items of the suite that these were selected from; None where these are all."""

    @property
    def num_whole(self) -> int:
        """How many items the suite has, selected here or not."""
        return len(self.items) if self.whole is None else self.whole

    def select(self, ids: Container[str]) -> "Suite":
        """Return the suite with some of its items; its fingerprint stays that of all of them."""
        items = tuple(item for item in self.items if item.id in ids)
        return self if items == self.items else replace(self, items=items, whole=self.num_whole)

    @property
    def fingerprint(self) -> str:
        """A hash of the declaration and of every item."""
        return hash_json([self.config.model_dump(mode="json"), self.items_fingerprint])

    @property
    def task(self) -> str:
        return self.config.task

    @property
    def role(self) -> Role:
        return self.config.role

    @property
    def description(self) -> str:
        return self.config.description


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
    return Suite(name, path, config, items, items_path, fingerprint)


def choose_ids(ids: Sequence[str], limit: int | None, seed: int) -> set[str]:
    """Choose `limit` ids by a seeded hash of each, so that a larger limit chooses these too."""
    if limit is None or limit >= len(ids):
        return set(ids)
    order = sorted(ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    return set(order[:limit])


def _read_config(path: Path) -> AnySuiteConfig:
    tree = read_yaml(path)
    task = tree.values.get("task")
    if not isinstance(task, str) or task not in TASKS:
        place = tree.origin(("task",)) or path
        raise LlmtuneError(f"{place}: task must be one of {', '.join(TASKS)}, not {task!r}")
    return validate_section(TASKS[task], tree)


def _name_of(path: Path, config: AnySuiteConfig) -> str:
    """Return the declared name, or the file's stem where that may name result files."""
    if config.name is not None:
        return config.name
    if not is_suite_name(path.stem):
        raise LlmtuneError(
            f"{path}: {path.stem!r} cannot name the suite's results ({NAME_RULE}); rename the "
            "file or give the suite a `name`"
        )
    return path.stem


def _item_content(item: SuiteItem) -> dict:
    content = asdict(item)
    del content["line"]
    return content
