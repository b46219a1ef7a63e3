"""What two models are compared on: held-out rows and labels, or the open prompts."""

import pytest

from llmtune import load_config
from llmtune.checks.prompts import HeldOut, build_prompts
from llmtune.data.example import IGNORE_INDEX
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.data.prepare import prepare_examples
from llmtune.evaluation.suite import load_suites
from llmtune.models.resolve import resolve_base
from tests.project import make_project


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(make_project(tmp_path_factory.mktemp("prompts")))


@pytest.fixture(scope="module")
def tokenizer(config):
    return resolve_base(config.model).tokenizer


def test_without_held_out_rows_the_open_prompts_are_the_sequences(tokenizer):
    prompts = build_prompts(tokenizer)
    assert len(prompts.open_prompts) == len(OPEN_PROMPTS)
    assert prompts.sequences == prompts.open_prompts
    assert prompts.labels == ()


def test_held_out_rows_end_before_their_last_trained_token(config, tokenizer):
    held_out = HeldOut(config.data, config.seed, tuple(load_suites(config.evaluate)))
    prompts = build_prompts(tokenizer, held_out)
    split = prepare_examples(config.data, tokenizer, split="evaluation", seed=config.seed)
    rows = [split.examples[index] for index in range(len(split.examples))]
    for row, sequence in zip(rows, prompts.sequences, strict=True):
        assert sequence == tuple(row.input_ids[: len(sequence)])
        rest = [label for label in row.labels[len(sequence) :] if label != IGNORE_INDEX]
        assert len(rest) == 1
    assert len(prompts.labels) == 12
