"""Reading a JSON list element by element, however long it is, alone or in an object."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from llmtune.data.row_values import DECODER, json_reason
from llmtune.errors import LlmtuneError

READ_BYTES = 1 << 20
NEAR_END = 64
"""Characters: what a cut can make wrong is found nearer to it than this, but for a string."""

_SPACES = re.compile(r"[ \t\r\n]*")


def iter_json_list(start: bytes, file: IO[bytes], shown: str) -> Iterator[tuple[int, Any]]:
    """Yield `(line, element)` of the list that begins in `start` and continues in `file`.

    Held in memory: two MiB, or twice the longest element.

    Raises:
        LlmtuneError: the text is not a JSON list, or not UTF-8; elements before are yielded.
    """
    window = _Window(start, file, shown)
    yield from _iter_elements(window)
    if window.look():
        raise window.refuse("Extra data")


def read_member_kinds(start: bytes, file: IO[bytes], shown: str) -> dict[str, bool]:
    """Return the keys of the object that begins in `start`, and whether each holds a list.

    Lists are read element by element and not kept.

    Raises:
        LlmtuneError: the text is not a JSON object, or not UTF-8.
    """
    window = _Window(start, file, shown)
    kinds: dict[str, bool] = {}
    for key in _iter_keys(window):
        if key in kinds:
            raise window.refuse(f"the key {key!r} is there twice in one object")
        kinds[key] = window.look() == "["
        if kinds[key]:
            for _ in _iter_elements(window):
                pass
        else:
            window.read_value()
    return kinds


def iter_member_list(
    start: bytes, file: IO[bytes], shown: str, member: str
) -> Iterator[tuple[int, Any]]:
    """Yield `(line, element)` of the list under `member` of the object that begins in `start`."""
    window = _Window(start, file, shown)
    for key in _iter_keys(window):
        if key == member:
            yield from _iter_elements(window)
            return
        window.look()
        window.read_value()


def _iter_keys(window: _Window) -> Iterator[str]:
    """Yield an object's keys; whoever takes one reads its value from the window."""
    window.take("{")
    if window.look() != "}":
        while True:
            if window.look() != '"':
                raise window.refuse("Expecting property name enclosed in double quotes")
            key = str(window.read_value())
            window.take(":")
            yield key
            if window.look() != ",":
                break
            window.take(",")
    window.take("}")
    if window.look():
        raise window.refuse("Extra data")


def _iter_elements(window: _Window) -> Iterator[tuple[int, Any]]:
    window.take("[")
    if window.look() == "]":
        window.take("]")
        return
    while True:
        window.look()
        yield window.line, window.read_value()
        if window.look() != ",":
            break
        window.take(",")
    window.take("]")


class _Window:
    """The part of a text that is being read; `position` is the next character."""

    def __init__(self, start: bytes, file: IO[bytes], shown: str) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._file, self._shown = file, shown
        self._is_whole = False
        self.text = ""
        self.position = 0
        self._counted, self._line = 0, 1
        self._add(start)

    @property
    def line(self) -> int:
        """The line of the next character, from 1."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def look(self) -> str:
        """Skip spaces and return the next character; empty at the end."""
        while True:
            spaces = _SPACES.match(self.text, self.position)
            self.position = spaces.end() if spaces else self.position
            if self.position < len(self.text) or self._is_whole:
                return self.text[self.position : self.position + 1]
            self._grow()

    def take(self, mark: str) -> None:
        """Step over `mark`, which must come next."""
        if self.look() != mark:
            raise self.refuse("Expecting ',' delimiter" if mark in "]}" else f"Expecting '{mark}'")
        self.position += 1

    def read_value(self) -> Any:
        """Return the JSON value that comes next."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self.text) - NEAR_END or "Unterminated" in error.msg
                if self._is_whole or not is_cut:
                    self.position = min(error.pos, len(self.text))
                    raise self.refuse(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self.refuse(json_reason(error)) from error
            else:
                if end < len(self.text) or self._is_whole:  # a number may continue
                    self.position = end
                    return value
            self._grow()

    def refuse(self, reason: str) -> LlmtuneError:
        return LlmtuneError(
            f"{self._shown}:{self.line}: not JSON ({reason}); expected a list of objects"
        )

    def _grow(self) -> None:
        """Let go of what was read, and read as much again as is left, at least a MiB."""
        self._line = self.line
        self.text = self.text[self.position :]
        self.position = self._counted = 0
        self._add(self._file.read(max(READ_BYTES, len(self.text))))

    def _add(self, data: bytes) -> None:
        self._is_whole = not data
        try:
            self.text += self._decoder.decode(data, final=self._is_whole)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.position)
            line += data.count(b"\n", 0, error.start)
            raise LlmtuneError(f"{self._shown}:{line}: not UTF-8 text ({error.reason})") from error
