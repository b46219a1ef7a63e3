"""Jinja2 templates of prompts, compiled once and rendered in a sandbox."""

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
    TypeError,
    ValueError,
)
"""What an expression in a prompt template can raise: `{{ text + 1 }}`, `{{ 1 / 0 }}`."""


@lru_cache(maxsize=64)
def compile_template(text: str, where: str) -> jinja2.Template:
    """Return a template in which a variable that is not there is an error.

    Args:
        where: names the template in the message.

    Raises:
        LlmtuneError: its syntax is wrong.
    """
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.template_class = _BoundedTemplate
    try:
        return environment.from_string(bound_template(environment, text))
    except (jinja2.TemplateSyntaxError, RecursionError, SyntaxError, MemoryError) as error:
        raise LlmtuneError(f"{where}: {error}") from None
    except TemplateTooLarge as error:
        raise LlmtuneError(f"{where}: is refused: {error}") from None


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
