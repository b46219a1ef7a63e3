"""From a sourced tree to a section, or to one error naming every problem, its place and mend."""

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmtune.errors import LlmtuneError
from llmtune.schema import Section
from llmtune.yaml_source import KeyPath, SourcedTree

SectionT = TypeVar("SectionT", bound=Section)


def validate_section(section: type[SectionT], tree: SourcedTree) -> SectionT:
    """Build `section` from `tree`.

    Raises:
        LlmtuneError: every problem at once, one a line: where it was written, the key, what was
            expected, what was found, and for an unknown key the nearest one that exists.
    """
    try:
        return section.model_validate(tree.values)
    except ValidationError as error:
        lines = list(dict.fromkeys(_describe(section, tree, each) for each in error.errors()))
    count = f"{len(lines)} problems:\n" if len(lines) > 1 else ""
    raise LlmtuneError(count + "\n".join(lines))


def known_keys(section: type[Section]) -> dict[KeyPath, set[str]]:
    """Return for each key path under `section` the keys that may stand there.

    Positions in lists and names in open mappings are written `*`.
    """
    found: dict[KeyPath, set[str]] = {}
    _collect(section, (), found)
    return found


def _collect(section: type[Section], path: KeyPath, found: dict[KeyPath, set[str]]) -> None:
    keys = found.setdefault(path, set())
    for name, info in section.model_fields.items():
        keys.add(name)
        for child, inner in _sections_in(info.annotation, (*path, name)):
            _collect(child, inner, found)


def _sections_in(annotation: Any, path: KeyPath) -> Iterator[tuple[type[Section], KeyPath]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, path
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _sections_in(arguments[0], path)
    elif origin in (Union, types.UnionType):
        for member in arguments:
            yield from _sections_in(member, path)
    elif origin in (list, tuple, set, frozenset, dict):
        for member in arguments:
            yield from _sections_in(member, (*path, "*"))


def _describe(section: type[Section], tree: SourcedTree, error: ErrorDetails) -> str:
    path = _written_path(tree, error)
    key = ".".join(map(str, path))
    place = tree.origin(path)
    start = f"{place}: " if place else ""
    start += f"{key}: " if key else ""
    if error["type"] == "extra_forbidden":
        return start + "unknown key; " + _nearest(section, path)
    if error["type"] == "missing":
        return start + "required, and not given"
    if error["type"] == "value_error":
        return start + error["msg"].removeprefix("Value error, ")
    context = error.get("ctx", {})
    if error["type"] == "union_tag_invalid":
        choices = context["expected_tags"]
        return f"{start}{context['discriminator']} is one of {choices}; found {context['tag']!r}"
    if error["type"] == "union_tag_not_found":
        return f"{start}expected a mapping with the key {context['discriminator']}"
    expected = error["msg"].removeprefix("Input should be ").partition(", unable to parse")[0]
    return f"{start}expected {expected}, found {_short(error['input'])}"


def _written_path(tree: SourcedTree, error: ErrorDetails) -> KeyPath:
    """Drop from pydantic's location what the user did not write: union tags and type names."""
    written = tree.written(error["loc"])
    if error["type"] == "missing":
        return (*tree.written(error["loc"][:-1]), error["loc"][-1])
    return written


def _nearest(section: type[Section], path: KeyPath) -> str:
    keys = known_keys(section)
    parent = tuple("*" if isinstance(part, int) else part for part in path[:-1])
    unknown = str(path[-1])
    siblings = keys.get(parent, set())
    if near := difflib.get_close_matches(unknown, siblings, n=1, cutoff=0.6):
        return f"did you mean {'.'.join(map(str, (*path[:-1], near[0])))}?"
    everywhere = {name: where for where, names in sorted(keys.items()) for name in names}
    if near := difflib.get_close_matches(unknown, everywhere, n=1, cutoff=0.8):
        where = everywhere[near[0]]
        return f"did you mean {'.'.join(map(str, (*where, near[0])))}?"
    return f"expected one of: {', '.join(sorted(siblings))}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
