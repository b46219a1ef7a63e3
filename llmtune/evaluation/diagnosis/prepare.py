"""From a run's sections to what is diagnosed: rows as they were trained, and as plain text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmtune.data.config import DataConfig
from llmtune.data.prepare import prepare_examples
from llmtune.evaluation.diagnosis.rows import MIN_OWN_WORDS, RowTexts, find_frame
from llmtune.evaluation.diagnosis.shift import GENERAL, TRAIN
from llmtune.evaluation.diagnosis.subject import Subject, asking_suites, general_texts
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

    Without what all rows of a source (all prompts of a suite) begin and end with, and without
    passages of fewer than five words where a row has longer ones: a label behind every sentence
    would tell any two sets apart. Transfer suites stand under their names.
    """
    sets = {
        TRAIN: [_domain_text(row) for row in train],
        EVALUATION: [_domain_text(row) for row in evaluation],
        GENERAL: general_texts(suites),
    }
    for suite in asking_suites(suites, ("transfer",)):
        prompts = [item.prompt for item in suite.items]
        frame = find_frame(prompts)
        sets[suite.name] = [frame.own_words(prompt) for prompt in prompts]
    return {name: texts for name, texts in sets.items() if texts}


def _domain_text(row: RowTexts) -> str:
    telling = [text for text in row.own if len(text.split()) >= MIN_OWN_WORDS]
    return "\n".join(telling or row.passages)
