"""Jinja2 templates of prompts, compiled once and rendered in a sandbox."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtune.errors import LlmtuneError
from llmtune.io.bounded_templates import bound_template
from llmtune.io.template_guards import TemplateTooLarge, bounded_work

RENDERING_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TemplateTooLarge,
    TypeError,
    ValueError,
)
"""What an expression in a prompt template can raise: `{{ text + 1 }}`, `{{ 1 / 0 }}`."""


@lru_cache(maxsize=64)
def compile_template(text: str, where: str) -> jinja2.Template:
    """Return a template in which a variable that is not there, or prints null, is an error.

    Args:
        where: names the template in the message.

    Raises:
        LlmtuneError: its syntax is wrong.
    """
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null
    )
    environment.template_class = _BoundedTemplate
    try:
        return environment.from_string(bound_template(environment, text))
    except (jinja2.TemplateSyntaxError, RecursionError, SyntaxError, MemoryError) as error:
        raise LlmtuneError(f"{where}: {error}") from None
    except TemplateTooLarge as error:
        raise LlmtuneError(f"{where}: is refused: {error}") from None


def describe_failure(error: Exception, text: str, fields: Mapping[str, Any]) -> str:
    """Say why a prompt could not be rendered: by the names that it asks for, if they are why."""
    asked = sorted(template_variables(text))
    missing = [name for name in asked if name not in fields]
    null = [name for name in asked if name in fields and fields[name] is None]
    if isinstance(error, jinja2.UndefinedError) and missing:
        return (
            f"the prompt asks for {', '.join(map(repr, missing))}, which is not there; "
            f"there is {', '.join(sorted(fields)) or 'nothing'}: name it as the prompt does"
        )
    if isinstance(error, NullPrinted) and null:
        return f"the prompt prints {', '.join(map(repr, null))}, which is null"
    return f"the prompt cannot be rendered: {error}"


class NullPrinted(jinja2.TemplateError):
    """A field is null, and would be read as the word None."""


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise NullPrinted("a value that it prints is null")
    return value


class _BoundedTemplate(jinja2.Template):
    """A template that is rendered within limits; whoever renders it has no more to do."""

    def render(self, *args: Any, **values: Any) -> str:
        with bounded_work([args, values]):
            return super().render(*args, **values)

    def make_module(self, *args: Any, **values: Any) -> Any:
        with bounded_work([args, values]):
            return super().make_module(*args, **values)


@lru_cache(maxsize=64)
def template_variables(text: str) -> frozenset[str]:
    """Return the names that a template, which compiles, asks for."""
    return frozenset(meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(text)))
