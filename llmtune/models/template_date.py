"""The date that a chat template prints: one for a run, recorded, instead of the clock's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import date as Date
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CLOCK = "strftime_now"
"""What templates call for the date (Granite 3, SmolLM3, Mistral Small, Llama 3.2)."""
CODES = ("d", "-d", "e", "m", "-m", "b", "B", "y", "Y", "a", "A", "j", "H", "I", "M", "S", "p")
"""What they ask it for; a time of day is midnight."""
_ATTRIBUTE = "template_date"


def today() -> str:
    """Return today's date, as YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d")


def prints_date(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the chat template reads the clock."""
    return CLOCK in str(tokenizer.chat_template or "")


def fix_template_date(tokenizer: PreTrainedTokenizerFast, date: str) -> None:
    """Let the template print this date (YYYY-MM-DD) from now on, whoever renders it."""
    if prints_date(tokenizer):
        tokenizer.apply_chat_template = DatedTemplate(tokenizer, date)
        setattr(tokenizer, _ATTRIBUTE, date)


def template_date_of(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the date that the template prints, today's if none is fixed; None without one."""
    if not prints_date(tokenizer):
        return None
    return str(getattr(tokenizer, _ATTRIBUTE, today()))


def dated_source(tokenizer: PreTrainedTokenizerFast, source: str, date: Date | None = None) -> str:
    """Return the template's text, with `date`, else the fixed one, in the clock's place."""
    day = getattr(tokenizer, _ATTRIBUTE, None) if date is None else date.isoformat()
    return source if day is None else fix_clock(source, day)


def fix_clock(source: str, date: str) -> str:
    """Return a template that prints `date` (YYYY-MM-DD) if it reads the clock."""
    return _clock_macro(date) + source if CLOCK in source else source


@dataclass
class DatedTemplate:
    """A tokenizer's `apply_chat_template` on a fixed date; the template's own text stays."""

    tokenizer: PreTrainedTokenizerFast
    date: str

    def __call__(
        self, *chats: Any, tools: Any = None, chat_template: str | None = None, **options: Any
    ) -> Any:
        """Render as transformers does, with the clock replaced by a macro before the template."""
        tokenizer = self.tokenizer
        text = tokenizer.get_chat_template(chat_template, tools)
        if isinstance(text, str):
            text = fix_clock(text, self.date)
        render = type(tokenizer).apply_chat_template
        return render(tokenizer, *chats, tools=tools, chat_template=text, **options)


def _clock_macro(date: str) -> str:
    """Return Jinja that defines a clock that is stopped on this date; it prints nothing."""
    day = Date.fromisoformat(date)
    filters = "".join(f"|replace('%{code}', '{day.strftime('%' + code)}')" for code in CODES)
    # the empty expression keeps a line break at the beginning of the template
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}{{{{ '' }}}}"
