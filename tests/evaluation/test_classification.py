"""What is said of a choice suite beside its score, against scikit-learn and by hand."""

import random

import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from llmtune.evaluation.classification import (
    ClassScore,
    describe_calibration,
    describe_choices,
    describe_classes,
)
from llmtune.evaluation.results import ItemScore

LABELS = ["red", "green", "blue"]


def test_classes_are_those_of_scikit_learn():
    draw = random.Random(0)
    pairs = [(draw.choice(LABELS), draw.choice([*LABELS, "none of them"])) for _ in range(200)]
    found = describe_classes(pairs, LABELS)
    right, given = zip(*pairs, strict=True)
    expected = precision_recall_fscore_support(right, given, labels=LABELS)
    for name, values in zip(("precision", "recall", "f1", "n"), expected, strict=True):
        assert [getattr(each, name) for each in found.classes] == pytest.approx(list(values))
    assert found.macro_f1 == pytest.approx(expected[2].mean())
    matrix = confusion_matrix(right, given, labels=[*LABELS, "none of them"])
    assert found.confusion == matrix[:3].tolist()


def test_a_class_that_is_neither_asked_nor_answered_does_not_count():
    found = describe_classes([("red", "red"), ("green", "red")], LABELS)
    assert found.macro_f1 == pytest.approx((2 / 3 + 0) / 2)
    assert found.classes[2] == ClassScore("blue", 0, precision=None, recall=None, f1=None)


def test_calibration_by_hand():
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]
    found = describe_calibration(probabilities, [0, 1, 1])
    # two items at 0.9, of which one is right; one at 0.6, right
    assert found.calibration_error == pytest.approx((2 * 0.4 + 1 * 0.4) / 3)
    assert found.brier == pytest.approx((0.02 + 1.62 + 0.32) / 3)
    assert [each.n for each in found.reliability] == [1, 2]


def test_written_answers_have_an_accuracy_of_their_own():
    def score(prediction, written, right):
        kept = {"text": written or "?", "choice": written, "score": right}
        return ItemScore("i", 1.0, prediction, "red", details={"written": kept})

    found = describe_choices([score("red", "red", 1.0), score("red", None, 0.0)], ())
    assert found == {"written_accuracy": 0.5, "written_unparseable": 1, "written_agrees": 0.5}
