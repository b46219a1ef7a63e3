"""A budget fails on a number beyond it and on one that was not measured, and never in silence."""

import pytest

from llmtune.cli import run_command
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.reporting.budgets import MEASURES, check_budgets, measure, parse_budgets
from llmtune.reporting.build import build_report
from tests.reporting.full import plant_full_run
from tests.reporting.planted import PlantedSuite, plant_run, right_wrong


@pytest.fixture
def run(tmp_path):
    return plant_full_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("general_loss", 0.11),
        ("general_drop", 0.0208),
        ("target_gain", 0.24),
        ("transfer_gain", 0.05),
        ("kl_general", 0.09),
        ("kl_target", 0.27),
        ("flips_general", 0.045),
        ("unparseable", 0.0),
        ("stop_rate", 15 / 16),
        ("contamination", 1 / 300),
        ("memorization_auc", 0.57),
        ("seconds", 233.0),
        ("movies", 0.24),
        ("movies.change", 0.24),
        ("movies.base", 0.6),
        ("passages.gain", -0.11),
        ("passages.change", 0.11),
    ],
)
def test_every_name_is_the_number_of_the_report(run, name, expected):
    assert measure(build_report(run), name) == pytest.approx(expected, abs=0.0005)


@pytest.mark.parametrize(
    ("expression", "fails"),
    [
        ("general_loss>0.2", False),
        ("general_loss > 0.1", True),
        ("target_gain<=0.25", True),
        ("movies.change<0.3", True),
        ("movies.change>=1e3", False),
        ("stop_rate!=1", True),
        ("stop_rate==1", False),
        ("general.gain<-0.01", True),
    ],
)
def test_a_violated_budget_is_exit_code_1_with_the_number(run, expression, fails, capsys):
    code = run_command(["report", str(run.path), "--quiet", "--fail-if", expression])
    assert code == (1 if fails else 0)
    error = capsys.readouterr().err
    assert ("--fail-if: " in error and " is " in error) == fails


def test_all_violations_are_told_at_once(run):
    budgets = parse_budgets(["general_loss>0", "kl_general>0", "target_gain<0"])
    with pytest.raises(
        CheckFailed, match=r"general_loss>0: .* 0\.11.*; kl_general>0: .* is 0\.09$"
    ):
        check_budgets(build_report(run), budgets)


def test_what_was_not_measured_fails_and_says_so(tmp_path, capsys):
    scores = right_wrong(50, 0.5, seed=0)
    suites = [PlantedSuite("movies", "target", {"base": scores, "tuned": scores})]
    bare = plant_run(tmp_path, suites)
    for name in set(MEASURES) - {"target_gain", "unparseable"}:
        assert run_command(["report", str(bare.path), "--fail-if", f"{name}>1e9"]) == 1
        assert f"{name} was not measured" in capsys.readouterr().err
    assert run_command(["report", str(bare.path), "--fail-if", "movies.merged<0"]) == 1


def test_an_unknown_name_is_an_error_with_the_list(run, capsys):
    assert run_command(["report", str(run.path), "--fail-if", "generall_loss>0.2"]) == 2
    error = capsys.readouterr().err
    assert "generall_loss" in error and "general_loss" in error and "passages" in error


@pytest.mark.parametrize(
    "expression",
    ["general_loss", "general_loss>", ">0.2", "general_loss>much", "general_loss>nan", "", "a=1"],
)
def test_anything_else_than_name_operator_number_is_refused(expression):
    with pytest.raises(LlmtuneError, match="NAME OP NUMBER"):
        parse_budgets([expression])


def test_an_expression_is_never_evaluated(run, capsys):
    attack = "__import__('os').system('true')>0"
    assert run_command(["report", str(run.path), "--fail-if", attack]) == 2
    assert "unknown name" in capsys.readouterr().err
