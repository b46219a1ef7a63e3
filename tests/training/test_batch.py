"""Micro-batches hold every row once, within their limits, and train exactly the labelled tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.training.batch import StepCollator, pack_rows, pad_rows
from llmtune.training.grouping import largest_micro_batches, plan_micro_batches
from llmtune.training.memory.arithmetic import BatchLimits
from llmtune.training.rows import EpochSampler
from tests.training.tiny_runs import make_rows

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=24)
limits = st.builds(BatchLimits, st.none() | st.integers(1, 9), st.integers(1, 700))


@settings(max_examples=150, deadline=None)
@given(lengths, limits, st.booleans())
def test_every_row_is_in_exactly_one_micro_batch_within_the_limits(lengths, limits, packed):
    plan = plan_micro_batches(lengths, limits, packed=packed)
    assert sorted(index for one in plan for index in one) == list(range(len(lengths)))
    for one in plan:
        longest = max(lengths[index] for index in one)
        tokens = sum(lengths[i] for i in one) if packed else longest * len(one)
        assert len(one) == 1 or tokens <= limits.tokens
        assert limits.rows is None or len(one) <= limits.rows


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 2000), st.booleans())
def test_the_tried_micro_batches_are_as_large_as_any_planned_one(lengths, tokens, packed):
    limits = BatchLimits(None, max(tokens, *lengths, 1))
    rows = [Example([1] * length, [1] * length, "f", 1) for length in sorted(lengths)[::-1]]

    def size(group):
        return sum(group) if packed else max(group) * len(group)

    tried = largest_micro_batches(rows, limits, packed=packed)
    largest = max(size([len(row.input_ids) for row in group]) for group in tried)
    planned = plan_micro_batches(lengths, limits, packed=packed)
    needed = max(size([lengths[index] for index in group]) for group in planned)
    slack = len(lengths) if not packed else 0  # whole tokens a row
    assert needed <= largest + slack
    assert largest <= limits.tokens


def test_packed_micro_batches_are_first_fit_decreasing():
    plan = plan_micro_batches([300, 700, 500, 200, 300], BatchLimits(None, 1000), packed=True)
    assert plan == [[1, 0], [2, 4, 3]]


def test_padded_micro_batches_hold_neighbors_in_length():
    plan = plan_micro_batches([5, 100, 6, 90], BatchLimits(2, 10_000), packed=False)
    assert plan == [[1, 3], [2, 0]]


@pytest.mark.parametrize("build", [pack_rows, lambda rows: pad_rows(rows, 0)])
def test_targets_are_the_labelled_tokens_at_the_position_before(build):
    rows = make_rows(5)
    batch = build(rows)
    flat = batch["input_ids"].flatten()
    # Labels repeat the token itself, so the token after each position is its target.
    assert torch.equal(flat[batch["target_positions"] + 1], batch["targets"])
    expected = sum(label != IGNORE_INDEX for row in rows for label in row.labels[1:])
    assert len(batch["targets"]) == expected


def test_the_first_token_of_a_row_is_never_predicted_from_its_neighbor():
    rows = [Example([5, 6], [5, 6], "f", 1), Example([7, 8], [7, 8], "f", 2)]
    assert pack_rows(rows)["targets"].tolist() == [6, 8]


def test_padding_is_masked_by_position_even_where_its_id_is_a_real_token():
    batch = pad_rows([Example([9, 9, 9], [9, 9, 9], "f", 1), Example([9], [9], "f", 2)], 9)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["targets"].tolist() == [9, 9]


def test_the_weights_of_a_step_sum_to_one_however_it_is_split():
    rows = [Example(row.input_ids, row.labels, "f", row.line, row.line / 2) for row in make_rows(9)]
    for limits in (BatchLimits(1, 10**9), BatchLimits(None, 90), BatchLimits(None, 10**9)):
        step = StepCollator(rows, limits, packed=True, pad_token_id=0).collate(range(9))
        total = sum(one["target_weights"].sum().item() for one in step["micro_batches"])
        assert total == pytest.approx(1, abs=1e-6)


def test_the_order_of_rows_depends_on_seed_and_epoch_alone():
    sampler, again = EpochSampler(50, seed=3), EpochSampler(50, seed=3)
    first = list(sampler)
    torch.manual_seed(99)
    assert list(again) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(sampler) == list(range(50))
    assert list(EpochSampler(50, seed=4)) != first


@pytest.mark.parametrize("packed", [True, False])
def test_rows_on_both_sides_of_a_rotary_switch_are_kept_apart(packed):
    lengths, limits = [90, 10, 64, 65, 8], BatchLimits(tokens=1000, rows=None)
    plan = plan_micro_batches(lengths, limits, packed=packed, switch=64)
    assert sorted(map(sorted, plan)) == [[0, 3], [1, 2, 4]]
    assert len(plan_micro_batches(lengths, limits, packed=packed, switch=100)) == 1
