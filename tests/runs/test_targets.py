"""A path on the command line: what an adapter directory says of its base, and damaged ones."""

import json
from pathlib import Path

import pytest

from llmtune.cli import run_command
from llmtune.errors import LlmtuneError
from llmtune.runs.targets import resolve_target
from tests.project import make_project
from tests.tiny import CHATML


@pytest.fixture
def adapter(tmp_path):
    """Return the directory of an adapter of a local base, as far as light code reads it."""
    directory = tmp_path / "adapter"
    base = tmp_path / "base"
    directory.mkdir()
    base.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "revision": None}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").touch()
    recorded = {"origin": str(base), "path": str(base), "revision": None}
    (directory / "llmtune_adapter.json").write_text(json.dumps({"format": 1, "base": recorded}))
    return directory


def test_the_template_beside_an_adapter_is_the_one_it_is_used_with(adapter):
    assert resolve_target(str(adapter)).model.chat_template is None
    template = adapter / "chat_template.jinja"
    template.write_text("{{ messages }}")

    assert resolve_target(str(adapter)).model.chat_template == template
    (adapter / "llmtune_adapter.json").unlink()
    assert resolve_target(str(adapter)).model.chat_template == template
    override = resolve_target(str(adapter), ["model.chat_template=mine.jinja"])
    assert override.model.chat_template == Path("mine.jinja")


def test_a_base_of_the_hub_keeps_its_commit(adapter):
    base = {"origin": "org/tiny", "path": str(adapter), "revision": "abc"}
    (adapter / "llmtune_adapter.json").write_text(json.dumps({"format": 1, "base": base}))
    model = resolve_target(str(adapter)).model

    assert (model.base, model.revision) == ("org/tiny", "abc")


@pytest.mark.parametrize("name", ["llmtune_adapter.json", "adapter_config.json"])
@pytest.mark.parametrize(
    "text", ["", '{"format": 1, "ba', "[]", '{"format": 1}', '{"format": 1, "base": {"path": 3}}']
)
def test_a_damaged_adapter_is_one_clear_error(adapter, name, text):
    (adapter / name).write_text(text)
    with pytest.raises(LlmtuneError, match=str(adapter)):
        resolve_target(str(adapter))


def test_a_custom_template_goes_with_the_adapter_and_the_merged_model(tmp_path, capsys):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ 'Answer briefly. ' }}" + CHATML)
    base = {"base": str(tmp_path / "base"), "chat_template": str(template)}
    config = make_project(tmp_path, model=base)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    assert run_command(["train", str(config), "train.max_steps=1", "--quiet"]) == 0
    template.rename(tmp_path / "away.jinja")
    run_dir = tmp_path / "run"
    command = ["eval", str(run_dir / "adapter"), "--suite", str(tmp_path / "sentiment.yaml")]
    capsys.readouterr()
    assert run_command([*command, "--json", "--quiet"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["sentiment"]["arms"]["tuned"]

    (tmp_path / "away.jinja").rename(template)
    assert run_command(["merge", str(run_dir), "--quiet"]) == 0
    assert (run_dir / "merged" / "chat_template.jinja").read_text() == template.read_text()
