"""Packing loses nothing, overfills nothing, and stays near the best possible."""

import math

from hypothesis import given
from hypothesis import strategies as st

from llmtune.training.grouping import pack_lengths


@given(lengths=st.lists(st.integers(1, 64), max_size=200))
def test_every_example_is_in_exactly_one_bin_that_is_not_overfull(lengths):
    bins = pack_lengths(lengths, 64)
    assert sorted(index for packed in bins for index in packed) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in packed) <= 64 for packed in bins)
    # No two bins would fit into one, so all but one are more than half full on average.
    assert len(bins) <= math.ceil(2 * sum(lengths) / 64) + 1
    assert pack_lengths(lengths, 64) == bins


def test_first_fit_decreasing_is_what_is_done():
    assert pack_lengths([3, 7, 5, 2, 3], 10) == [[1, 0], [2, 4, 3]]


def test_example_longer_than_a_bin_stands_alone():
    assert pack_lengths([3, 11, 7], 10) == [[1], [2, 0]]


@given(lengths=st.lists(st.integers(0, 64), max_size=60), rows=st.integers(1, 5))
def test_no_bin_holds_more_rows_than_allowed(lengths, rows):
    bins = pack_lengths(lengths, 64, max_rows=rows)
    assert sorted(index for packed in bins for index in packed) == list(range(len(lengths)))
    assert all(len(packed) <= rows for packed in bins)
    assert all(sum(lengths[index] for index in packed) <= 64 for packed in bins)
