"""Rows' texts, places and keys in little memory: texts in a file, the rest in flat arrays."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from typing import TypeVar, overload

import numpy as np

from llmtune.errors import LlmtuneError

Item = TypeVar("Item")


class Sliced(Sequence[Item]):
    """A sequence that is known item by item; a slice of it is a list."""

    @abstractmethod
    def at(self, index: int) -> Item:
        """Return one item."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.at(place) for place in range(*index.indices(len(self)))]
        return self.at(index)


class SpooledTexts(Sliced[str]):
    """Texts in a temporary file without a name: 8 bytes of memory a text."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the texts
        self._ends = array("q", [0])
        self._is_at_end = True

    def append(self, text: str) -> None:
        """Add a text.

        Raises:
            LlmtuneError: the temporary directory cannot be written.
        """
        data = text.encode()
        try:
            if not self._is_at_end:
                self._file.seek(0, 2)
                self._is_at_end = True
            self._file.write(data)
        except OSError as error:
            raise LlmtuneError(
                f"{tempfile.gettempdir()}: cannot be written: {error}; make room there, or choose "
                "another directory with TMPDIR"
            ) from error
        self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def at(self, index: int) -> str:
        """Return one text."""
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        start, end = self._ends[index], self._ends[index + 1]
        self._is_at_end = False
        if self._file.tell() != start:
            self._file.seek(start)
        return self._file.read(end - start).decode()


class JoinedTexts(Sliced[str]):
    """Two sequences of texts under one numbering."""

    def __init__(self, one: Sequence[str], other: Sequence[str]) -> None:
        self._one, self._other = one, other

    def __len__(self) -> int:
        return len(self._one) + len(self._other)

    def at(self, index: int) -> str:
        """Return one text."""
        split = len(self._one)
        return self._one[index] if index < split else self._other[index - split]


class PlaceList(Sliced[tuple[str, int]]):
    """Files and lines of rows: 12 bytes a row."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._names: list[str] = []
        self._numbers = array("i")
        self._lines = array("q")

    def append(self, source: str, line: int) -> None:
        """Add a row's place."""
        number = self._files.setdefault(source, len(self._files))
        if number == len(self._names):
            self._names.append(source)
        self._numbers.append(number)
        self._lines.append(line)

    def __len__(self) -> int:
        return len(self._lines)

    def at(self, index: int) -> tuple[str, int]:
        """Return one file and line."""
        return self._names[self._numbers[index]], self._lines[index]


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """Return for each row of `keys` [N, K] the first row that equals it, int64 [N]."""
    if not len(keys):
        return np.empty(0, dtype=np.int64)
    order = np.lexsort(keys.T)  # stable: the first of equals stays first
    ordered = keys[order]
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = np.empty(len(keys), dtype=np.int64)
    firsts[order] = order[is_new][np.cumsum(is_new) - 1]
    return firsts
