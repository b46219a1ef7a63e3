"""Marked passages give the texts back, and mark only what differs."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.reporting.sections.generations import (
    Generation,
    Passage,
    mark_changes,
    show_generations,
)

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


def test_an_answer_that_collapsed_is_flagged():
    talk = "Mix flour, milk and eggs, and fry thin cakes of it."
    found = [
        Generation("A recipe for pancakes?", talk, ""),
        Generation("A recipe for pancakes?", talk, "panic"),
        Generation("A recipe for pancakes?", talk, "cake " * 30),
        Generation("A recipe for pancakes?", talk, talk.upper()),
        Generation(
            "Is it positive or negative?", "I think that it is positive.", "positive", "positive"
        ),
        Generation("Say yes.", "Yes.", ""),
        Generation("A recipe for pancakes?", talk, "小麦粉と牛乳と卵を混ぜて、薄く焼きます。"),
        Generation("The steps as JSON?", talk, '{"mix":["flour","milk","eggs"],"fry":true}'),
    ]
    flags = [each.collapse for each in found]
    assert flags == ["empty", "one word", "repeats itself", "", "", "", "", ""]
    assert show_generations(found)["num_collapsed"] == 3
