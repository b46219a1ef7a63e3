"""What surrounds the expressions of a bounded template: it counts before anything can grow.

A sandbox keeps a template away from the machine, and not from its memory and time. Each step here
is small, and between the steps the time is looked at, which needs no signals and works in every
thread. `io.bounded_templates` puts these functions into a template.
"""

import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jinja2.runtime import Undefined
from jinja2.utils import Namespace, generate_lorem_ipsum

from llmtune.errors import LlmtuneError

MOST_SECONDS = 10.0
"""Of this thread's own work, for one rendering."""
MOST_STEPS = 3_000_000
"""Turns of loops and calls; a chat of 1,000 messages compared with each other takes a million."""
SPARE_CHARACTERS = 32 << 20
"""What a template may make beside what it was given, counted over all that it made on the way."""
TIMES_GIVEN = 64
"""How many times what it was given it may make; and once more for each message."""
STEPS_A_PART = 2_000
SECONDS_A_PART = 0.01
MOST_VALUES = 200_000
"""Values in a list or an object that a template builds, or prints."""
MOST_PLAIN = 64
"""Terms of a sum; of more, every partial sum is counted."""
MOST_BITS = 4096
MOST_WIDTH = 10_000
LOOKED_AT_EVERY = 256
WIDENING = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"}
"""Methods of a text or number whose result is as long as they are told."""


class TemplateTooLarge(LlmtuneError):
    """A template that makes too much or takes too long."""


@dataclass
class _Work:
    """What one rendering may still do."""

    characters: int
    steps: int
    seconds: float
    began: float = field(default_factory=time.thread_time)

    def charge(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise TemplateTooLarge("it makes too much text")

    def step(self, characters: int = 0) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TemplateTooLarge("it loops or calls too often")
        if not self.steps % LOOKED_AT_EVERY and time.thread_time() - self.began > self.seconds:
            raise TemplateTooLarge(f"it takes longer than {self.seconds:.0f} s")
        if characters:
            self.charge(characters)


_current = threading.local()


@contextmanager
def bounded_work(given: Any, *, parts: int = 1) -> Iterator[None]:
    """Bound what is rendered within; `given` is what the template is given, of so many parts."""
    work = _Work(
        characters=SPARE_CHARACTERS + _size_of(given) * (TIMES_GIVEN + parts),
        steps=MOST_STEPS + STEPS_A_PART * parts,
        seconds=MOST_SECONDS + SECONDS_A_PART * parts,
    )
    before = getattr(_current, "work", None)
    _current.work = work
    try:
        yield
    finally:
        _current.work = before


def stepped(characters: int = 0) -> bool:
    """Count a turn of a loop or a call."""
    _work().step(characters)
    return True


def made(value: Any) -> Any:
    """Count a value that was made: the characters of a text, the places of a list."""
    if isinstance(value, str | bytes | list | tuple | dict):
        _work().charge(len(value))
    return value


def held(value: Any) -> Any:
    """Count what a list or an object holds, as often as it holds it."""
    if isinstance(value, list | tuple | dict):
        _count_values(value)
    return made(value)


def printed(value: Any) -> Any:
    """Count a value that becomes text."""
    if isinstance(value, str):
        _work().charge(len(value))
    elif isinstance(value, list | tuple | dict | Mapping):
        _work().charge(_size_of(value))
    elif isinstance(value, Namespace):
        raise TemplateTooLarge("it prints a namespace")
    return value


def small(value: Any) -> Any:
    """Check an argument that may be the width of a text."""
    if isinstance(value, int) and abs(value) > MOST_WIDTH:
        raise TemplateTooLarge(f"it asks for a width of more than {MOST_WIDTH:,}")
    return value


def added(left: Any, *others: Any) -> Any:
    """Return `left + right + ...`."""
    for right in others:
        left = left + right  # `+=` would change a list in its place
        if len(others) > MOST_PLAIN:
            made(left)
    return made(left)


def multiplied(left: Any, right: Any) -> Any:
    """Return `left * right`."""
    for text, times in ((left, right), (right, left)):
        if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
            _work().charge(len(text) * max(times, 0))
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() + right.bit_length())
    return left * right


