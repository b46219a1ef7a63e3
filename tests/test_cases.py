"""Small inputs that once came out wrong, each with what it should give in `expected.json`."""

import json
import shutil
from pathlib import Path

import pytest

from llmtune.cli import run_command
from llmtune.evaluation.suite import load_suite
from tests.data.instruction_files import assert_read_as_expected, make_base

CASES = Path(__file__).parent / "cases"


def read_expected(kind):
    return json.loads((CASES / kind / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("kind", ["data", "predict", "suites"])
def test_every_case_has_an_expectation(kind):
    known = read_expected(kind)
    named = {*known, *(case["evaluation"] for case in known.values() if "evaluation" in case)}
    if kind == "suites":
        named |= {Path(name).with_suffix(".jsonl").name for name in known}
    assert {path.name for path in (CASES / kind).iterdir()} == {*named, "expected.json"}


@pytest.mark.parametrize("name", read_expected("data"))
def test_rows_are_trained_as_they_are_meant(name, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_read_as_expected(read_expected("data")[name], name, CASES / "data" / name, base, capsys)


def predict(base, row, name, folder):
    """Answer one row; return the exit code and the row of the output."""
    (folder / name).write_text(json.dumps(row) + "\n")
    out = folder / f"out_{name}"
    files = ["--input", str(folder / name), "--output", str(out)]
    code = run_command(["predict", str(base), *files, "--max-new-tokens", "8", "--quiet"])
    answered = json.loads(out.read_text()) if out.exists() else None
    out.unlink(missing_ok=True)
    return code, answered


@pytest.mark.parametrize("name", read_expected("predict"))
def test_prompts_are_asked_as_they_are_trained(name, base, tmp_path, capsys):
    case = read_expected("predict")[name]
    row = json.loads((CASES / "predict" / name).read_text())
    code, answered = predict(base, row, name, tmp_path)
    if "refused" in case:
        assert (code, answered) == (2, None)
        assert case["refused"] in capsys.readouterr().err
        return
    assert code == 0
    assert {key: answered[key] for key in row} == row
    for column in case.get("changes", []):
        less = {key: value for key, value in row.items() if key != column}
        assert predict(base, less, name, tmp_path)[1]["answer"] != answered["answer"]


@pytest.mark.parametrize("name", read_expected("suites"))
def test_items_mean_what_they_say(name, base, tmp_path, capsys):
    case = read_expected("suites")[name]
    if "answers" in case:
        suite = load_suite(CASES / "suites" / name)
        assert [item.right_answer for item in suite.items] == case["answers"]
        return
    here = shutil.copytree(base, tmp_path / "base")
    config = json.loads((here / "config.json").read_text()) | {"max_position_embeddings": 512}
    (here / "config.json").write_text(json.dumps(config))
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"base": str(here)},
        "data": {"train": [{"path": str(CASES / "data" / "plain_chat.jsonl")}]},
        "evaluate": {"suites": [str(CASES / "suites" / name)]},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    assert run_command(["data", "check", str(tmp_path / "c.yaml"), "--quiet"]) == 1
    assert case["refused"] in capsys.readouterr().out
    assert run_command(["run", str(tmp_path / "c.yaml"), "--quiet"]) == 2
    assert case["refused"] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
