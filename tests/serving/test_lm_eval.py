"""`eval --lm-eval` on a run: both arms on one loaded base, kept, and shown in the report."""

import importlib
import json
from typing import Any

import pytest
from click.testing import CliRunner

from llmtune import load_config
from llmtune.cli import cli
from llmtune.runs import pipeline
from tests.evaluation.test_lm_eval import write_task
from tests.project import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    directory = tmp_path_factory.mktemp("harness")
    config = make_project(directory / "project", evaluate={"arms": ["base", "tuned"]})
    loaded = load_config(config, ["train.max_steps=1", "evaluate.suites=[]"])
    pipeline.train(loaded)
    pipeline.merge(loaded)
    write_task(directory, num_items=12)
    return loaded.run, str(directory / "tasks")


def test_both_arms_are_run_on_one_base_and_joined_into_the_report(project):
    run, tasks = project
    loads = []
    live: Any = importlib.import_module("llmtune.scoring.live")

    original = live.load_model
    live.load_model = lambda *given, **how: loads.append(given) or original(*given, **how)
    try:
        called = CliRunner().invoke(
            cli,
            [
                "eval",
                str(run.path),
                "--lm-eval",
                "local_words",
                "--include-path",
                tasks,
                "--json",
                "--quiet",
            ],
            standalone_mode=False,
        )
    finally:
        live.load_model = original
    assert called.exception is None, called.exception
    scores = json.loads(called.stdout)["lm_eval_local_words"]
    assert len(loads) == 1
    assert set(scores["arms"]) == {"base", "tuned"}
    assert scores["arms"]["tuned"]["lm_eval"]["acc,none"] == scores["arms"]["tuned"]["mean"]
    assert scores["comparison"]["n"] == 12

    report = pipeline.report(run.path)
    [suite] = [suite for suite in report.suites if suite.name == "lm_eval_local_words"]
    assert suite.role == "general"
    assert suite.change is not None


def test_the_merged_model_is_run_where_it_is_asked_for(project):
    run, tasks = project
    called = CliRunner().invoke(
        cli,
        [
            "eval",
            str(run.path),
            "--lm-eval",
            "local_words",
            "--include-path",
            tasks,
            "--arm",
            "merged",
            "--limit",
            "3",
            "--json",
            "--quiet",
        ],
        standalone_mode=False,
    )
    assert called.exception is None, called.exception
    [scores] = json.loads(called.stdout).values()
    assert list(scores["arms"]) == ["merged"]
    assert scores["n"] == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--lm-eval", "local_wrods"], "local_words"),
        (["--lm-eval", ","], "names no task"),
        (["--limit", "3"], "--lm-eval TASKS"),
        (["--arm", "tuned"], "--lm-eval TASKS"),
        (["--lm-eval", "local_words", "--suite", "general"], "one at a time"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(project, options, expected):
    run, tasks = project
    more = ["--include-path", tasks] if "--lm-eval" in options else []
    called = CliRunner().invoke(cli, ["eval", str(run.path), *options, *more, "--quiet"])
    assert called.exit_code != 0
    assert expected in str(called.exception)
