"""The learning curve of a tiny run: nested parts, the run's own epochs, nothing trained twice."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llmtune import evaluate, load_config, train
from llmtune.cli import run_command
from llmtune.data.config import SourceConfig
from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.base import read_diagnostic
from llmtune.evaluation.diagnosis.curve_fit import summarize_curve
from llmtune.evaluation.diagnosis.learning_curve import LearningCurveResult
from llmtune.evaluation.results import read_arm_result
from llmtune.evaluation.suite import load_suites
from llmtune.experiments.learning_curve import plan_learning_curve
from llmtune.io.manifest import read_manifest
from tests.project import make_project

TWO_EPOCHS = ["train.max_steps=12", "evaluate.arms=[tuned]", "evaluate.extent=none"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of 12 steps of 8 rows: two epochs of 48 rows, trained and scored."""
    config = load_config(make_project(tmp_path_factory.mktemp("curve")), TWO_EPOCHS)
    train(config)
    evaluate(config)
    return config


def read_rows(training):
    [source] = training.config.data.train
    assert isinstance(source, SourceConfig) and source.format == "messages"
    return Path(source.path).read_text(encoding="utf-8").splitlines()


def test_the_parts_are_nested_and_as_many_epochs_long(config):
    plan = plan_learning_curve(config)
    assert [training.rows for training in plan.trainings] == [6, 6, 12, 24]
    assert [training.config.seed for training in plan.trainings] == [0, 1, 0, 0]
    parts = [read_rows(training) for training in plan.trainings]
    for training, rows in zip(plan.trainings, parts, strict=True):
        assert len(rows) == len(set(rows)) == training.rows
        assert training.config.train.num_epochs == 2 and training.config.train.max_steps is None
        assert training.config.train.schedule == config.train.schedule
    assert parts[0] == parts[1] and set(parts[0]) < set(parts[2]) < set(parts[3])
    assert plan.seconds > 0 and "4 trainings on 6, 6, 12, 24 rows" in plan.line()


def test_part_of_an_epoch_counts_the_rows_that_were_seen(config):
    shorter = load_config(config.run_dir.parent / "config.yaml", [*TWO_EPOCHS[1:], "seed=5"])
    shorter = shorter.model_copy(update={"run_dir": config.run_dir.parent / "short"})
    train(shorter)
    evaluate(shorter)
    plan = plan_learning_curve(shorter)
    assert plan.num_rows == 24 and [t.rows for t in plan.trainings] == [3, 3, 6, 12]
    assert plan.trainings[0].config.train.num_epochs == 1


def test_the_command_measures_the_curve_and_goes_on_where_it_was(config, capsys):
    target = str(config.run_dir)
    assert run_command(["learning-curve", target, "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = read_diagnostic(LearningCurveResult, config.run.diagnostics_dir)
    assert [point.rows for point in found.points] == [6, 6, 12, 24, 48]
    assert printed["suite"] == found.suite == "sentiment"
    assert found.fit is not None and found.fit.at_2n.rows == 96
    plan = plan_learning_curve(config)
    before = [read_manifest(training.config.run).stages for training in plan.trainings]
    assert run_command(["learning-curve", target, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "6 rows, seed 1" in text and "would give a loss of" in text
    after = [read_manifest(training.config.run).stages for training in plan.trainings]
    assert before == after


def test_the_loss_of_an_item_is_that_of_its_right_choice(config):
    [suite] = [suite for suite in load_suites(config.evaluate) if suite.name == "sentiment"]
    result = read_arm_result(config.run.evaluations_dir / "sentiment.tuned.json")
    curve = summarize_curve(suite, [(rows, 0, result) for rows in (6, 12, 24, 48)])
    losses = []
    for item, score in zip(suite.items, result.items, strict=True):
        likelihoods = score.details["log_likelihoods"]
        total = sum(math.exp(value) for value in likelihoods)
        losses.append(-math.log(math.exp(likelihoods[item.answer]) / total))
    assert curve.points[0].loss == pytest.approx(sum(losses) / len(losses))
    assert curve.points[0].score == result.mean
    assert "includes no gain" in curve.refused
    other = replace(result, recipe=result.recipe | {"items": "others"})
    with pytest.raises(LlmtuneError, match="of other items"):
        summarize_curve(suite, [(6, 0, other)])


def test_what_cannot_be_measured_says_so(config, tmp_path):
    with pytest.raises(LlmtuneError, match="'nowhere'.*sentiment, prose"):
        plan_learning_curve(config, suite="nowhere")
    fresh = config.model_copy(update={"run_dir": tmp_path / "fresh"})
    with pytest.raises(LlmtuneError, match="no result of the tuned model on sentiment"):
        plan_learning_curve(fresh)
