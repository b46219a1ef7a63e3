"""From a run's sections to what is diagnosed: the rows as they were trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from llmtune.data.config import DataConfig
from llmtune.data.example import ExampleTable
from llmtune.data.prepare import prepare_examples
from llmtune.evaluation.diagnosis.subject import Subject
from llmtune.evaluation.tasks.base import Suite
from llmtune.models.live import LiveModel
from llmtune.training.rows import EpochSampler


@dataclass(frozen=True)
class TrainedSteps:
    """How much was trained, and on what: the order of the rows follows from the seed."""

    steps: int | None
    """None if that is not known: then every row counts as seen."""
    batch_size: int
    seed: int
    num_sources: int
    """The run's own train sources; those behind them are general data against forgetting."""
    num_added: int = 0
    """Rows that the base wrote against forgetting: they stand behind the prepared ones."""

    def num_epochs(self, num_rows: int) -> float:
        """Return how often these steps went over `num_rows` prepared rows and the added ones."""
        if self.steps is None:
            return 1.0
        return self.steps / math.ceil((num_rows + self.num_added) / self.batch_size)

    def seen(self, table: ExampleTable) -> tuple[int, ...]:
        """Return the places of the run's own rows that these steps saw, in ascending order."""
        order = list(EpochSampler(len(table) + self.num_added, self.seed))
        if self.steps is not None and self.num_epochs(len(table)) < 1:
            order = order[: self.steps * self.batch_size]
        prepared = sorted(place for place in order if place < len(table))
        return tuple(place for place in prepared if table.source_indices[place] < self.num_sources)


def prepare_subject(
    scored: LiveModel,
    suites: Sequence[Suite],
    data: DataConfig,
    mixed_data: DataConfig,
    trained: TrainedSteps,
) -> Subject:
    """Tokenize both splits as training did and say which rows it has seen.

    Args:
        mixed_data: what was trained on: `data`, and general data behind it.

    Raises:
        LlmtuneError: the rows cannot be read any more.
    """
    prepare = partial(prepare_examples, tokenizer=scored.tokenizer, seed=trained.seed)
    train = prepare(mixed_data, split="train").examples
    held_out = prepare(data, split="evaluation").examples
    return Subject(
        scored=scored,
        suites=tuple(suites),
        train=train,
        trained=trained.seen(train),
        held_out=held_out,
    )
