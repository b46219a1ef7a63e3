"""From a run's sections to what is diagnosed: its rows tokenized as in training, and as plain text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmtune.data.config import DataConfig
from llmtune.data.prepare import prepare_examples
from llmtune.evaluation.diagnosis.rows import RowTexts
from llmtune.evaluation.diagnosis.shift import GENERAL, TRAIN
from llmtune.evaluation.diagnosis.subject import Subject, general_texts
from llmtune.evaluation.scored_model import ScoredModel
from llmtune.evaluation.suite import Suite
from llmtune.training.batch import EpochSampler

EVALUATION = "evaluation"


@dataclass(frozen=True)
class TrainedSteps:
    """How much was trained: the order of the rows follows from the seed."""

    steps: int
    batch_size: int
    seed: int

    def seen(self, num_rows: int) -> tuple[int, ...]:
        """Return the rows that these steps saw, of `num_rows`, in ascending order."""
        steps_an_epoch = math.ceil(num_rows / self.batch_size)
        if self.steps >= steps_an_epoch:
            return tuple(range(num_rows))
        order = list(EpochSampler(num_rows, self.seed))
        return tuple(sorted(order[: self.steps * self.batch_size]))


def prepare_subject(
    scored: ScoredModel, suites: Sequence[Suite], data: DataConfig, trained: TrainedSteps
) -> Subject:
    """Tokenize both splits as training did and say which rows it has seen.

    Raises:
        LlmtuneError: the rows cannot be read any more.
    """
    train, held_out = (
        prepare_examples(data, scored.tokenizer, split=split, seed=trained.seed).examples
        for split in ("train", "evaluation")
    )
    return Subject(
        scored=scored,
        suites=tuple(suites),
        train=train,
        trained=trained.seen(len(train)),
        held_out=held_out,
    )


def shift_texts(
    train: Sequence[RowTexts], evaluation: Sequence[RowTexts], suites: Sequence[Suite]
) -> dict[str, list[str]]:
    """Return the sets of plain texts between which a shift is measured.

    Rows without what all rows of their source begin and end with, general text, and the own words
    of every transfer suite's prompts.
    """
    sets = {
        TRAIN: ["\n".join(filter(None, row.own)) for row in train],
        EVALUATION: ["\n".join(filter(None, row.own)) for row in evaluation],
        GENERAL: general_texts(suites),
    }
    return {name: texts for name, texts in sets.items() if texts}
