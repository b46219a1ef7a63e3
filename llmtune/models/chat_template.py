"""The one place where chat templates are rendered: as transformers does it, within limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date as Date
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from jinja2 import nodes
from jinja2.exceptions import TemplateError

from llmtune.errors import LlmtuneError
from llmtune.io.bounded_templates import bound_template
from llmtune.io.template_guards import TemplateTooLarge, bounded_work
from llmtune.models.template_date import dated_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    LookupError,
    ValueError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    SyntaxError,
    MemoryError,
)
"""What rendering may raise: a template is someone's program, run on someone's rows."""

KNOWN_TEMPLATES = 64
SHORT_CHAT = 16
"""Messages; a template that fails on so few is not tried again."""

MARK = "Which number comes after twelve?"

Chat = Sequence[Mapping[str, Any]]

_refused: dict[str, str] = {}


Found = TypeVar("Found")


def asked_once(
    ask: Callable[[PreTrainedTokenizerFast], Found],
) -> Callable[[PreTrainedTokenizerFast], Found]:
    """Keep what is found out about a tokenizer's chat template, until it has a different one."""
    known: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[object, Found]] = WeakKeyDictionary()

    @wraps(ask)
    def answer(tokenizer: PreTrainedTokenizerFast) -> Found:
        template = tokenizer.chat_template
        found = known.get(tokenizer)
        if found is None or found[0] != template:
            found = (template, ask(tokenizer))
            known[tokenizer] = found
        return found[1]

    return answer


def apply_chat_template(
    tokenizer: PreTrainedTokenizerFast,
    chats: Chat | Sequence[Chat],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    tokenize: bool = False,
    date: Date | None = None,
) -> Any:
    """Return the text of a chat, or the texts of several; the token ids with `tokenize`.

    A `date` is what the template prints as today's, whether it reads the clock or is given it.

    Raises:
        TEMPLATE_ERRORS: the template cannot be read, or refuses the chat.
        LlmtuneError: the template makes too much of it, or takes too long.
    """
    source = dated_source(tokenizer, tokenizer.get_chat_template(None, tools), date)
    given = {} if date is None else {"date_string": date.strftime("%d %b %Y")}
    if source in _refused:
        raise TemplateTooLarge(_refused[source])
    several = bool(chats) and not isinstance(chats[0], Mapping)
    messages = sum(map(len, chats)) if several else len(chats)
    try:
        template = _bounded_template(source)
        with bounded_work([chats, tools], parts=messages):
            return tokenizer.apply_chat_template(
                chats,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=tokenize,
                return_dict=False,
                chat_template=template,
                **given,
            )
    except TemplateTooLarge as error:
        refusal = (
            f"the chat template is refused: {error}. It is damaged or hostile; choose a different "
            "one with model.chat_template=FILE.jinja"
        )
        if messages <= SHORT_CHAT:
            _refused[source] = refusal
        raise TemplateTooLarge(refusal) from error


@lru_cache(maxsize=KNOWN_TEMPLATES)
def _bounded_template(source: str) -> nodes.Template:
    """Return the template with its limits; transformers compiles what is parsed already, too."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return bound_template(_compile_jinja_template("").environment, source)


def set_system(tokenizer: PreTrainedTokenizerFast, system: str) -> None:
    """Let the template print a system prompt in every chat that has none of its own.

    The template itself carries it, so that whatever renders it later renders what was trained.

    Raises:
        LlmtuneError: there is no single template, or it has no place for a system prompt.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or not template:
        raise LlmtuneError(
            "data.system: the base has no single chat template to print it: take it out, or give "
            "model.chat_template=FILE.jinja"
        )
    said = f"{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}"
    lead = (
        "{% if messages and messages[0]['role'] not in ['system', 'developer'] %}"
        f"{{% set messages = [{said}] + messages %}}{{% endif %}}{{{{ '' }}}}"
    )
    if not template.startswith(lead):  # one that was saved with it
        tokenizer.chat_template = lead + template
    try:
        text = str(apply_chat_template(tokenizer, [{"role": "user", "content": MARK}]))
    except TEMPLATE_ERRORS as error:
        raise LlmtuneError(f"data.system: the chat template refuses it: {error}") from None
    if system.strip() not in text:
        raise LlmtuneError("data.system: the chat template does not print a system prompt")


def default_system(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the system prompt that the template prints by itself; None if it prints none.

    It is what a chat without a system prompt has where one with it has that prompt.
    """
    asked = {"role": "user", "content": MARK}
    given = "A prompt of one's own."
    try:
        plain = str(apply_chat_template(tokenizer, [asked]))
        own = str(apply_chat_template(tokenizer, [{"role": "system", "content": given}, asked]))
    except (*TEMPLATE_ERRORS, LlmtuneError):
        return None
    before, found, after = own.partition(given)
    if not found or not plain.startswith(before) or not plain.endswith(after):
        return None
    return plain[len(before) : len(plain) - len(after)].strip() or None
