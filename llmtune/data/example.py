"""Tokenized examples: token ids with labels, and a compact table of many of them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

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


class ExampleTable(Sequence[Example]):
    """Examples in flat arrays: 5 bytes a token, where lists of ints take more than 70.

    Arrays: `tokens` int32 [T], `trained` bool [T], `offsets` int64 [N+1], `files` int32 [N],
    `lines` int64 [N], `weights` float32 [N], `sources` int32 [N]; `file_names` names `files`.
    """

    ARRAYS = ("tokens", "trained", "offsets", "files", "lines", "weights", "sources")

    def __init__(self, arrays: dict[str, np.ndarray], file_names: Sequence[str]) -> None:
        self.arrays = {name: arrays[name] for name in self.ARRAYS}
        self.file_names = tuple(file_names)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each example, int64 [N]."""
        return np.diff(self.arrays["offsets"])

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_trained(self) -> int:
        """Tokens that carry a label, over all examples."""
        return int(self.arrays["trained"].sum())

    @property
    def source_indices(self) -> np.ndarray:
        """Each example's source in the config, int32 [N]."""
        return self.arrays["sources"]

    def __len__(self) -> int:
        return len(self.arrays["offsets"]) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "ExampleTable": ...
    def __getitem__(self, index: int | slice) -> "Example | ExampleTable":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index = int(index) % len(self)
        start, end = self.arrays["offsets"][index : index + 2]
        tokens = self.arrays["tokens"][start:end]
        labels = np.where(self.arrays["trained"][start:end], tokens, IGNORE_INDEX)
        return Example(
            input_ids=tokens.tolist(),
            labels=labels.tolist(),
            source=self.file_names[self.arrays["files"][index]],
            line=int(self.arrays["lines"][index]),
            weight=float(self.arrays["weights"][index]),
            source_index=int(self.arrays["sources"][index]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: np.ndarray) -> "ExampleTable":
        """Return the examples at `indices` (int [M], may repeat), in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        starts, lengths = self.arrays["offsets"][:-1][indices], self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Position of every kept token in the old flat arrays: its start, plus its place inside.
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        arrays = {name: self.arrays[name][indices] for name in self.ARRAYS[3:]}
        arrays |= {name: self.arrays[name][places] for name in ("tokens", "trained")}
        return ExampleTable(arrays | {"offsets": offsets}, self.file_names)


class ExampleTableBuilder:
    """Collects examples piece by piece into an `ExampleTable`."""

    def __init__(self) -> None:
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
        """Add one example whose trained tokens are the half-open `spans`."""
        file = self._files.setdefault(origin[0], len(self._files))
        self._pending.append((input_ids, list(spans), file, origin[1], weight, source_index))
        if len(self._pending) >= 1024:
            self._flush()

    def build(self) -> ExampleTable:
        """Return everything added so far as one table."""
        self._flush()
        arrays = {
            name: np.concatenate([piece[name] for piece in self._pieces])
            for name in ("tokens", "trained", "lengths", *ExampleTable.ARRAYS[3:])
        }
        arrays["offsets"] = np.concatenate([[0], np.cumsum(arrays.pop("lengths"))])
        return ExampleTable(arrays, list(self._files))

    def _flush(self) -> None:
        rows, self._pending = self._pending, []
        lengths = np.array([len(row[0]) for row in rows], dtype=np.int64)
        every = itertools.chain.from_iterable(row[0] for row in rows)
        tokens = np.fromiter(every, dtype=np.int32, count=int(lengths.sum()))
        trained = np.zeros(len(tokens), dtype=bool)
        start = 0
        for row, length in zip(rows, lengths.tolist(), strict=True):
            for low, high in row[1]:
                trained[start + low : start + high] = True
            start += length
        columns = list(zip(*(row[2:] for row in rows), strict=True)) or [(), (), (), ()]
        types = (np.int32, np.int64, np.float32, np.int32)
        names = ExampleTable.ARRAYS[3:]
        piece: dict[str, np.ndarray] = {"lengths": lengths, "tokens": tokens, "trained": trained}
        for name, column, dtype in zip(names, columns, types, strict=True):
            piece[name] = np.array(column, dtype=dtype)
        self._pieces.append(piece)
