"""Marked passages give the texts back, and mark only what differs."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.reporting.sections.generations import Passage, mark_changes

TEXTS = st.text(alphabet="ab .,\n", max_size=40)


@settings(max_examples=100, deadline=None)
@given(TEXTS, TEXTS)
def test_passages_joined_are_the_texts(before, after):
    left, right = mark_changes(before, after)
    assert "".join(passage.text for passage in left) == before
    assert "".join(passage.text for passage in right) == after


@settings(max_examples=30, deadline=None)
@given(TEXTS)
def test_equal_texts_have_no_mark(text):
    for side in mark_changes(text, text):
        assert not any(passage.changed for passage in side)


def test_a_changed_phrase_is_one_mark():
    left, right = mark_changes("a very long day", "a rather short day")
    assert left == (Passage("a ", False), Passage("very long", True), Passage(" day", False))
    assert right == (Passage("a ", False), Passage("rather short", True), Passage(" day", False))
