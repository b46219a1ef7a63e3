"""What training is given and what it gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from llmtune.data.example import IGNORE_INDEX, Example, ExampleTable
from llmtune.io.run_dir import RunDir
from llmtune.training.protect.penalties import ProtectionRequest

Technique = Literal["fused_lora", "fused_blocks", "frozen_head"]


@dataclass(frozen=True)
class TrainRequest:
    """What is trained on what.

    `identity` names what the run is made of (data, base, config: name to hash). It is recorded in
    every checkpoint, and a run is only ever continued from one with the same identity.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Example]
    evaluation: Sequence[Example]
    run: RunDir
    seed: int
    identity: Mapping[str, str]
    packing: Literal["auto", "on", "off"] = "auto"
    quiet: bool = False
    without: frozenset[Technique] = frozenset()
    """Techniques to leave out, to measure what each gives or to find a fault."""
    protection: ProtectionRequest | None = None
    """What holds the adapter near its base."""


@dataclass(frozen=True)
class TrainResult:
    """What came out: totals over the whole run, resumed parts included.

    `final_loss` is the last logged training loss and `final_eval_loss` the last evaluation's
    (nats a trained token); `peak_bytes` is allocated memory on a GPU and resident memory, loading
    included, on a CPU; `best_checkpoint` is relative to the run's directory;
    `choices` says in words what was chosen for this model and machine.
    """

    steps: int
    tokens: int
    trained_tokens: int
    seconds: float
    peak_bytes: int
    final_loss: float
    final_eval_loss: float | None
    best_checkpoint: str | None
    stopped_by: Literal["max_steps", "early_stopping"]
    interrupted_by: str | None = None
    """A signal that came while the last step was being done; the training is complete."""
    choices: dict[str, str] = field(default_factory=dict)


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
    def lengths(self) -> np.ndarray:
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
    return examples.find_untrained().tolist()


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


def _source_indices(examples: Sequence[Example]) -> np.ndarray:
    if isinstance(examples, ExampleTable):
        return examples.source_indices
    return np.array([example.source_index for example in examples], dtype=np.int64)


def row_lengths(examples: Sequence[Example]) -> np.ndarray:
    """Return the tokens of every row, int64 [rows]."""
    if isinstance(examples, ExampleTable):
        return examples.lengths
    return np.array([len(example.input_ids) for example in examples], dtype=np.int64)
