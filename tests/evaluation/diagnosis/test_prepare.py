"""What training saw follows from its steps, and plain texts carry no template, frame or label."""

import pytest
from torch.utils.data import DataLoader

from llmtune.config import load_config
from llmtune.data.example import ExampleTableBuilder
from llmtune.evaluation.diagnosis.rows import read_row_texts
from llmtune.evaluation.diagnosis.shift import shift_texts
from llmtune.evaluation.diagnosis.subject import TrainedSteps, prepare_subject
from llmtune.training.rows import EpochSampler


def table_of(*counts: int):
    """So many rows of every source."""
    builder = ExampleTableBuilder()
    for source, count in enumerate(counts):
        for line in range(count):
            builder.add([line, 2], [(0, 2)], origin=("rows", line), source_index=source)
    return builder.build()


@pytest.mark.parametrize(("steps", "count"), [(3, 24), (5, 40), (6, 45), (50, 45)])
def test_the_seen_rows_are_those_of_the_first_steps(steps, count):
    seen = TrainedSteps(steps, batch_size=8, seed=3, num_sources=1).seen(table_of(45))
    loader = DataLoader(range(45), batch_size=8, sampler=EpochSampler(45, 3))
    batches = [batch.tolist() for batch in loader][:steps]
    assert sorted(row for batch in batches for row in batch) == list(seen)
    assert len(seen) == count


def test_rows_against_forgetting_take_their_places_and_are_not_counted_as_seen():
    """In an epoch of 54: 40 rows of the run's own, 5 of a file, 9 that the base wrote."""
    trained = TrainedSteps(3, batch_size=8, seed=3, num_sources=1, num_added=9)
    drawn = list(EpochSampler(54, 3))[:24]
    assert list(trained.seen(table_of(40, 5))) == sorted(row for row in drawn if row < 40)
    assert any(40 <= row < 45 for row in drawn) and any(row >= 45 for row in drawn)
    assert trained.num_epochs(45) == 3 / 7


def test_a_subject_holds_both_splits_and_the_seen_rows(subject, project):
    config = load_config(project / "config.yaml")
    steps = TrainedSteps(2, 8, 0, num_sources=1)
    found = prepare_subject(subject.scored, subject.suites, config.data, config.mixed_data, steps)
    assert (len(found.train), len(found.held_out), len(found.trained)) == (48, 4, 16)
    assert [example.input_ids for example in found.train] == [e.input_ids for e in subject.train]


def test_plain_texts_are_the_rows_own_words(project, suites):
    config = load_config(project / "config.yaml")
    train, evaluation = (read_row_texts(config.data, split) for split in ("train", "evaluation"))
    sets = shift_texts(train, evaluation, suites)
    assert {name: len(texts) for name, texts in sets.items()} == {
        "train": 48, "evaluation": 4, "general": 4,
    }  # fmt: skip
