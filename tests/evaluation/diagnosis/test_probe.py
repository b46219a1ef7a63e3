"""The probe learns what is linearly there, agrees with scikit-learn, and refuses other tasks."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score

from llmtune.evaluation.diagnosis.base import write_diagnostic
from llmtune.evaluation.diagnosis.probe import plan_probe
from llmtune.evaluation.diagnosis.probe_fit import cross_validate
from llmtune.evaluation.diagnosis.states import TextStates, fit_standardizer
from llmtune.evaluation.results import read_arm_result, save_arm_result
from llmtune.evaluation.suite import load_suite
from tests.conftest import write_jsonl
from tests.project import sentences


@pytest.fixture
def two_suites(project, tmp_path):
    """Sentences of known words as the task, and elsewhere with a choice written otherwise."""
    declared = json.loads((project / "sentiment.yaml").read_text())
    known = [row for place, row in enumerate(sentences()) if place % 4 == 1]
    for name, role, negative in (("task", "target", "negative"), ("far", "transfer", "Negative")):
        answers = {"negative": negative, "positive": "positive"}
        items = [{"id": f"{n}", "text": t, "answer": answers[a]} for n, (t, a) in enumerate(known)]
        write_jsonl(tmp_path / f"{name}.jsonl", items)
        suite = declared | {"role": role, "items": f"{name}.jsonl"}
        suite["choices"] = [negative, "positive"]
        (tmp_path / f"{name}.yaml").write_text(json.dumps(suite))
    return load_suite(tmp_path / "task.yaml"), load_suite(tmp_path / "far.yaml")


def test_the_probe_answers_a_separable_task_on_target_and_transfer_suites(
    subject, settings, two_suites, tmp_path
):
    subject = replace(subject, suites=two_suites)
    arms = {}
    result = plan_probe(subject, settings, lambda arm: arms.update({arm.suite: arm})).measure()
    assert set(arms) == {"task", "far"} and result.refused is None
    assert result.answered == ("task", "far")
    assert result.labels == ("negative", "positive") and result.train_rows == 48
    assert {(cell.layer, cell.pooling) for cell in result.table} == {
        (layer, pooling) for layer in (1, 2) for pooling in ("mean", "last")
    }
    assert result.chosen.cv_accuracy == max(cell.cv_accuracy for cell in result.table)
    arm = arms["task"]
    assert arm.arm == "probe" and arm.mean > 0.9 and arms["far"].mean == arm.mean
    assert arm.about == {
        "layer": result.chosen.layer, "pooling": result.chosen.pooling, "C": result.chosen.C,
        "cv_accuracy": result.chosen.cv_accuracy, "train_rows": 48,
    }  # fmt: skip
    assert [item.id for item in arm.items] == [item.id for item in subject.suites[0].items]
    assert arm.recipe["items"] == subject.suites[0].items_fingerprint
    assert arm.model["adapter"] is None
    for item in arm.items:
        assert sum(item.details["probabilities"].values()) == pytest.approx(1)
        assert item.score == float(item.prediction == item.answer)
    assert read_arm_result(save_arm_result(arm, tmp_path)) == arm
    write_diagnostic(result, tmp_path)
    assert plan_probe(subject, settings, lambda arm: None).find(tmp_path) == result


def test_labels_that_mean_nothing_are_not_learned(subject, settings):
    random = np.random.default_rng(1)
    states = {1: random.normal(size=(200, 40)).astype(np.float32)}
    classes = random.integers(0, 2, 200)
    table = cross_validate(TextStates(states, states), classes, (1,), seed=0)
    assert max(cell.cv_accuracy for cell in table) < 0.62


def test_wide_states_give_scikit_learns_own_accuracy():
    random = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], 20)
    states = random.normal(size=(60, 300)).astype(np.float32) + classes[:, None] * 0.1
    table = cross_validate(TextStates({4: states}, {4: states}), classes, (4,), seed=5)
    features = fit_standardizer(states).apply(states)
    folds = StratifiedKFold(5, shuffle=True, random_state=5)
    plain = LogisticRegression(C=table[0].C, max_iter=1000)
    expected = cross_val_score(plain, features, classes, cv=folds).mean()
    assert table[0].cv_accuracy == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"suites": ()}, "no target or transfer suite"),
        ({"trained": (0, 1, 2)}, "3 train rows .* too few"),
    ],
)
def test_a_task_that_is_no_classification_is_refused(subject, settings, change, why):
    arms = []
    result = plan_probe(replace(subject, **change), settings, arms.append).measure()
    assert arms == [] and result.chosen is None
    assert re.search(why, result.refused or "")


def test_answers_that_are_no_choices_are_refused(subject, settings, project, tmp_path):
    declared = json.loads((project / "sentiment.yaml").read_text())
    declared["choices"] = ["negative", "good"]
    rows = [{"id": str(n), "text": "It is.", "answer": "good"} for n in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "s.yaml").write_text(json.dumps(declared))
    other = replace(subject, suites=(load_suite(tmp_path / "s.yaml"),))
    refused = plan_probe(other, settings, lambda arm: None).measure().refused
    assert "24 of 48 train rows" in refused and "2 different answers" in refused