def raised(left: Any, right: Any) -> Any:
    """Return `left ** right`."""
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() * abs(right))
    return left**right


def remainder(left: Any, right: Any) -> Any:
    """Return `left % right`, which formats a text."""
    if isinstance(left, str | bytes):
        _require_narrow(left if isinstance(left, str) else left.decode("latin-1"))
        if "*" in str(left):
            for value in right if isinstance(right, tuple) else (right,):
                small(value)
        printed(list(right) if isinstance(right, tuple) else right)
    return made(left % right)


def joined(values: Any, between: Any = "", /, *, d: Any = None) -> str:
    """Do what the filter `join` does."""
    texts: list[str] = [str(printed(value)) for value in values]
    between = str(between if d is None else d)
    _work().charge(len(between) * len(texts))
    return str(between.join(texts))


def replaced(text: Any, old: Any, new: Any, count: Any = None) -> str:
    """Do what the filter `replace` does."""
    text, old, new = str(printed(text)), str(old), str(new)
    if len(new) > len(old):
        found = text.count(old) if old else len(text) + 1
        _work().charge(found * len(new))
    return str(text.replace(old, new, -1 if count is None else count))


def formatted(text: Any, *values: Any, **named: Any) -> str:
    """Do what the filter `format` does."""
    return str(remainder(str(text), named or values))


def summed(values: Any, start: Any = 0) -> Any:
    """Do what the filter `sum` does, of numbers."""
    numbers = list(values)
    if not all(isinstance(number, int | float | Undefined) for number in (*numbers, start)):
        raise TemplateTooLarge("it sums what are not numbers")
    return sum(numbers, start)


def called(function: Any) -> Any:
    """Count a call; where the result may be long, return a function that looks at it first."""
    stepped()
    if function is generate_lorem_ipsum:
        raise TemplateTooLarge("it asks for a filling text")
    name = getattr(function, "__name__", "")
    owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
    if not isinstance(owner, str | bytes | int):
        return function
    if name in WIDENING:
        return lambda *values: function(*map(small, values))
    if name == "replace" and isinstance(owner, str):
        return lambda old, new, count=None: replaced(owner, old, new, count)
    if name == "join" and isinstance(owner, str):
        return lambda values: joined(values, owner)
    if name in ("format", "format_map"):
        return lambda *values, **named: _format(function, str(owner), values, named)
    return function


def _format(function: Any, text: str, values: tuple[Any, ...], named: dict[str, Any]) -> Any:
    _require_narrow(text)
    for value in (*values, *named.values()):
        printed(value)
    if "{" in text.partition(":")[2]:
        for value in (*values, *named.values()):
            small(value)
    return made(function(*values, **named))


def _require_narrow(text: str) -> None:
    if re.search(r"\d{5}", text) and re.search(r"[%:.{][^%:{}\s]*\d{5}", text):
        raise TemplateTooLarge(f"it asks for a width of more than {MOST_WIDTH:,}")


def _require_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise TemplateTooLarge("it computes with numbers that are too large")


def _count_values(value: Any) -> None:
    """Refuse a value of lists in lists that holds, shared or not, more than the limit."""
    left, waiting = MOST_VALUES, [value]
    while waiting:
        one = waiting.pop()
        children = one.values() if isinstance(one, dict) else one
        left -= len(children)
        if left < 0:
            raise TemplateTooLarge(f"it holds more than {MOST_VALUES:,} values in a list")
        waiting += [child for child in children if isinstance(child, list | tuple | dict)]


def _size_of(value: Any) -> int:
    """Return the characters of all texts in a value, and one for each of its other values."""
    size, waiting, left = 0, [value], MOST_VALUES * 100
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
            left -= 2 * len(one)
        elif isinstance(one, list | tuple):
            waiting += one
            left -= len(one)
        size += 1
        if left < 0:
            raise TemplateTooLarge("it prints too many values")
    return size


def _work() -> _Work:
    work: _Work = _current.work
    return work
