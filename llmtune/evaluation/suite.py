"""Finding and loading a suite: one YAML file that says what is asked, how it is scored, on what."""

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from llmtune.errors import LlmtuneError
from llmtune.evaluation.items import SuiteItem, read_items
from llmtune.evaluation.suite_config import TASKS, AnySuiteConfig, Role
from llmtune.fingerprint import hash_json
from llmtune.shipped import shipped_files


@dataclass(frozen=True)
class Suite:
    """A suite read whole: its declaration, its items in file order, and their fingerprint."""

    name: str
    path: Path
    config: AnySuiteConfig
    items: tuple[SuiteItem, ...]
    items_path: Path
    items_fingerprint: str

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
    items_path = path.parent / config.items
    items = _keep(
        read_items(config, items_path),
        min((n for n in (config.limit, limit) if n is not None), default=None),
        seed,
    )
    fingerprint = hash_json([_item_content(item) for item in items])
    return Suite(config.name or path.stem, path, config, items, items_path, fingerprint)


def _read_config(path: Path) -> AnySuiteConfig:
    text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise LlmtuneError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise LlmtuneError(f"{path}: a suite is a mapping of keys, found {type(values).__name__}")
    lines = _key_lines(text)
    task = values.get("task")
    if task not in TASKS:
        raise LlmtuneError(
            f"{path}:{lines.get('task', 1)}: task must be one of {', '.join(TASKS)}, not {task!r}"
        )
    try:
        return TASKS[task].model_validate(values)
    except ValidationError as error:
        problems = [_explain(path, lines, TASKS[task].model_fields, e) for e in error.errors()]
        raise LlmtuneError("\n".join(problems)) from None


def _key_lines(text: str) -> dict[str, int]:
    """Return the line (from 1) of every key at the top of a YAML mapping."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode)
    return {key.value: key.start_mark.line + 1 for key, _ in node.value}


def _explain(path: Path, lines: Mapping[str, int], fields: Mapping, error: Mapping) -> str:
    key = str(error["loc"][0]) if error["loc"] else ""
    place = f"{path}:{lines.get(key, 1)}"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
        return f"{place}: unknown key {key!r}; {hint}"
    if error["type"] == "missing":
        return f"{place}: the key {key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = f", not {error['input']!r}" if error["type"] != "value_error" else ""
    return f"{place}: {key + ': ' if key else ''}{message}{given}"


def _keep(items: tuple[SuiteItem, ...], limit: int | None, seed: int) -> tuple[SuiteItem, ...]:
    """Keep `limit` items by a seeded hash of their ids, so that a larger limit keeps these too."""
    if limit is None or limit >= len(items):
        return items
    order = sorted(items, key=lambda i: hashlib.sha256(f"{seed}:{i.id}".encode()).hexdigest())
    kept = {item.id for item in order[:limit]}
    return tuple(item for item in items if item.id in kept)


def _item_content(item: SuiteItem) -> dict:
    content = asdict(item)
    del content["line"]
    return content
