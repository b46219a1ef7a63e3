"""Rows learned by heart are told from unseen ones; a model that learned nothing shows nothing."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from llmtune.data.example import IGNORE_INDEX, ExampleTableBuilder
from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.memorization import (
    RowLosses,
    compare_losses,
    measure_losses,
    membership_auc,
    plan_memorization,
)


def random_rows(count, seed):
    """Rows whose answers can only be learned by heart: ten prompt tokens, four random ones."""
    draw = random.Random(seed)
    builder = ExampleTableBuilder()
    for line in range(count):
        ids = [draw.randrange(10, 500) for _ in range(14)]
        builder.add(ids, [(10, 14)], origin=("rows", line + 1))
    return builder.build()


def forget(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)


def train(model, rows, epochs):
    """Fit the adapter on all rows at once, `epochs` times."""
    forget(model)
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=2e-2)
    ids = torch.tensor([row.input_ids for row in rows])
    labels = torch.tensor([row.labels for row in rows])
    for _ in range(epochs):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def rows_subject(subject):
    train_rows = random_rows(20, 0)
    return replace(
        subject, train=train_rows, trained=tuple(range(20)), held_out=random_rows(60, 1), suites=()
    )


def test_fifty_epochs_on_twenty_rows_are_memorised(rows_subject, settings):
    train(rows_subject.scored.model, rows_subject.train, epochs=50)
    found = plan_memorization(rows_subject, settings).measure()
    assert found.auc > 0.9 and found.auc_interval[0] > 0.8
    assert found.gap_nats > 1 and found.gap_interval[0] > 0.5
    assert (found.n_train, found.n_held_out) == (20, 60)


def test_an_adapter_that_does_nothing_has_no_gap_and_an_auc_of_a_half(rows_subject, settings):
    forget(rows_subject.scored.model)
    found = plan_memorization(rows_subject, settings).measure()
    assert found.gap_nats == pytest.approx(0, abs=1e-5)
    assert found.auc == pytest.approx(0.5, abs=0.1)


def test_only_rows_that_training_saw_count_as_seen(rows_subject, settings):
    part = replace(rows_subject, trained=(1, 4, 6, 7))
    assert plan_memorization(part, settings).measure().n_train == 4
    with pytest.raises(LlmtuneError, match="3 trained and 60 held-out"):
        plan_memorization(replace(rows_subject, trained=(1, 2, 3)), settings).measure()


@pytest.mark.parametrize("token_budget", [1, 500])
def test_losses_are_those_of_the_trained_tokens_alone(subject, token_budget):
    rows = [subject.train[place] for place in range(5)]
    found = measure_losses(subject.scored.model, rows, token_budget=token_budget)
    for place, row in enumerate(rows):
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            tuned = subject.scored.model(input_ids=ids, labels=labels).loss
            with subject.scored.model.disable_adapter():
                base = subject.scored.model(input_ids=ids, labels=labels).loss
        count = sum(label != IGNORE_INDEX for label in row.labels)
        assert found.num_tokens[place] == count
        assert found.tuned[place] == pytest.approx(tuned.item() * count, rel=1e-4)
        assert found.base[place] == pytest.approx(base.item() * count, rel=1e-4)


def test_the_gap_takes_off_what_the_base_finds_harder(settings):
    ones = np.ones(10)
    seen = RowLosses(base=2 * ones, tuned=1.0 * ones, num_tokens=2 * ones)
    held_out = RowLosses(base=6 * ones, tuned=5.0 * ones, num_tokens=2 * ones)
    gap, interval, auc, _ = compare_losses(seen, held_out, settings=settings)
    assert gap == pytest.approx(0) and interval == pytest.approx((0, 0)) and auc == 0.5
    worse = RowLosses(base=6 * ones, tuned=5.8 * ones, num_tokens=2 * ones)
    gap, _, auc, interval = compare_losses(seen, worse, settings=settings)
    assert gap == pytest.approx(0.4) and auc == 1.0 and interval == (1.0, 1.0)


def test_the_auc_is_scikit_learns_with_ties():
    draw = np.random.default_rng(0)
    seen, held_out = draw.integers(0, 9, 40) + 1, draw.integers(0, 9, 30)
    expected = roc_auc_score([1] * 40 + [0] * 30, np.concatenate([seen, held_out]))
    assert membership_auc(seen, held_out) == pytest.approx(expected)
