"""Two runs are compared item by item on the same recipe, or refused with what differs."""

import json

import pytest

from llmtune.cli import run_command
from llmtune.evaluation.results import Recipe, arm_result_path, read_arm_result, save_arm_result
from llmtune.io.run_dir import RunDir
from tests.reporting.planted import PlantedSuite, improve, plant_run, right_wrong, worsen

BASE = right_wrong(300, 0.6, seed=0)
TUNED = improve(BASE, 0.2, seed=1)


def plant(path, tuned, *, more=(), clusters=None):
    movies = PlantedSuite("movies", "target", {"base": BASE, "tuned": tuned}, clusters=clusters)
    plant_run(path, [movies, *more])
    return path


def change_recipe(path, suite, changes: Recipe):
    evaluations = RunDir(path).evaluations_dir
    result = read_arm_result(arm_result_path(evaluations, suite, "tuned"))
    result.recipe.update(changes)
    save_arm_result(result, evaluations)


def test_the_better_run_is_named_with_the_same_statistics(tmp_path, capsys):
    first = plant(tmp_path / "a", worsen(TUNED, 0.1, seed=2))
    second = plant(tmp_path / "b", TUNED)
    assert run_command(["report", str(first), str(second), "--json"]) == 0
    movies = json.loads(capsys.readouterr().out)["suites"]["movies"]
    assert movies["difference"] == pytest.approx(0.1)
    assert movies["low"] > 0 and movies["better"] == "second"
    assert movies["mcnemar_p"] < 0.001 and movies["n"] == 300
    page = (first / "versus-b.html").read_text()
    assert "b against a" in page and "<svg" in page
    assert json.loads((first / "versus-b.json").read_text())["suites"]["movies"] == movies
    assert run_command(["report", str(second), str(first)]) == 0
    assert "second minus first" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_in_a_table_of_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    first = plant(tmp_path / "a-long-enough-place" / "run", worsen(TUNED, 0.1, seed=2))
    second = plant(tmp_path / "another-long-place" / "run", TUNED)
    assert run_command(["report", str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[:2]] == [f"first: {first}", f"second: {second}"]
    movies = next(line for line in lines if line.lstrip().startswith("movies"))
    assert movies.rstrip().endswith("second") and len(movies) <= 80


def test_equal_runs_show_no_difference(tmp_path, capsys):
    first, second = plant(tmp_path / "a", TUNED), plant(tmp_path / "b", TUNED)
    assert run_command(["report", str(first), str(second), "--json"]) == 0
    movies = json.loads(capsys.readouterr().out)["suites"]["movies"]
    assert (movies["difference"], movies["p_value"], movies["better"]) == (0, 1, None)


def test_other_items_scoring_or_base_are_refused_by_name(tmp_path, capsys):
    first, second = plant(tmp_path / "a", TUNED), plant(tmp_path / "b", TUNED)
    change_recipe(second, "movies", {"scoring": {"prompt": "another"}, "base": "other"})
    for across in ([], ["--across", "base"]):
        assert run_command(["report", str(first), str(second), *across]) == 2
        assert "scoring: " in capsys.readouterr().err
    assert run_command(["report", str(first), str(second), "--across", "scoring"]) == 2
    assert "expected one of base" in capsys.readouterr().err


def test_another_base_can_be_allowed_and_is_said(tmp_path, capsys):
    first, second = plant(tmp_path / "a", TUNED), plant(tmp_path / "b", TUNED)
    change_recipe(second, "movies", {"base": "other"})
    assert run_command(["report", str(first), str(second)]) == 2
    assert "--across" in capsys.readouterr().err
    assert run_command(["report", str(first), str(second), "--across", "base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipes_differ_in"] == {"movies": ["base"]}
    assert "movies in base" in (first / "versus-b.html").read_text()


def test_fewer_items_in_one_run_are_refused(tmp_path, capsys):
    first = plant(tmp_path / "a", TUNED)
    plant_run(
        tmp_path / "b",
        [PlantedSuite("movies", "target", {"base": BASE[:200], "tuned": TUNED[:200]})],
    )
    assert run_command(["report", str(first), str(tmp_path / "b")]) == 2
    assert "num_items: 300 / 200" in capsys.readouterr().err


def test_suites_of_one_run_alone_are_named_and_holm_counts_the_shared_ones(tmp_path, capsys):
    extra = PlantedSuite("tweets", "transfer", {"base": BASE, "tuned": TUNED})
    alone = PlantedSuite("news", "transfer", {"base": BASE, "tuned": TUNED})
    first = plant(tmp_path / "a", worsen(TUNED, 0.05, seed=3), more=[extra, alone])
    second = plant(tmp_path / "b", TUNED, more=[extra])
    assert run_command(["report", str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["only_first"] == ["news"] and set(found["suites"]) == {"movies", "tweets"}
    movies = found["suites"]["movies"]
    assert movies["holm_p"] == pytest.approx(2 * movies["p_value"])


def test_what_cannot_be_compared_is_one_clear_error(tmp_path, capsys):
    first = plant(tmp_path / "a", TUNED)
    plant_run(tmp_path / "empty")
    for arguments, words in (
        ([str(first), str(first)], "the same run twice"),
        ([str(first), str(tmp_path / "empty")], "no suite"),
        ([str(first), str(tmp_path / "nothing")], "nothing: no such file or directory"),
        ([str(first), str(first), "--fail-if", "movies>0"], "give one run"),
        ([str(first), "--across", "base"], "two runs"),
    ):
        assert run_command(["report", *arguments]) == 2
        assert words in capsys.readouterr().err
