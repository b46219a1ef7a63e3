"""The list of runs says what each scored and with which settings, sorted and filtered."""

import json

import pytest

from llmtune.cli import run_command
from llmtune.io.manifest import Manifest
from llmtune.io.run_dir import RunDir


def leave_run(directory, name, *, rate, rank, after, verdict="SHIP", created="2026-01-02T03:04:05"):
    run = RunDir(directory / name)
    run.path.mkdir()
    config = {
        "model": {"base": "org/base"},
        "adapter": {"method": "lora", "rank": rank},
        "train": {"learning_rate": rate},
    }
    result = {"final_loss": 1 / after, "final_eval_loss": None}
    manifest = Manifest(config=config, created=created).start("train", "hash", {})
    manifest.finish("train", seconds=90.0, peak_bytes=1, result=result).save(run)
    suite = {"role": "target", "metric": "accuracy", "higher_is_better": True}
    suite |= {"compared": ["original", "merged"], "original": 0.5, "merged": after}
    report = {"verdict": verdict, "suites": {"general": {"role": "general"}, "movies": suite}}
    run.report_json_path.write_text(json.dumps(report))


@pytest.fixture
def folder(tmp_path):
    leave_run(tmp_path, "a", rate=1e-4, rank=8, after=0.8)
    leave_run(tmp_path, "b", rate=3e-4, rank=16, after=0.9, created="2026-01-01T00:00:00")
    leave_run(tmp_path, "c", rate=1e-3, rank=16, after=0.4, verdict="NEGATIVE")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "manifest.json").write_text("{")
    return tmp_path


def listed(capsys, folder, *options):
    assert run_command(["runs", str(folder), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--sort", "score"], "bacd"),
        (["--sort", "gain"], "bacd"),
        (["--sort", "loss"], "bacd"),
        (["--sort", "learning_rate"], "abcd"),
        (["--sort", "created"], "acbd"),
        (["--where", "adapter.rank=16", "--sort", "score"], "bc"),
        (["--where", "adapter.rank=16", "--where", "verdict=SHIP"], "b"),
        (["--where", "train.learning_rate=1e-4"], "a"),
    ],
)
def test_runs_are_sorted_and_filtered(folder, capsys, options, names):
    found = listed(capsys, folder, *options)
    assert "".join(each["path"][-1] for each in found) == names


def test_a_run_is_shown_with_its_score_and_settings(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert run_command(["runs", str(folder), "--sort", "score"]) == 0
    best = next(line for line in capsys.readouterr().out.splitlines() if str(folder / "b") in line)
    for word in ("SHIP", "movies 50.0 % → 90.0 %", "lora 16", "0.0003", "1.111", "1 min 30 s"):
        assert word in best


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--where", "adapter.rank"], "expected key=value"), (["--sort", "beauty"], "is not one of")],
)
def test_what_cannot_be_asked_is_refused(folder, capsys, options, message):
    assert run_command(["runs", str(folder), *options]) == 2
    assert message in capsys.readouterr().err
