"""Tasks one after another: the matrix, its three numbers, and what is refused."""

import json

import pytest

from llmtune import load_config
from llmtune.cli import run_command
from llmtune.errors import LlmtuneError
from llmtune.experiments.sequence import train_sequence
from llmtune.io.run_dir import RunDir
from llmtune.reporting.sections.sequence import SequenceResult, find_sequence
from tests.project import make_project


def test_the_three_numbers_are_those_of_gem():
    result = SequenceResult(
        tasks=("a", "b", "c"),
        matrix=((0.9, 0.3, 0.2), (0.8, 0.7, 0.4), (0.6, 0.5, 0.8)),
        untrained=(0.1, 0.2, 0.3),
    )
    assert result.accuracy == pytest.approx((0.6 + 0.5 + 0.8) / 3)
    assert result.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.5 - 0.7)) / 2)
    assert result.forward_transfer == pytest.approx(((0.3 - 0.2) + (0.4 - 0.3)) / 2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two configs on one base, with suites of their own."""
    directory = tmp_path_factory.mktemp("tasks")
    first = make_project(directory)
    config = json.loads(first.read_text())
    suite = json.loads((directory / "sentiment.yaml").read_text())
    (directory / "mood.yaml").write_text(
        json.dumps(suite | {"name": "mood", "prompt": "{{ text }} What mood?"})
    )
    config["run_dir"] = str(directory / "second")
    config["evaluate"]["suites"] = [str(directory / "mood.yaml")]
    second = directory / "second.yaml"
    second.write_text(json.dumps(config))
    return first, second


def test_each_task_goes_on_from_the_adapter_before_it(tasks, tmp_path, capsys):
    out = tmp_path / "sequence"
    assert run_command(["sequence", *map(str, tasks), "--out", str(out), "--json", "-q"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "sequence.json").read_text())
    assert printed["tasks"] == ["run", "second"]
    assert [len(row) for row in printed["matrix"]] == [2, 2]
    manifest = json.loads((out / "2-second" / "manifest.json").read_text())
    assert manifest["config"]["adapter"]["init_from"] == str(out / "1-run" / "adapter")
    assert manifest["stages"]["train"]["inputs"]["start"]
    # What is finished is skipped, and the table is shown to people.
    assert run_command(["sequence", *map(str, tasks), "--out", str(out), "-q"]) == 0
    assert "after second" in capsys.readouterr().out
    assert run_command(["report", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["run"], report["sequence"]) == ("2-second", printed)
    for name in ("1-run", "2-second"):
        for page in ("report.html", "report.md"):
            assert "after second" in (out / name / page).read_text()
    assert "<h2>What was kept of earlier tasks?" in (out / "1-run" / "report.html").read_text()


def test_a_sequence_is_shown_only_while_its_adapters_are_the_ones_of_then(tmp_path):
    result = SequenceResult(
        tasks=("a", "b"),
        matrix=((0.9, 0.3), (0.8, 0.7)),
        untrained=(0.1, 0.2),
        runs=("1-a", "2-b"),
        adapters=("first", "second"),
    )
    path = tmp_path / "sequence.json"
    path.write_text(json.dumps(result.as_json()))
    run = RunDir(tmp_path / "2-b")
    assert find_sequence(run, "second") == result
    assert find_sequence(run, "retrained") is None
    assert find_sequence(RunDir(tmp_path / "3-c"), "second") is None
    path.write_text(json.dumps({"tasks": ["a", "b"], "matrix": [[1, 2], [3, 4]]}))
    with pytest.raises(LlmtuneError, match=r"sequence\.json: not written by .* again"):
        find_sequence(run, "second")


def test_what_is_no_sequence_is_refused(tasks, tmp_path):
    first = load_config(tasks[0])
    with pytest.raises(LlmtuneError, match="at least two"):
        train_sequence([first], tmp_path)
    with pytest.raises(LlmtuneError, match="named 'run'"):
        train_sequence([first, first], tmp_path)
    with pytest.raises(LlmtuneError, match="model section differs"):
        train_sequence([first, load_config(tasks[1], ["model.dtype=float32"])], tmp_path)
    with pytest.raises(LlmtuneError, match="needs a target suite"):
        train_sequence([first, load_config(tasks[1], ["evaluate.suites=[]"])], tmp_path)
    assert not any(tmp_path.iterdir())
