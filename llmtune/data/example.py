"""Tokenized examples: ids with labels, a compact table of many, and a split of them prepared."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, overload

import numpy as np

from llmtune.data.report import DataReport
from llmtune.data.stored import StoredTokens, TokenWriter

FLUSHED_ROWS = 1024
IGNORE_INDEX = -100
"""The label of a token that is not trained (PyTorch's and Hugging Face's convention)."""


@dataclass(frozen=True)
class Example:
    """One training sequence. `labels` is as long as `input_ids` and not shifted."""

    input_ids: list[int]
    labels: list[int]
    source: str
    """The file or hub id the row came from, as shown to the user."""
    line: int
    """The row's line in its file, from 1."""
    weight: float = 1.0
    """What this example's loss is multiplied by."""
    source_index: int = 0
    """Which source of the config the row came from, for the loss per source."""


def split_answer(example: Example) -> tuple[list[int], list[int]] | None:
    """Return what a model reads before a row's first answer, and the answer, as token ids.

    A document is trained from its beginning and has no question: its first half is read, and the
    rest is what follows. None if nothing is trained, or nothing can be read.
    """
    ids, labels = example.input_ids, example.labels
    start = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
    if start == len(ids) or len(ids) < 2:
        return None
    end = start
    while end < len(ids) and labels[end] != IGNORE_INDEX:
        end += 1
    if start == 0:
        start = max(1, end // 2)
    return ids[:start], ids[start:end]


class ExampleTable(Sequence[Example]):
    """Examples in flat arrays: 5 bytes a token, where lists of ints take more than 70.

    `tokens` int32 [T] and `trained` bool [T] hold every token and may lie in a file. The index
    says what each of the N examples is: `starts` int64, `lengths`, `num_trained` int32,
    `is_first_trained` bool, `files` int32, `lines` int64, `weights` float32, `sources` int32;
    `file_names` names `files`. Another order, or a repeat, is a new index of the same tokens.
    """

    COLUMNS: ClassVar[dict[str, np.dtype]] = {
        "starts": np.dtype("<i8"),
        "lengths": np.dtype("<i4"),
        "num_trained": np.dtype("<i4"),
        "is_first_trained": np.dtype("?"),
        "files": np.dtype("<i4"),
        "lines": np.dtype("<i8"),
        "weights": np.dtype("<f4"),
        "sources": np.dtype("<i4"),
    }

    def __init__(
        self, stored: StoredTokens, columns: Mapping[str, np.ndarray], file_names: Sequence[str]
    ) -> None:
        self.stored = stored
        self.columns = {
            name: np.asarray(columns[name], dtype) for name, dtype in self.COLUMNS.items()
        }
        self.file_names = tuple(file_names)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each example, int64 [N]."""
        return self.columns["lengths"].astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all examples together."""
        return int(self.lengths.sum())

    @property
    def num_trained(self) -> int:
        """Tokens that carry a label, over all examples."""
        return int(self.columns["num_trained"].sum(dtype=np.int64))

    @property
    def source_indices(self) -> np.ndarray:
        """Each example's source in the config, int32 [N]."""
        return self.columns["sources"]

    def find_untrained(self) -> np.ndarray:
        """Return the examples int64 [M] that train nothing: the first token is never predicted."""
        return np.flatnonzero(self.columns["num_trained"] == self.columns["is_first_trained"])

    def __len__(self) -> int:
        return len(self.columns["starts"])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ExampleTable: ...
    def __getitem__(self, index: int | slice) -> Example | ExampleTable:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = {name: array[int(index)].item() for name, array in self.columns.items()}
        place = slice(row["starts"], row["starts"] + row["lengths"])
        tokens = self.stored.tokens[place]
        return Example(
            input_ids=tokens.tolist(),
            labels=np.where(self.stored.trained[place], tokens, IGNORE_INDEX).tolist(),
            source=self.file_names[row["files"]],
            line=row["lines"],
            weight=row["weights"],
            source_index=row["sources"],
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: np.ndarray) -> ExampleTable:
        """Return the examples at `indices` (int [M], may repeat), in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        index = {name: array[chosen] for name, array in self.columns.items()}
        return ExampleTable(self.stored, index, self.file_names)


class ExampleTableBuilder:
    """Writes examples to files, batch by batch; only the index, 37 bytes an example, stays.

    Without a directory the files have no name and vanish with the table.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._writer = TokenWriter(directory)
        self._pieces: list[dict[str, np.ndarray]] = []
        self._files: dict[str, int] = {}
        self._pending: list[tuple[list[int], list[tuple[int, int]], int, int, float, int]] = []

    def add(
        self,
        input_ids: list[int],
        spans: Iterable[tuple[int, int]],
        *,
        origin: tuple[str, int],
        weight: float = 1.0,
        source_index: int = 0,
    ) -> None:
        """Add one example whose trained tokens are the half-open `spans`.

        Raises:
            LlmtuneError: the files cannot be written.
        """
        file = self._files.setdefault(origin[0], len(self._files))
        self._pending.append((input_ids, list(spans), file, origin[1], weight, source_index))
        if len(self._pending) >= FLUSHED_ROWS:
            self._flush()

    def build(self) -> ExampleTable:
        """Return everything added so far as one table."""
        self._flush()
        index = {
            name: np.concatenate([piece[name] for piece in self._pieces])
            for name in ExampleTable.COLUMNS
        }
        return ExampleTable(self._writer.finish(), index, list(self._files))

    def _flush(self) -> None:
        rows, self._pending = self._pending, []
        lengths = np.array([len(row[0]) for row in rows], dtype=np.int64)
        every = itertools.chain.from_iterable(row[0] for row in rows)
        tokens = np.fromiter(every, dtype="<i4", count=int(lengths.sum()))
        trained = np.zeros(len(tokens) + 1, dtype=bool)  # one more: an empty row has a first too
        starts = np.cumsum(lengths) - lengths
        for row, start in zip(rows, starts.tolist(), strict=True):
            for low, high in row[1]:
                trained[start + low : start + high] = True
        totals = np.concatenate([[0], np.cumsum(trained)])
        columns = list(zip(*(row[2:] for row in rows), strict=True)) or [(), (), (), ()]
        values = [
            starts + self._writer.num_tokens,
            lengths,
            totals[starts + lengths] - totals[starts],
            trained[starts] & (lengths > 0),
            *columns,
        ]
        self._writer.write(tokens, trained[:-1])
        self._pieces.append(
            {
                name: np.array(value, dtype)
                for (name, dtype), value in zip(ExampleTable.COLUMNS.items(), values, strict=True)
            }
        )


@dataclass(frozen=True)
class PreparedData:
    """One split, ready for training."""

    examples: ExampleTable
    """Train: in the order of the seed. Evaluation: in the order of the files."""
    source_names: tuple[str, ...]
    report: DataReport
    fingerprint: str
    """SHA-256 over every token, mask, weight and their order."""
    order_hash: str


def fingerprint_table(table: ExampleTable) -> str:
    """Return the SHA-256 over a table's tokens and masks, and its examples and weights in order."""
    digest = hashlib.sha256(table.stored.content_hash.encode())
    for name in ("starts", "lengths", "weights"):
        digest.update(table.columns[name].tobytes())
    return digest.hexdigest()
