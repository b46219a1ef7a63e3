"""A grid of settings: each point is a run, one that fails is named, and the rest are ranked."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmtune.cli import run_command
from llmtune.config import RunConfig
from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.experiments.fan_out import Outcome, Task, do_all, find_caller
from llmtune.experiments.sweep import rank_runs
from llmtune.io.manifest import Manifest
from llmtune.launching.base import Called
from llmtune.launching.ray import RayEngine
from llmtune.runs import pipeline
from tests.experiments.engine import call_like_an_engine
from tests.project import make_project
from tests.reporting.planted import PlantedSuite, improve, plant_run, right_wrong

PAGE = Path(__file__).parents[2] / "docs" / "sweep.md"
BASE = right_wrong(400, 0.5, seed=0)


def plant(path: Path, rank: int, tuned) -> Path:
    config = RunConfig(
        run_dir=path,
        model={"base": "base"},
        adapter={"rank": rank},
        data={"train": [{"path": "rows.jsonl"}]},
    ).model_dump(mode="json")
    config["evaluate"]["bootstrap_samples"] = 1000
    arms = {"base": BASE, "tuned": tuned}
    plant_run(path, [PlantedSuite("movies", "target", arms)], manifest=Manifest(config=config))
    return path


def test_runs_that_differ_in_a_knob_are_ranked_with_ties(tmp_path, capsys):
    gains = {4: 0.05, 8: 0.3, 16: 0.3, 32: 0.1}
    paths = [plant(tmp_path / f"r{n}", n, improve(BASE, gain, seed=n)) for n, gain in gains.items()]
    assert run_command(["report", *map(str, paths), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    standing = {run["name"]: run["standing"] for run in found["runs"]}
    assert found["knobs"] == ["adapter.rank"]
    assert sorted(standing.values()) == ["tied", "winner", "worse", "worse"]
    assert standing["r4"] == standing["r32"] == "worse"
    assert found["num_choosing"] + found["num_judging"] == 400
    assert run_command(["report", *map(str, paths)]) == 0
    said = capsys.readouterr().out
    assert "Not to be told from the winner" in said and "rank" in said


def test_the_best_of_many_equal_runs_is_not_flattered(tmp_path):
    """Eight runs of one quality: the half that chose the winner shows it too good."""
    paths = [plant(tmp_path / f"r{n}", n, right_wrong(400, 0.7, seed=n)) for n in range(1, 9)]
    study = rank_runs(paths)
    true = sum(run.score + run.chosen_by for run in study.runs) / (2 * len(study.runs))
    winner = study.runs[0]
    assert winner.chosen_by - true > 0.01
    assert winner.score < winner.chosen_by
    assert len(study.ties) == 7


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (Outcome(), type(None)),
        (Outcome("no room", 2), LlmtuneError),
        (Outcome("stopped", 3), RunInterrupted),
    ],
)
def test_what_ended_on_a_machine_is_what_it_would_be_here(monkeypatch, outcome, kind):
    def call_each(self, function, values, *, wants_gpu):
        yield Called(2, lost="its process was lost")
        yield Called(1, broken="a bug")
        yield Called(0, outcome)

    monkeypatch.setattr(RayEngine, "call_each", call_each)
    config = SimpleNamespace(model=SimpleNamespace(device="auto"), run_dir="runs/a")
    found = do_all([Task(cast(Any, config))] * 3, find_caller("ray"))
    number, error = next(found)
    assert number == 1 and str(error) == "a bug" and error.exit_code == 2
    if kind is RunInterrupted:
        with pytest.raises(RunInterrupted, match="stopped"):
            next(found)
    else:
        number, error = next(found)
        assert number == 0 and type(error) is kind
        # what was lost is not a run that failed: the same command does it
        with pytest.raises(RunInterrupted, match="1 of 3 runs were lost.*runs/a: its") as lost:
            next(found)
        assert lost.value.exit_code == 3


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("sweep"))


def test_a_grid_is_run_ranked_and_continued(project, capsys, monkeypatch):
    command = ["sweep", str(project), "train.learning_rate=1e-3,5e-3", "adapter.rank=2"]
    settings = ["train.max_steps=1", "evaluate.extent=none", "protect.kl_to_base=null"]
    settings.append(f"evaluate.suites=[{project.parent / 'sentiment.yaml'}]")
    assert run_command([*command, *settings, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 runs" in said and "learning_rate-1e-3" in said
    done, run = [], pipeline.run

    def fail_once(config, *, force=False):
        done.append(config.run_dir)
        if len(done) == 1:
            raise LlmtuneError("out of memory")
        return run(config, force=force)

    monkeypatch.setattr(pipeline, "run", fail_once)
    assert run_command([*command, *settings, "--json", "--quiet"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 1 and list(found["failed"].values()) == ["out of memory"]
    # on an engine the rest is done, in any order
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run_command([*command, *settings, "--on", "ray"]) == 2
    assert "Ray is not installed here" in capsys.readouterr().err
    calls = call_like_an_engine(monkeypatch)
    assert run_command([*command, *settings, "--json", "--quiet", "--on", "ray"]) == 0
    assert calls == [1, 0] and len(json.loads(capsys.readouterr().out)["runs"]) == 2
    assert run_command(["report", str(project.parent / "run")]) == 0
    assert "minus winner" in capsys.readouterr().out
    for command in re.findall(r"^llmtune .*$", PAGE.read_text(encoding="utf-8"), re.M):
        words = command.replace("tickets.yaml", str(project)).split()[1:]
        if words[0] == "sweep":
            words = [word for word in words if not word.startswith("run_dir=")]
            words += ["--dry-run", f"run_dir={project.parent / 'page'}"]
        words = [word.replace("runs/grid", str(project.parent / "run")) for word in words]
        assert run_command(words) == 0, f"{command}\n{capsys.readouterr().err}"
    said = capsys.readouterr().out
    assert "6 runs" in said and "minus winner" in said and "The winner's own verdict: " in said


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (["adapter.rank=4"], "several values"),
        (["adapter.rank=4,0"], "rank-0"),
        (["adapter.rank=4,,8"], "a value is empty"),
        (["adapter.rank=4,4"], "there twice"),
        (["adapter.rnk=4,8"], "rank"),
        (["adapter.rank"], "expected key=a,b"),
    ],
)
def test_a_grid_that_is_wrong_starts_no_run(project, capsys, grid, words):
    assert run_command(["sweep", str(project), *grid, f"run_dir={project.parent / 'none'}"]) == 2
    assert words in capsys.readouterr().err and not (project.parent / "none").exists()


@pytest.mark.parametrize("command", [["sweep", "adapter.rank=4,8"], ["run", "--seeds", "3"]])
def test_several_runs_are_not_made_among_files_of_others(project, capsys, tmp_path, command):
    (tmp_path / "notes.txt").write_text("mine")
    name, *options = command
    assert run_command([name, str(project), *options, f"run_dir={tmp_path}"]) == 2
    assert "holds 'notes.txt', which is not a run" in " ".join(capsys.readouterr().err.split())
    assert [child.name for child in tmp_path.iterdir()] == ["notes.txt"]
