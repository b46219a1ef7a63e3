"""What a new user meets first: help, a mistyped word, a path that is not what it should be."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from llmtune.cli import cli, run_command
from llmtune.errors import LlmtuneError
from tests.project import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project that no test here changes."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def trained(project):
    """Its run directory, trained for one step."""
    assert run_command(["train", str(project), "train.max_steps=1", "--quiet"]) == 0
    return project.parent / "run"


def refused(capsys, *arguments: str) -> str:
    """Run a command line that must be refused with exit code 2 and one line; return the line."""
    capsys.readouterr()
    code = run_command(list(arguments))
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("error: ").strip()


@pytest.mark.parametrize("group", [[], ["config"], ["data"]])
def test_a_group_alone_shows_its_help_and_calls_nothing_an_error(capsys, group):
    assert run_command(group) == 2
    said = capsys.readouterr().err
    assert said.startswith("Usage: llmtune") and "error:" not in said


def test_the_help_lists_every_command_with_its_whole_first_sentence(capsys):
    assert run_command(["--help"]) == 0
    text = capsys.readouterr().out
    listed = [
        line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.strip()
    ]
    assert set(cli.commands) <= set(listed)
    assert "..." not in text.split("Options:")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "CONFIG"),
        (["train", "x.yaml", "--rank", "3"], "--rank"),
        (["verify", "merged"], "--against"),
    ],
)
def test_a_wrong_call_names_the_help_that_says_how(capsys, arguments, words):
    said = refused(capsys, *arguments)
    assert words in said and said.endswith(f"(see llmtune {arguments[0]} --help)")


def test_the_choices_of_a_missing_option_stand_on_one_line(capsys):
    assert "gguf, ollama" in refused(capsys, "export", "runs/mine")


def test_what_an_empty_config_lacks_is_told_with_its_name(capsys, tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert run_command(["config", "show", str(path)]) == 2
    assert f"{path}: run_dir: required, and not given" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train"], ["merge"], ["eval"], ["report"], ["plan"]])
def test_a_path_that_is_not_there_is_said_to_be_missing(capsys, tmp_path, command):
    assert "no such" in refused(capsys, *command, str(tmp_path / "nosuch"))


@pytest.mark.parametrize("command", [["train"], ["report"], ["plan"], ["data", "check"]])
def test_a_file_that_is_no_config_is_said_to_be_none(capsys, tmp_path, command):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    said = refused(capsys, *command, str(path))
    assert str(path) in said and ".yaml" in said


@pytest.mark.parametrize("command", [["plan"], ["data", "check"], ["data", "show"]])
def test_a_run_directory_serves_wherever_its_config_would(capsys, trained, command):
    assert run_command([*command, str(trained), "--json"]) == 0
    json.loads(capsys.readouterr().out.splitlines()[0] if command[-1] == "show" else "{}")


def test_the_config_of_a_run_directory_is_shown_with_where_it_stands(capsys, trained):
    capsys.readouterr()
    assert run_command(["config", "show", str(trained), "adapter.rank=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("train.max_steps: 1" in line and "manifest.json" in line for line in lines)
    assert any("adapter.rank: 2" in line and "override" in line for line in lines)


def test_no_rows_cannot_be_shown(capsys, project):
    assert "--limit" in refused(capsys, "data", "show", str(project), "--limit", "0")


@pytest.mark.parametrize("place", ["config.yaml", "base"])
def test_an_unusable_run_dir_is_refused_before_the_rows_are_read(capsys, project, place):
    run_dir = project.parent / place
    said = refused(capsys, "train", str(project), f"run_dir={run_dir}")
    assert str(project.parent) in said


@pytest.mark.parametrize("command", [["config", "schema"], ["--help"], ["doctor"]])
def test_a_reader_that_was_never_there_ends_the_command_in_silence(command):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "llmtune", *command], stdout=write_end, stderr=subprocess.PIPE
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_reader_that_leaves_early_ends_the_command_in_silence(project):
    command = [sys.executable, "-m", "llmtune", "config", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"{\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


STOPPED_AT_THE_DOOR = """
import sys
class Stop:
    def find_spec(self, name, *_):
        if name == "llmtune.commands.merge":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
