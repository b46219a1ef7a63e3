"""The rows of a run under one numbering: their order in every epoch, lengths and sources."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from llmtune.data.example import IGNORE_INDEX, Example, ExampleTable

LARGEST_SEED = 2**63 - 1


class Examples(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


class EpochSampler(Sampler[int]):
    """The order of the rows in every epoch: a function of the seed and the epoch alone."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        mixed = (self.seed * 1_000_003 + self.epoch) % LARGEST_SEED
        generator = torch.Generator().manual_seed(mixed)
        return iter(torch.randperm(self.num_rows, generator=generator).tolist())


def hash_epochs(num_rows: int, seed: int, num_epochs: int) -> str:
    """Return the SHA-256 of the rows' numbers in the order of that many epochs."""
    sampler, digest = EpochSampler(num_rows, seed), hashlib.sha256()
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        digest.update(np.array(list(sampler), dtype="<i8").tobytes())
    return digest.hexdigest()


class JoinedExamples:
    """The training rows followed by the evaluation rows, under one numbering."""

    def __init__(self, train: Sequence[Example], evaluation: Sequence[Example]) -> None:
        self.train = train
        self.evaluation = evaluation

    def __len__(self) -> int:
        return len(self.train) + len(self.evaluation)

    def __getitem__(self, index: int) -> Example:
        if index < len(self.train):
            return self.train[index]
        return self.evaluation[index - len(self.train)]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every row, int64 [rows]."""
        return np.concatenate([row_lengths(self.train), row_lengths(self.evaluation)])


def find_untrained(examples: Sequence[Example]) -> list[int]:
    """Return the rows without a token to train; a row's first token is never predicted."""
    if not isinstance(examples, ExampleTable):
        return [
            index
            for index, example in enumerate(examples)
            if all(label == IGNORE_INDEX for label in example.labels[1:])
        ]
    rows: list[int] = examples.find_untrained().tolist()
    return rows


def group_by_source(examples: Sequence[Example], first_index: int) -> dict[str, list[int]]:
    """Return the rows of every source by its name, shortest first, numbered from `first_index`.

    Rows of like length together need the least padding.
    """
    sources, lengths = _source_indices(examples), row_lengths(examples)
    groups = {}
    for source, name in name_sources(examples).items():
        rows = np.flatnonzero(sources == source)
        ordered = rows[np.argsort(lengths[rows], kind="stable")] + first_index
        groups[name] = ordered.tolist()
    return groups


def name_sources(examples: Sequence[Example]) -> dict[int, str]:
    """Return a name for every source index: the file (or hub id) of its first row."""
    names: dict[int, str] = {}
    indices, firsts = np.unique(_source_indices(examples), return_index=True)
    for index, first in zip(indices.tolist(), firsts.tolist(), strict=True):
        name = examples[first].source
        names[index] = f"{name}#{index}" if name in names.values() else name
    return names


def _source_indices(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    if isinstance(examples, ExampleTable):
        return examples.source_indices
    return np.array([example.source_index for example in examples], dtype=np.int64)


def row_lengths(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    """Return the tokens of every row, int64 [rows]."""
    if isinstance(examples, ExampleTable):
        return examples.lengths
    return np.array([len(example.input_ids) for example in examples], dtype=np.int64)
