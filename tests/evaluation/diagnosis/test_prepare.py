"""What training saw follows from its steps, and plain texts carry no template, frame or label."""

import pytest
from torch.utils.data import DataLoader

from llmtune.config import load_config
from llmtune.evaluation.diagnosis.prepare import TrainedSteps, prepare_subject, shift_texts
from llmtune.evaluation.diagnosis.rows import read_row_texts
from llmtune.training.batch import EpochSampler


@pytest.mark.parametrize(("steps", "count"), [(3, 24), (5, 40), (6, 45), (50, 45)])
def test_the_seen_rows_are_those_of_the_first_steps(steps, count):
    seen = TrainedSteps(steps, batch_size=8, seed=3).seen(45)
    loader = DataLoader(range(45), batch_size=8, sampler=EpochSampler(45, 3))
    batches = [batch.tolist() for batch in loader][:steps]
    assert sorted(row for batch in batches for row in batch) == list(seen)
    assert len(seen) == count


def test_a_subject_holds_both_splits_and_the_seen_rows(subject, project):
    config = load_config(project / "config.yaml")
    found = prepare_subject(subject.scored, subject.suites, config.data, TrainedSteps(2, 8, 0))
    assert (len(found.train), len(found.held_out), len(found.trained)) == (48, 4, 16)
    assert [example.input_ids for example in found.train] == [e.input_ids for e in subject.train]


def test_plain_texts_are_the_rows_own_words(project, suites):
    config = load_config(project / "config.yaml")
    rows = [read_row_texts(config.data, split) for split in ("train", "evaluation")]
    sets = shift_texts(*rows, suites)
    assert {name: len(texts) for name, texts in sets.items()} == {
        "train": 48, "evaluation": 4, "general": 4,
    }  # fmt: skip
