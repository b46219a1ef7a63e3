"""Reading a suite's items: every line checked, prompts rendered, all problems told at once."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtune.errors import LlmtuneError
from llmtune.evaluation.suite_config import (
    AnySuiteConfig,
    ChoiceSuite,
    ExactSuite,
    PerplexitySuite,
    PromptedSuite,
)

MAX_PROBLEMS = 10
RENDERING_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What an expression in a prompt template can raise: `{{ text + 1 }}`, `{{ 1 / 0 }}`."""


@dataclass(frozen=True)
class SuiteItem:
    """One question, rendered. What a task does not use is empty.

    `answer` is the index of the right choice (-1: none); `references` are the accepted texts.
    """

    id: str
    line: int
    prompt: str = ""
    choices: tuple[str, ...] = ()
    answer: int = -1
    references: tuple[str, ...] = ()
    text: str = ""
    cluster: str | None = None
    slices: tuple[tuple[str, str], ...] = ()


class _BadItem(ValueError):
    """What is wrong with one line; the reader adds the place."""


def read_items(config: AnySuiteConfig, path: Path) -> tuple[SuiteItem, ...]:
    """Read and check every line of a suite's items.

    Raises:
        LlmtuneError: the file is missing or empty, or lines are wrong (`file:line: what`, up to
            ten of them and how many more).
    """
    if not path.is_file():
        raise LlmtuneError(f"{path}: the suite's items are not there")
    template = _compile_prompt(config, path)
    items: list[SuiteItem] = []
    problems: list[str] = []
    with path.open("rb") as file:
        for line, content in enumerate(file, start=1):
            if not content.strip():
                continue
            try:
                items.append(_read_item(config, template, content, line))
            except _BadItem as error:
                problems.append(f"{path}:{line}: {error}")
    names = Counter(item.id for item in items)
    for item in items:
        if names[item.id] > 1:
            problems.append(f"{path}:{item.line}: the id {item.id!r} is not unique")
    if problems:
        more = len(problems) - MAX_PROBLEMS
        tail = [f"... and {more} more"] if more > 0 else []
        raise LlmtuneError("\n".join(problems[:MAX_PROBLEMS] + tail))
    if not items:
        raise LlmtuneError(f"{path}: the suite has no items")
    return tuple(items)


def render_rows(
    config: ChoiceSuite | ExactSuite, path: Path, rows: Iterable[Mapping[str, Any]]
) -> list[tuple[str, str]] | None:
    """Return data rows' questions and right answers in the words of the suite over `path`.

    None where a row has not the fields that the suite's prompt, choices and answer need.
    """
    template = _compile_prompt(config, path)
    assert template is not None
    rendered = []
    for row in rows:
        fields = dict(row)
        try:
            question = _render_prompt(template, fields)
            if isinstance(config, ChoiceSuite):
                choices, answer = _read_choices(config, fields)
                rendered.append((question, choices[answer]))
            else:
                rendered.append((question, _read_references(config, fields)[0]))
        except _BadItem:
            return None
    return rendered


def _compile_prompt(config: AnySuiteConfig, path: Path) -> jinja2.Template | None:
    if not isinstance(config, PromptedSuite):
        return None
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    try:
        return environment.from_string(config.prompt)
    except jinja2.TemplateSyntaxError as error:
        raise LlmtuneError(f"prompt of the suite over {path}: {error}") from None


def _read_item(
    config: AnySuiteConfig, template: jinja2.Template | None, content: bytes, line: int
) -> SuiteItem:
    try:
        fields = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadItem(f"not UTF-8 text: {error}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _BadItem(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _BadItem(f"expected a JSON object, found {type(fields).__name__}")
    item = SuiteItem(
        id=str(fields.get(config.id, line)),
        line=line,
        cluster=None if config.cluster is None else str(_field(fields, config.cluster)),
        slices=tuple((name, str(_field(fields, name))) for name in config.slices),
    )
    if template is None:
        return replace(item, text=_read_passage(config, fields))
    item = replace(item, prompt=_render_prompt(template, fields))
    if isinstance(config, ExactSuite):
        return replace(item, references=_read_references(config, fields))
    assert isinstance(config, ChoiceSuite)
    choices, answer = _read_choices(config, fields)
    return replace(item, choices=choices, answer=answer)


def _read_passage(config: AnySuiteConfig, fields: dict) -> str:
    assert isinstance(config, PerplexitySuite)
    passage = _field(fields, config.text)
    if not isinstance(passage, str) or not passage.strip():
        raise _BadItem(f"field {config.text!r} must be a text that is not empty")
    return passage


def _field(fields: dict, name: str) -> object:
    if fields.get(name) is None:
        raise _BadItem(f"field {name!r} is missing; the item has {', '.join(sorted(fields))}")
    return fields[name]


def _render_prompt(template: jinja2.Template, fields: dict) -> str:
    try:
        prompt = template.render(fields)
    except RENDERING_ERRORS as error:
        raise _BadItem(f"the prompt cannot be rendered: {error}") from None
    if not prompt.strip():
        raise _BadItem("the prompt is empty")
    return prompt


def _read_references(config: ExactSuite, fields: dict) -> tuple[str, ...]:
    answer = _field(fields, config.answer)
    references = answer if isinstance(answer, list) else [answer]
    plain = all(isinstance(ref, str | int | float) for ref in references)
    if not references or not plain or not all(str(ref).strip() for ref in references):
        raise _BadItem(f"field {config.answer!r} must be a text, a number or a list of those")
    return tuple(str(reference) for reference in references)


def _read_choices(config: ChoiceSuite, fields: dict) -> tuple[tuple[str, ...], int]:
    choices = config.choices
    if choices is None:
        assert config.choices_field is not None
        listed = _field(fields, config.choices_field)
        if not isinstance(listed, list) or not all(
            isinstance(c, str | int | float) for c in listed
        ):
            raise _BadItem(f"field {config.choices_field!r} must be a list of texts")
        choices = tuple(str(choice) for choice in listed)
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
        raise _BadItem(f"choices must be at least two different texts, not {list(choices)}")
    answer = _field(fields, config.answer)
    if isinstance(answer, str) and answer in choices:
        return choices, choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices, answer
    raise _BadItem(
        f"the answer {answer!r} is neither one of the choices {list(choices)} nor an index of them"
    )
