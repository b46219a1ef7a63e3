"""What an item scores, metric by metric."""

import math
from typing import get_args

import pytest

from llmtune.evaluation.tasks import choice, exact
from llmtune.evaluation.tasks.base import SuiteItem
from llmtune.evaluation.tasks.config import TASKS
from llmtune.evaluation.tasks.exact import normalize_text
from llmtune.evaluation.text_metrics import TEXT_METRICS
from llmtune.scoring.requests import ContinuationScore


@pytest.mark.parametrize("task", TASKS)
def test_every_task_declares_the_metrics_that_its_knob_takes(task):
    knob = TASKS[task].model_fields["metric"]
    names = [name for each in get_args(knob.annotation) for name in get_args(each) or (each,)]
    assert [metric.name for metric in TASKS[task].METRICS] == names[: len(TASKS[task].METRICS)]


@pytest.mark.parametrize("module", [choice, exact])
def test_every_metric_of_an_answer_has_its_function(module):
    [task] = [each for each in TASKS.values() if each.__module__ == module.__name__]
    assert {metric.name for metric in task.METRICS} == {
        *module.METRIC_FUNCTIONS,
        *(TEXT_METRICS if module is exact else ()),
        *(("json_schema",) if module is exact else ()),  # made of the suite's own schema
    }


def test_accuracy_takes_the_most_likely_choice():
    assert choice.accuracy([-3.0, -1.0, -2.0], 1) == 1.0
    assert choice.accuracy([-3.0, -1.0, -2.0], 0) == 0.0


def test_answer_probability_is_a_softmax_that_does_not_underflow():
    found = choice.answer_probability([-1000.0, -1000.0 + math.log(3)], 1)
    assert found == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((), " The Cat,  sat. "),
        (("strip",), "The Cat,  sat."),
        (("lowercase", "punctuation", "articles", "whitespace", "strip"), "cat sat"),
        (("strip", "whitespace", "articles", "punctuation", "lowercase"), "cat sat"),
    ],
)
def test_normalization_applies_its_steps_in_one_order(steps, expected):
    assert normalize_text(" The Cat,  sat. ", steps) == expected


def test_contains_means_whole_words():
    assert exact.contains("it is positive, i think", "positive") == 1.0
    assert exact.contains("impositive", "positive") == 0.0


def test_token_f1_by_hand():
    # shared: "new", "york"; precision 2/3, recall 2/2
    assert exact.token_f1("new york city", "new york") == pytest.approx(0.8)
    assert exact.token_f1("paris", "london") == 0.0
    assert exact.token_f1("", "london") == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("so 12 + 30 = 42.", "42", 1.0),
        ("1,234 in all", "1234", 1.0),
        ("-3.50", "-3.5", 1.0),
        ("forty-two", "42", 0.0),
        ("42 or 43", "42", 0.0),
        ("1,2", "12", 0.0),
        ("10-20", "-20", 0.0),
        ("it is -5", "-5", 1.0),
    ],
)
def test_number_match_compares_the_last_numbers(prediction, reference, score):
    assert exact.number_match(prediction, reference) == score


def suite_of(**keys):
    return choice.ChoiceSuite(task="choice", items="i.jsonl", prompt="{{ q }}", **keys)


def make_item(answer, *choices):
    return SuiteItem(id="i", line=1, choices=choices, answer=answer)


def test_the_majority_of_items_with_choices_of_their_own_is_the_commonest_place_or_text():
    suite = suite_of(choices_field="options")
    items = [make_item(0, f"a{n}", f"b{n}") for n in range(3)] + [make_item(1, "a3", "b3")]
    assert suite.majority(items) == 0.75
    items = [make_item(0, "x", "y"), make_item(1, "z", "x"), make_item(2, "z", "y", "x")]
    assert suite.majority(items) == 1.0


@pytest.mark.parametrize(
    ("normalize", "right"), [("none", "no"), ("length", "perhaps so"), ("characters", "perhaps so")]
)
def test_likelihoods_may_be_compared_per_token_or_per_character(normalize, right):
    suite = suite_of(choices=["no", "perhaps so"], normalize=normalize)
    scores = [ContinuationScore(-1.0, 1, False), ContinuationScore(-1.5, 2, False)]
    found = suite._score_item(make_item(0, "no", "perhaps so"), scores)
    assert found.prediction == right
