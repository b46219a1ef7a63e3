"""Copies inside a suite are one observation."""

from dataclasses import replace

from llmtune.evaluation.suite import group_copies
from llmtune.evaluation.tasks.base import SuiteItem

WORDS = "the quick brown fox jumps over the lazy dog and sleeps beside the warm river bank"


def item(place, prompt, **fields):
    return SuiteItem(id=f"i{place}", line=place, prompt=prompt, **fields)


def clusters(*items):
    return [each.cluster for each in group_copies(items)]


def test_different_items_stay_as_they_are():
    items = (item(1, "What is two and two?"), item(2, "Who wrote the letter?"))
    assert group_copies(items) == items


def test_the_same_question_is_one_cluster_whatever_its_case_and_spaces():
    found = clusters(item(1, "Is it  so?"), item(2, "Who?"), item(3, "is it so?"))
    assert found == ["i1", "i2", "i1"]


def test_the_same_words_about_different_choices_are_different_questions():
    items = (item(1, "Which?", choices=("a", "b")), item(2, "Which?", choices=("c", "d")))
    assert group_copies(items) == items


def test_nearly_the_same_text_is_one_cluster():
    found = clusters(item(1, WORDS), item(2, "Something else entirely."), item(3, WORDS + "s"))
    assert found == ["i1", "i2", "i1"]


def test_a_copy_joins_the_clusters_that_a_suite_declares():
    items = [
        item(n, text, cluster=name)
        for n, (text, name) in enumerate(
            zip(("one a", "two b", "three c", "two b"), ("x", "x", "y", "y"), strict=True)
        )
    ]
    assert clusters(*items) == ["x", "x", "x", "x"]
    assert clusters(*items[:3]) == ["x", "x", "y"]


def test_chats_that_end_alike_are_different_questions():
    last = {"role": "user", "content": "And why?"}
    chats = [
        ({"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}, last)
        for question in ("Is the sky blue?", "Do cats purr?", "Is the sky blue?")
    ]
    items = tuple(
        SuiteItem(id=str(i), line=i, prompt="And why?", references=("So.",), messages=chat)
        for i, chat in enumerate(chats)
    )
    first, second, third = (each.cluster for each in group_copies(items))
    assert first == third != second
    tools = ({"function": {"name": "look"}},)
    assert group_copies((items[0], replace(items[2], tools=tools))) == (
        items[0],
        replace(items[2], tools=tools),
    )
