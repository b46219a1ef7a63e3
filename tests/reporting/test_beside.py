"""Scores beside a suite's metric are shown, and said where they contradict it."""

from llmtune.reporting.beside import find_disagreements, tabulate_beside
from llmtune.reporting.suites import ArmScore, Change, SuiteReport


def make_suite(base, tuned, *, task="choice", metric="accuracy", difference=0.3):
    return SuiteReport(
        name="labels",
        role="target",
        task=task,
        metric=metric,
        higher_is_better=True,
        n=100,
        arms={"base": ArmScore(0.2, also=base), "tuned": ArmScore(0.5, also=tuned)},
        compared=("base", "tuned"),
        change=Change(difference, difference - 0.1, difference + 0.1, 0.001),
    )


def test_a_gain_that_only_one_of_two_scores_shows_is_said():
    suite = make_suite({"written_accuracy": 0.01}, {"written_accuracy": 0.07})
    [found] = find_disagreements(suite)
    assert (found.name, round(found.beside, 2)) == ("written_accuracy", 0.06)
    assert "+30.0 points, the written answer by +6.0 points" in found.sentence
    assert tabulate_beside(suite).sentences == (found.sentence,)


def test_scores_that_agree_say_nothing():
    suite = make_suite({"written_accuracy": 0.2}, {"written_accuracy": 0.45})
    assert find_disagreements(suite) == ()
    assert find_disagreements(make_suite({}, {})) == ()


def test_a_gain_of_format_alone_is_called_that():
    suite = make_suite(
        {"strict": 0.0, "lenient": 0.68},
        {"strict": 0.7, "lenient": 0.7},
        task="exact",
        metric="exact_match",
        difference=0.7,
    )
    [found] = find_disagreements(suite)
    assert "gains is format" in found.sentence


def test_the_table_has_a_column_for_every_arm_and_rows_of_what_was_measured():
    table = tabulate_beside(make_suite({"macro_f1": 0.2, "brier": None}, {"macro_f1": 0.4}))
    assert table.arms == ("base", "tuned")
    assert table.rows == (("Macro-F1", (0.2, 0.4)),)
    assert tabulate_beside(make_suite({}, {})) is None
