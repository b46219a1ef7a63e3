"""From a sourced tree to a section, or to one error naming every problem, its place and mend."""

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmtune.errors import LlmtuneError
from llmtune.io.foreign import our_name, recognize_tool
from llmtune.io.yaml_source import OVERRIDE, KeyPath, SourcedTree, apply_overrides
from llmtune.schema import Section

SectionT = TypeVar("SectionT", bound=Section)

MAPPING_ERRORS = ("model_type", "model_attributes_type", "dict_type")

# From pydantic's words to ours, applied in this order: (pattern, replacement).
PLAIN_WORDS = (
    (r", unable to parse.*| after validation, not \d+$|, got a number with.*", ""),
    (r"^Input is not a valid path for .*", "a path"),
    (r"^String should match pattern ", "text that matches "),
    (r"^\w+ should (be|have) ", ""),
    (r"^a valid (list|tuple|set|frozenset)$", "a list"),
)


def lay_overrides(
    section: type[Section], tree: SourcedTree, overrides: Sequence[str]
) -> SourcedTree:
    """Return the tree with overrides laid over it; one also unsets what it replaces.

    Sections say in `RIVALS` what replaces what.

    Raises:
        LlmtuneError: see `apply_overrides`.
    """
    tree = apply_overrides(tree, overrides)
    origins = dict(tree.origins)
    for path, child in _sections_under(section, ()):
        holder = tree.at(path)
        for rivals in child.RIVALS if isinstance(holder, dict) else ():
            given = [key for key in rivals if holder.get(key) is not None]
            winners = [key for key in given if origins.get((*path, key), "").startswith(OVERRIDE)]
            for key in given if winners else ():
                if key not in winners:
                    holder[key] = None
                    origins[(*path, key)] = f"unset by {origins[(*path, winners[0])]}"
    return SourcedTree(tree.values, origins)


def validate_section(section: type[SectionT], tree: SourcedTree) -> SectionT:
    """Build `section` from `tree`.

    Raises:
        LlmtuneError: every problem at once, one a line: where it was written, the key, what was
            expected, what was found, and for an unknown key the nearest one that exists.
    """
    try:
        return section.model_validate(tree.values)
    except ValidationError as error:
        tool = recognize_tool(tree.values)
        if tool is not None and tool.needed <= {e["loc"][0] for e in error.errors() if e["loc"]}:
            file = str(tree.origin(()) or "FILE").partition(":")[0]
            raise LlmtuneError(
                f"{file}: is {tool.title}; make ours of it with: llmtune config import {file}"
            ) from None
        lines = list(dict.fromkeys(_describe(section, tree, each) for each in error.errors()))
    count = f"{len(lines)} problems:\n" if len(lines) > 1 else ""
    raise LlmtuneError(count + "\n".join(lines))


def known_keys(section: type[Section]) -> dict[KeyPath, set[str]]:
    """Return for each key path under `section` the keys that may stand there.

    Positions in lists and names in open mappings are written `*`.
    """
    found: dict[KeyPath, set[str]] = {}
    for path, child in _sections_under(section, ()):
        found.setdefault(path, set()).update(child.model_fields)
    return found


def _sections_under(
    section: type[Section], path: KeyPath
) -> Iterator[tuple[KeyPath, type[Section]]]:
    yield path, section
    for name, info in section.model_fields.items():
        for child, inner in _sections_in(info.annotation, (*path, name)):
            yield from _sections_under(child, inner)


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
    if error["type"] in MAPPING_ERRORS:
        expected = _mapping(section, path, error["input"])
    else:
        expected = _plain(error["msg"])
    return f"{start}expected {expected}, found {_short(error['input'])}"


def _plain(message: str) -> str:
    """Return what pydantic says was expected, in words that need no knowledge of Python."""
    for pattern, words in PLAIN_WORDS:
        message = re.sub(pattern, words, message)
    return message


def _mapping(section: type[Section], path: KeyPath, value: Any) -> str:
    """Say which mapping `path` expects; a member of a union is named by its tag."""
    general = tuple("*" if isinstance(part, int) else part for part in path)
    members = [child for where, child in _sections_under(section, ()) if where == general]
    if not members:
        return "a mapping"
    if len(members) == 1:
        return f"a mapping with keys such as {', '.join(list(members[0].model_fields)[:3])}"
    tags = {
        tag: name
        for member in members
        for name, info in member.model_fields.items()
        if get_origin(info.annotation) is Literal
        for tag in get_args(info.annotation)
        if len(get_args(info.annotation)) == 1
    }
    tag = value if isinstance(value, str) and value in tags else next(iter(tags))
    return f"a mapping such as {{{tags[tag]}: {tag}}}"


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
    if ours := our_name(unknown):
        return ours
    siblings = keys.get(parent, set())
    if unknown in siblings:
        return f"other kinds of {'.'.join(map(str, path[:-1]))} have it, the chosen one does not"
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
