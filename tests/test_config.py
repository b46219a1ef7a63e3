"""A config names files that are here or beside it, and an override wins over what it replaces."""

import json

import pytest

from llmtune.cli import run_command
from llmtune.config import load_config
from llmtune.data.rows import find_files
from llmtune.errors import LlmtuneError
from tests.conftest import write_jsonl


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A config in a folder of its own, with its rows beside it; we are in a different folder."""
    folder = tmp_path / "job"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_jsonl(folder / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    (folder / "job.yaml").write_text(
        "run_dir: run\nmodel: {base: org/name, chat_template: mine.jinja}\n"
        "data: {train: [{path: rows.jsonl}, {path: 'r*.jsonl'}, {path: none.jsonl}]}\n"
        "train: {num_epochs: 2}\n"
    )
    (folder / "mine.jinja").write_text("{{ messages }}")
    return folder


def test_files_are_found_here_first_and_then_beside_the_config(job, tmp_path):
    found = load_config(job / "job.yaml")
    paths = [source.path for source in found.data.train]
    assert paths == [str(job / "rows.jsonl"), str(job / "r*.jsonl"), "none.jsonl"]
    assert found.model.chat_template == job / "mine.jinja"
    assert (found.model.base, str(found.run_dir)) == ("org/name", "run")
    write_jsonl(tmp_path / "elsewhere" / "rows.jsonl", [])
    assert load_config(job / "job.yaml").data.train[0].path == "rows.jsonl"


def test_a_missing_file_names_the_folder_that_was_looked_in(job, tmp_path):
    with pytest.raises(LlmtuneError, match=f"no.jsonl: no such file in {tmp_path / 'elsewhere'}"):
        find_files("no.jsonl")


def test_an_override_unsets_what_it_stands_in_place_of(job, capsys):
    config = str(job / "job.yaml")
    assert run_command(["config", "show", config, "train.max_steps=5", "--json"]) == 0
    keys = {each["path"]: each for each in json.loads(capsys.readouterr().out)}
    assert keys["train.max_steps"]["value"] == 5
    assert keys["train.num_epochs"]["value"] is None
    assert keys["train.num_epochs"]["origin"] == "unset by override train.max_steps=5"
    both = ["train.max_steps=5", "train.num_epochs=3"]
    assert run_command(["config", "show", config, *both]) == 2
    assert "both set the length of the run" in capsys.readouterr().err


def test_a_device_that_was_never_tried_is_refused_in_plain_words(job, capsys):
    assert run_command(["config", "show", str(job / "job.yaml"), "model.device=mps"]) == 2
    assert "llmtune was not tried on mps" in capsys.readouterr().err
