"""What is half, damaged or from elsewhere is said in one clear line, and no page is written."""

import json

import pytest

from llmtune.cli import run_command
from llmtune.evaluation.diagnosis.base import write_diagnostic
from llmtune.evaluation.diagnosis.stops import StopCount, StopsResult
from llmtune.evaluation.results import arm_result_path
from llmtune.io.manifest import Manifest
from llmtune.io.run_dir import RunDir
from llmtune.reporting.build import build_report
from tests.reporting.planted import PlantedSuite, improve, plant_generations, plant_run, right_wrong

BASE = right_wrong(60, 0.6, seed=0)
TUNED = improve(BASE, 0.2, seed=1)


@pytest.fixture
def run(tmp_path):
    run = plant_run(
        tmp_path / "run", [PlantedSuite("movies", "target", {"base": BASE, "tuned": TUNED})]
    )
    plant_generations(run, [{"prompt": "p", "base": "b", "tuned": "t"}])
    count = StopCount(1, 2, 3.0)
    stops = StopsResult(inputs={}, base=count, tuned=count, trained_stop_share=1, max_new_tokens=4)
    write_diagnostic(stops, run.diagnostics_dir)
    return run


def tuned_path(run):
    return arm_result_path(run.evaluations_dir, "movies", "tuned")


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refused(run, capsys, *options):
    """Return what the command says; it exits with 2, says one thing and writes no page."""
    assert run_command(["report", str(run.path), *options]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "Traceback" not in said and len(said.splitlines()) == 1
    assert not run.report_html_path.exists() and not run.report_json_path.exists()
    return said


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("evaluations/movies.tuned.json", "measure it again: llmtune eval RUN"),
        ("diagnostics/stops.json", "measure again: llmtune report RUN --full"),
        ("generations.json", "evaluate the run again"),
        ("manifest.json", "rerun with --force"),
    ],
)
def test_a_file_cut_in_half_is_named_with_what_to_do(run, capsys, name, part):
    path = run.path / name
    path.write_text(path.read_text()[: len(path.read_text()) // 2])
    said = refused(run, capsys)
    assert name in said and part in said


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda v: v["items"][3].update(score=float("nan")), "item 'movies-3': score is nan"),
        (lambda v: v["items"][3].update(score="1"), "item 'movies-3': score is '1'"),
        (lambda v: v["items"][3].update(weight=float("inf")), "weight is inf"),
        (lambda v: v.update(mean=None), "mean is None"),
        (lambda v: v.update(items=[]), "holds no items"),
        (lambda v: v.pop("recipe"), "expected the keys"),
        (lambda v: v["items"].pop(), "says n = 60 and holds 59 items"),
        (lambda v: v["recipe"].update(items="other"), "items: None / 'other'"),
    ],
)
def test_scores_that_are_none_or_of_other_items_are_refused(run, capsys, change, part):
    edit(tuned_path(run), change)
    said = refused(run, capsys)
    assert "movies.tuned" in said and part in said


def test_a_deleted_evaluation_is_missing_and_decides_nothing(run):
    tuned_path(run).unlink()
    report = build_report(run)
    assert report.verdict.name == "NOT-MEASURED"
    assert "evaluation of the tuned model" in [missing.name for missing in report.missing]


@pytest.mark.parametrize("stages", [{}, {"train": {"fingerprint": "a"}}])
def test_a_run_that_is_half_done_has_a_report_that_says_so(tmp_path, capsys, stages):
    run = plant_run(tmp_path / "half", manifest=Manifest(config={}, stages=stages))
    assert run_command(["report", str(run.path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "NOT-MEASURED"
    assert "evaluation of the base model" in report["missing"]
    assert ("the end of train" in report["missing"]) == bool(stages)


@pytest.mark.parametrize("bad", ["movies", "movies>", ">1", "movies>x", "movies>nan"])
def test_an_expression_that_is_none_is_refused(run, capsys, bad):
    assert "expected NAME OP NUMBER" in refused(run, capsys, "--fail-if", bad)


def test_arms_of_which_nothing_could_be_parsed_are_reported_with_that(tmp_path):
    nothing = [0.0] * 60
    suite = PlantedSuite(
        "sums",
        "target",
        {"base": nothing, "tuned": nothing},
        metric="exact_match",
        unparsed={"base": 60, "tuned": 60},
    )
    report = build_report(plant_run(tmp_path / "run", [suite]))
    assert report.verdict.name == "INCONCLUSIVE"
    assert sum("100.0 % of the" in caveat for caveat in report.caveats) == 2
    assert report.suites[0].mde == pytest.approx(2.8 / 60)


def test_a_column_of_too_many_values_is_left_out_and_said(tmp_path):
    slices = [{"author": f"a{n}", "half": str(n % 2)} for n in range(60)]
    suite = PlantedSuite("movies", "target", {"base": BASE, "tuned": TUNED}, slices=slices)
    report = build_report(plant_run(tmp_path / "run", [suite]))
    assert {each.column for each in report.suites[0].slices} == {"half"}
    assert any("`author` has 60 values, too many" in caveat for caveat in report.caveats)


def test_a_path_that_is_no_run_is_refused(tmp_path, capsys):
    expected = "no such file or directory; expected a run directory"
    assert expected in refused(RunDir(tmp_path / "nowhere"), capsys)
