"""YAML with a memory: every key keeps the file and the line it came from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmtune.errors import LlmtuneError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class SourcedTree:
    """Plain values, and for each key path in them where it was written."""

    values: dict[str, Any]
    origins: Mapping[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str | None:
        """Return the place of `path`, or of the nearest parent that was written down."""
        for length in range(len(path), 0, -1):
            if place := self.origins.get(path[:length]):
                return place
        return None

    def written(self, path: KeyPath) -> KeyPath:
        """Return the part of `path` that stands in the values, skipping steps that do not."""
        found: list[str | int] = []
        here: Any = self.values
        for part in path:
            is_key = isinstance(here, dict) and part in here
            is_index = isinstance(here, list) and isinstance(part, int) and part < len(here)
            if is_key or is_index:
                found.append(part)
                here = here[part]
        return tuple(found)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-4` is a number, and `yes`, `no`, `on`, `off` are words."""


_REPLACED_TAGS = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"}
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _REPLACED_TAGS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?"
        r"|[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> SourcedTree:
    """Read a YAML mapping; every key path remembers `file:line`.

    Raises:
        LlmtuneError: the file is missing, is not YAML, is not a mapping, or repeats a key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LlmtuneError(f"{path}: no such file; give the path of a YAML file") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise LlmtuneError(f"{path}: cannot be read as a YAML file: {error}") from None
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            origins: dict[KeyPath, str] = {}
            values = _construct(loader, node, (), str(path), origins) if node else {}
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or error
        raise LlmtuneError(f"{place}: not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise LlmtuneError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return SourcedTree(values, origins)


def apply_overrides(tree: SourcedTree, overrides: Sequence[str]) -> SourcedTree:
    """Return the tree with `key.path=value` overrides laid over it; values are YAML.

    Raises:
        LlmtuneError: an override has no `=`, an empty key, or reaches into a value without keys.
    """
    values, origins = _copy(tree.values), dict(tree.origins)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise LlmtuneError(
                f"override {override!r}: expected key.path=value, such as adapter.rank=8"
            )
        path = tuple(int(part) if part.isdigit() else part for part in key.strip().split("."))
        try:
            value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError:
            raise LlmtuneError(
                f"override {override!r}: the value is not valid YAML; quote it"
            ) from None
        _assign(values, path, value, override)
        for stale in [old for old in origins if old[: len(path)] == path]:
            del origins[stale]
        origins[path] = f"override {override}"
    return SourcedTree(values, origins)


def _construct(
    loader: _Loader, node: yaml.Node, path: KeyPath, file: str, origins: dict[KeyPath, str]
) -> Any:
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            place = f"{file}:{key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                key = str(key)
            if key in mapping:
                raise LlmtuneError(f"{place}: {key}: the key is given twice; keep one")
            origins[(*path, key)] = place
            mapping[key] = _construct(loader, value_node, (*path, key), file, origins)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, child in enumerate(node.value):
            origins[(*path, index)] = f"{file}:{child.start_mark.line + 1}"
            items.append(_construct(loader, child, (*path, index), file, origins))
        return items
    return loader.construct_object(node, deep=True)


def _assign(values: dict[str, Any], path: KeyPath, value: Any, override: str) -> None:
    holder: Any = values
    for depth, part in enumerate(path):
        name = ".".join(map(str, path[:depth]))
        if isinstance(holder, list):
            if not isinstance(part, int) or part >= len(holder):
                raise LlmtuneError(
                    f"override {override!r}: {name} is a list of {len(holder)}; "
                    f"expected an index below that, found {part!r}"
                )
        elif not isinstance(holder, dict):
            raise LlmtuneError(
                f"override {override!r}: {name} holds {holder!r}, which has no key {part!r}"
            )
        if depth == len(path) - 1:
            holder[part] = value
        elif isinstance(holder, dict):
            if holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]
        else:
            holder = holder[part]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_copy(child) for child in value]
    return value
