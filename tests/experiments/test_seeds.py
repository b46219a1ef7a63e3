"""Trainings that differ in their seed alone: the interval covers them, anything else is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmtune.cli import run_command
from llmtune.config import RunConfig
from llmtune.errors import LlmtuneError
from llmtune.experiments.seeds import join_reports, open_seed_run, parse_seeds
from llmtune.io.manifest import Manifest, read_manifest
from llmtune.io.run_dir import RunDir
from tests.experiments.engine import call_like_an_engine
from tests.project import make_project
from tests.reporting.planted import PlantedSuite, improve, plant_run, right_wrong, worsen

BASE = right_wrong(300, 0.6, seed=0)


def gain_of(scores):
    return (sum(scores) - sum(BASE)) / len(BASE)


def plant(path, seed, tuned, *, rows=48, **sections):
    """Write a run of a seed whose tuned model has these scores; return its directory as text."""
    config = RunConfig(
        run_dir=path,
        seed=seed,
        model={"base": "base"},
        data={"train": [{"path": "rows.jsonl"}]},
        **sections,
    ).model_dump(mode="json")
    config["evaluate"]["bootstrap_samples"] = 1000
    counts = {"rows_read": rows, "rows_kept": rows, "examples": rows}
    manifest = Manifest(config=config, data={"train": {"sources": [counts]}})
    half = improve(BASE, gain / 2, seed=seed) if (gain := gain_of(tuned)) > 0 else BASE
    arms = {"base": BASE, "tuned": tuned, "strength-0.5": half}
    suites = [PlantedSuite("movies", "target", arms)]
    plant_run(path, suites, manifest=manifest)
    return str(path)


def plant_seeds(tmp_path, gains):
    return [
        plant(tmp_path / f"seed-{number}", number, improve(BASE, gain, seed=number))
        for number, gain in enumerate(gains)
    ]


def test_every_arm_of_the_adapter_is_compared_over_all_seeds(tmp_path):
    runs = [open_seed_run(Path(each)) for each in plant_seeds(tmp_path, (0.1, 0.16, 0.22))]
    (movies,) = join_reports(runs, "seeds").suites
    half = movies.rivals["strength-0.5"]
    assert half.over_base is not None and half.tuned_over is not None
    assert half.over_base.difference == pytest.approx(0.08, abs=0.004)
    assert half.tuned_over.difference == pytest.approx(0.08, abs=0.004)


def test_a_gain_that_every_seed_has_is_shown_and_one_that_seeds_disagree_on_is_not(
    tmp_path, capsys
):
    outcomes = {}
    for name, gains in (("steady", (0.15, 0.16, 0.17)), ("wild", (0.0, 0.1, 0.3))):
        assert run_command(["report", *plant_seeds(tmp_path / name, gains), "--json"]) == 0
        outcomes[name] = json.loads(capsys.readouterr().out)["suites"]["movies"]
    steady, wild = outcomes["steady"], outcomes["wild"]
    assert steady["outcome"] == "better" and wild["outcome"] == "no difference shown"
    assert steady["changes"] == pytest.approx([0.15, 0.16, 0.17], abs=0.004)
    assert steady["spread"] == pytest.approx(0.01, abs=0.004)
    assert wild["high"] - wild["low"] > 2 * (wild["items_alone"][1] - wild["items_alone"][0])
    page = (tmp_path / "wild" / "seed-0" / "seeds.html").read_text()
    assert "3 seeds" in page and "no difference shown" in page
    assert json.loads((tmp_path / "wild" / "seed-0" / "seeds.json").read_text())["runs"][2] == {
        "run": "seed-2",
        "seed": 2,
        "verdict": "SHIP, general not shown",
    }


def test_a_seed_that_broke_something_is_named_beside_a_joint_verdict_to_ship(tmp_path):
    general = right_wrong(200, 0.8, seed=5)
    runs = []
    for number, kept in enumerate((general, general, worsen(general, 0.13, seed=6))):
        run = Path(plant(tmp_path / f"{number}", number, improve(BASE, 0.2, seed=number)))
        arms = {"base": general, "tuned": kept}
        suites = [
            PlantedSuite("movies", "target", {"base": BASE, "tuned": improve(BASE, 0.2, number)}),
            PlantedSuite("general", "general", arms),
        ]
        plant_run(run, suites, manifest=replace(read_manifest(RunDir(run)), stages={}))
        runs.append(open_seed_run(run))
    verdict = join_reports(runs, "seeds").verdict
    assert verdict.name == "SHIP, general not shown"
    assert "seed 2 alone is BROKE-GENERAL" in verdict.headline


def test_right_answers_lost_over_all_seeds_are_no_joint_verdict_to_ship(tmp_path):
    base, holds = [0.0] * 300, right_wrong(300, 0.87, seed=1)
    runs = []
    for number, share in enumerate((0.31, 0.33, 0.35)):
        run = Path(plant(tmp_path / f"{number}", number, BASE))
        tuned = right_wrong(300, share, seed=2)
        lenient = {"base": holds, "tuned": tuned}
        suite = PlantedSuite("words", "target", {"base": base, "tuned": tuned}, lenient=lenient)
        plant_run(run, [suite], manifest=replace(read_manifest(RunDir(run)), stages={}))
        runs.append(open_seed_run(run))
    report = join_reports(runs, "seeds")
    (words,) = report.suites
    assert words.lenient.difference == pytest.approx(0.33 - 0.87, abs=0.001)
    assert words.lenient.high < 0
    assert report.verdict.name == "NEGATIVE"
    assert "54.0 points fewer answers hold the right one" in " ".join(report.verdict.reasons)


def test_the_table_names_every_seed_with_its_verdict(tmp_path, capsys):
    assert run_command(["report", *plant_seeds(tmp_path, (0.15, 0.16, 0.0)), "-q"]) == 0
    printed = capsys.readouterr().out
    assert "seed-1, seed 1: SHIP" in printed and "seed-2, seed 2: INCONCLUSIVE" in printed
    assert "between seeds" in printed and max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"adapter": {"method": "lora", "rank": 4}}, "adapter.rank: 16 / 4"),
        ({"train": {"learning_rate": 0.5}}, "train.learning_rate: 0.0002 / 0.5"),
        ({"protect": {"l2": 0.5}}, "protect.l2: 0.0 / 0.5"),
        ({"rows": 47}, "different rows"),
        ({"seed": 1}, "both were trained with seed 1"),
    ],
)
def test_anything_but_another_seed_is_refused_by_name(tmp_path, capsys, change, named):
    runs = plant_seeds(tmp_path, (0.15, 0.16))
    settings = {"seed": 2, "tuned": BASE} | change
    runs.append(plant(tmp_path / "other", **settings))
    assert run_command(["report", *runs]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "seed-0" / "seeds.html").exists()


def test_options_that_are_about_one_run_or_two_are_refused(tmp_path, capsys):
    runs = plant_seeds(tmp_path, (0.15, 0.16, 0.17))
    for option in (["--full"], ["--fail-if", "seconds>1"], ["--across", "base"]):
        assert run_command(["report", *runs, *option]) == 2
        assert capsys.readouterr().err.startswith("error: --")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("3", (7, 8, 9)),
        ("1,2,5", (1, 2, 5)),
        ("2", "3 or more"),
        ("a", "a list"),
        ("1,1,2", "twice"),
    ],
)
def test_seeds_are_a_number_or_a_list(text, seeds):
    if isinstance(seeds, str):
        with pytest.raises(LlmtuneError, match=seeds):
            parse_seeds(text, 7)
    else:
        assert parse_seeds(text, 7) == seeds


def test_seeds_are_trained_judged_and_reported_as_one(tmp_path, capsys, monkeypatch):
    path = make_project(tmp_path)
    place = tmp_path / "three"
    short = ["train.max_steps=2", "evaluate.limit=4", "evaluate.extent=none", f"run_dir={place}"]
    command = ["run", str(path), "--seeds", "3", *short, "--fail-if", "seconds>1e6", "--json"]
    assert run_command(command) == 0
    shown = json.loads(capsys.readouterr().out)
    report = json.loads((place / "report.json").read_text())
    assert shown["verdict"] == report["verdict"] and (place / "report.html").is_file()
    assert [run["seed"] for run in report["seeds"]["runs"]] == [0, 1, 2]
    assert report["statistics"]["training_noise"] == "in the intervals"
    found = {suite: [] for suite in ("sentiment", "prose")}
    seconds = []
    for seed in range(3):
        one = place / f"seed-{seed}"
        for suite, values in found.items():
            own = json.loads((one / "report.json").read_text())["suites"][suite]
            values.append(own["difference"])
            base = json.loads((one / "evaluations" / f"{suite}.base.json").read_text())
            seconds.append(base["seconds"])
    for suite, values in found.items():
        joint = report["suites"][suite]
        assert joint["trainings"] == 3
        assert joint["difference"] == pytest.approx(sum(values) / 3)
        assert joint["interval"][0] <= joint["difference"] <= joint["interval"][1]
    # The base is scored with the first seed alone.
    assert min(seconds[:2]) > 0 and seconds[2:] == [0.0] * 4
    # Nothing is done twice, on an engine neither, and the directory is what a report is made of.
    before = [(place / f"seed-{seed}" / "manifest.json").read_bytes() for seed in range(3)]
    calls = call_like_an_engine(monkeypatch)
    assert run_command([*command, "--on", "ray"]) == 0
    assert calls == [2, 1, 0, 1, 0], "all train side by side, and then all but the first are judged"
    assert json.loads((place / "report.json").read_text())["suites"] == report["suites"]
    assert [(place / f"seed-{seed}" / "manifest.json").read_bytes() for seed in range(3)] == before
    assert run_command(["run", str(path), "--on", "ray"]) == 2
    assert run_command(["report", str(place), "-q"]) == 0
    assert "between seeds" in capsys.readouterr().out
