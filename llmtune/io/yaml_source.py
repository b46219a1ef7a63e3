"""YAML with a memory: every key keeps the file and line it came from; and the files that ship."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmtune.errors import LlmtuneError

MOST_BYTES = 4 << 20
MOST_VALUES = 100_000

KeyPath = tuple[str | int, ...]
OVERRIDE = "override "
"""How the origin of a value begins that an override gave."""


@dataclass(frozen=True)
class SourcedTree:
    """Plain values, and for each key path in them where it was written."""

    values: dict[str, Any]
    origins: Mapping[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str | None:
        """Return the place of `path`, or of the nearest parent that was written down.

        The path `()` is the whole: its place is the file.
        """
        for length in range(len(path), -1, -1):
            if place := self.origins.get(path[:length]):
                return place
        return None

    def at(self, path: KeyPath) -> Any:
        """Return the value at a path; None if there is none."""
        here: Any = self.values
        for part in path:
            here = here.get(part) if isinstance(here, dict) else None
        return here

    def written(self, path: KeyPath) -> KeyPath:
        """Return the part of `path` that is in the values, skipping steps that do not."""
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


MERGE_TAG = "tag:yaml.org,2002:merge"
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
        LlmtuneError: the file is missing, is not YAML, is not a mapping, repeats a key in one
            mapping (a key beside a merge `<<` overrides it), or has an alias to what it is in.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise LlmtuneError(f"{path}: is larger than {MOST_BYTES:,} bytes; expected a config")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LlmtuneError(f"{path}: no such file; give the path of a YAML file") from None
    except IsADirectoryError:
        raise LlmtuneError(f"{path}: is a directory; give the path of a YAML file") from None
    except PermissionError:
        raise LlmtuneError(f"{path}: may not be read; change its permissions") from None
    except UnicodeDecodeError as error:
        raise LlmtuneError(f"{path}: is not a text file in UTF-8 ({error.reason})") from None
    try:
        origins: dict[KeyPath, str] = {(): str(path)}
        values = _parse(text, str(path), origins)
    except RecursionError:
        raise LlmtuneError(f"{path}: not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or error
        raise LlmtuneError(f"{place}: not valid YAML: {problem}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise LlmtuneError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return SourcedTree(values, origins)


def apply_overrides(tree: SourcedTree, overrides: Sequence[str]) -> SourcedTree:
    """Return the tree with `key.path=value` overrides laid over it; values are YAML.

    Raises:
        LlmtuneError: an override has no `=`, an empty key, holds bytes that are not text, or
            reaches into a value without keys.
    """
    values, origins = _copy(tree.values), dict(tree.origins)
    for override in overrides:
        _require_text(override)
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise LlmtuneError(
                f"override {override!r}: expected key.path=value, such as adapter.rank=8"
            )
        path = tuple(int(part) if part.isdigit() else part for part in key.strip().split("."))
        try:
            value = _parse(text, f"override {override!r}", {})
        except (yaml.YAMLError, ValueError, RecursionError):
            raise LlmtuneError(
                f"override {override!r}: the value is not valid YAML; quote it"
            ) from None
        _assign(values, path, value, override)
        for stale in [old for old in origins if old[: len(path)] == path]:
            del origins[stale]
        origins[path] = f"{OVERRIDE}{override}"
    return SourcedTree(values, origins)


def _require_text(override: str) -> None:
    """Refuse bytes of the command line that Python could not decode and kept as half characters."""
    if not any("\udc80" <= character <= "\udcff" for character in override):
        return
    given = override.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    encoding = sys.getfilesystemencoding()
    is_utf8 = encoding == "utf-8"
    advice = "write it in UTF-8" if is_utf8 else "set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    raise LlmtuneError(
        f"override {given!r}: holds bytes that are not text in {encoding}, which this process "
        f"reads its command line in; {advice}"
    )


def _parse(text: str, file: str, origins: dict[KeyPath, str]) -> Any:
    """Return the value of a YAML text, and put into `origins` where each key is."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _check_node(loader, node, file, (), set())
        if node is not None and _count_values(node, {}) > MOST_VALUES:
            raise LlmtuneError(
                f"{file}: holds more than {MOST_VALUES:,} values, aliases (*) filled in"
            )
        return _construct(loader, node, (), file, origins) if node else None
    finally:
        loader.dispose()


def _check_node(
    loader: _Loader,
    node: yaml.Node | None,
    file: str,
    holders: tuple[yaml.Node, ...],
    checked: set[yaml.Node],
) -> None:
    """Refuse repeated keys, before merges are laid into their mappings, and endless aliases."""
    if not isinstance(node, yaml.CollectionNode):
        return
    if node in holders:
        line = node.start_mark.line + 1
        raise LlmtuneError(f"{file}:{line}: the value that begins here holds itself (an alias *)")
    if node in checked:
        return
    checked.add(node)
    children = node.value
    if isinstance(node, yaml.MappingNode):
        children = [value for _, value in node.value]
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE_TAG:
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                line = key_node.start_mark.line + 1
                raise LlmtuneError(f"{file}:{line}: a key is one word; this one is a list or map")
            key = _key(loader, key_node)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise LlmtuneError(f"{file}:{line}: {key}: the key is given twice; keep one")
            seen.add(key)
    for child in children:
        _check_node(loader, child, file, (*holders, node), checked)


def _count_values(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Return how many values a node represents, with every alias filled in."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if node not in known:
        is_mapping = isinstance(node, yaml.MappingNode)
        children = [one for pair in node.value for one in pair] if is_mapping else node.value
        known[node] = 1 + sum(_count_values(child, known) for child in children)
    return known[node]


def _key(loader: _Loader, node: yaml.Node) -> str:
    return str(loader.construct_object(node, deep=True))


def _construct(
    loader: _Loader, node: yaml.Node, path: KeyPath, file: str, origins: dict[KeyPath, str]
) -> Any:
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)  # merged pairs come first, so that the mapping's own win
        pairs = {_key(loader, pair[0]): pair for pair in node.value}
        mapping: dict[str, Any] = {}
        for key, (key_node, value_node) in pairs.items():
            origins[(*path, key)] = f"{file}:{key_node.start_mark.line + 1}"
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


def shipped_files(folder: str, pattern: str = "*.yaml") -> dict[str, Path]:
    """Return name -> file of what ships in `folder` (`configs` or `evals`), by bare name."""
    package_dir = Path(__file__).parent.parent
    found: dict[str, Path] = {}
    for place in (package_dir.parent / folder, package_dir / folder):
        found |= {path.stem: path for path in sorted(place.glob(pattern))}
    return found