from llmtune.__main__ import main
main()
"""


def test_ctrl_c_while_the_modules_are_read_is_one_line_too():
    command = [sys.executable, "-c", STOPPED_AT_THE_DOOR]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith("error: interrupted") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", [ModuleNotFoundError, LlmtuneError])
def test_a_ctrl_c_that_a_library_made_another_error_of_is_still_one(
    kind, capsys, tmp_path, monkeypatch
):
    def broken_off(_directory, **_options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise kind("Could not import module 'BloomPreTrainedModel'") from error

    monkeypatch.setattr("llmtune.runs.listing.list_runs", broken_off)
    assert run_command(["runs", str(tmp_path)]) == 3
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: interrupted") and "\n" not in said


def test_a_library_that_ends_the_process_is_no_success(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("llmtune.runs.listing.list_runs", lambda _directory, **_: sys.exit(0))
    assert run_command(["runs", str(tmp_path)]) == 70
    said = capsys.readouterr().err
    assert "SystemExit" in said and "this is a bug in llmtune" in said


def test_a_name_with_a_space_is_quoted_in_what_to_do_next(capsys, project, tmp_path):
    out = tmp_path / "my config.yaml"
    assert run_command(["init", str(project.parent / "train.jsonl"), "--out", str(out)]) == 0
    assert f"llmtune run '{out}'" in capsys.readouterr().out


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of its adapter, to be damaged."""
    return shutil.copytree(trained / "adapter", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("lost", "advice"),
    [
        ("adapter_model.safetensors", "Copy them back, or make the adapter again"),
        ("adapter_config.json", "copy back the file that it lost"),
    ],
)
def test_a_lost_file_of_an_adapter_is_named_with_what_to_do(capsys, adapter, lost, advice):
    (adapter / lost).unlink()
    said = refused(capsys, "merge", str(adapter), "--dry-run")
    assert said.startswith(str(adapter)) and lost in said and advice in said


def test_an_adapter_that_lost_a_byte_is_told_with_what_to_do(capsys, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said = refused(capsys, "chat", str(adapter), "--quiet")
    assert "changed since the adapter was saved" in said and "Copy the adapter again" in said


def test_a_base_that_moved_is_found_by_the_key_that_the_refusal_names(capsys, adapter, project):
    manifest = adapter / "llmtune_adapter.json"
    record = json.loads(manifest.read_text())
    record["base"] |= {"path": "/gone/base", "origin": "/gone/base"}
    manifest.write_text(json.dumps(record))
    assert "moved since: model.base=PATH" in refused(capsys, "merge", str(adapter), "--dry-run")
    there = f"model.base={project.parent / 'base'}"
    assert run_command(["merge", str(adapter), there, "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("command", "lost"),
    [("plan", "config.json"), ("train", "config.json"), ("train", "model.safetensors")],
)
def test_a_base_that_lost_a_file_is_refused_with_the_key_of_its_place(
    capsys, project, tmp_path, command, lost
):
    base = shutil.copytree(project.parent / "base", tmp_path / "base")
    (base / lost).unlink()
    overrides = (f"model.base={base}", f"run_dir={tmp_path / 'run'}")
    said = refused(capsys, command, str(project), *overrides)
    assert str(base) in said and lost in said and "model.base=PATH" in said


@pytest.mark.parametrize(
    ("environment", "value", "advice"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "ünï".encode(), "not text in ascii"),
        ({"PYTHONUTF8": "1"}, "ünï".encode("latin-1"), "write it in UTF-8"),
    ],
)
def test_an_override_that_is_no_text_in_this_locale_is_said_to_be_none(
    project, environment, value, advice
):
    done = subprocess.run(
        [sys.executable, "-m", "llmtune", "config", "show", project, b"run_dir=" + value],
        env={**os.environ, **environment},
        capture_output=True,
    )
    assert done.returncode == 2 and done.stdout == b""
    said = done.stderr.decode()
    assert said.startswith("error: override ") and said.count("\n") == 1
    assert advice in said and "YAML" not in said
