"""Whatever is damaged: each command says so in one line with exit code 2, or works."""

import json

import pytest
from peft import FourierFTConfig, IA3Config, OFTConfig, get_peft_model

from llmtune import cli
from llmtune.adapters import patterns
from tests.damages import damages_of
from tests.merging.adapters import load_base, make_adapter
from tests.project import make_project

COMMANDS = {
    "base/config.json": ("plan", "merge"),
    "base/generation_config.json": ("check",),
    "base/tokenizer.json": ("check",),
    "base/tokenizer_config.json": ("check",),
    "base/model.safetensors": ("plan", "merge"),
    "base/model.safetensors.index.json": ("plan", "merge"),
    "adapter/adapter_config.json": ("merge",),
    "adapter/adapter_model.safetensors": ("merge",),
    "adapter/llmtune_adapter.json": ("merge",),
    "manifest.json": ("runs", "report"),
}
"""The cheapest commands that read a file; `scripts/fuzz_readers.py` reads many more damages."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    directory = tmp_path_factory.mktemp("damaged")
    make_project(directory)
    make_adapter(directory / "base", directory / "adapter")
    manifest = {"format": 1, "base": {"origin": "x", "path": str(directory / "base")}, "files": {}}
    (directory / "adapter" / "llmtune_adapter.json").write_text(json.dumps(manifest))
    run = {"format": 1, "config": {"model": {"base": "base"}}, "stages": {}, "base": {}}
    (directory / "manifest.json").write_text(json.dumps(run))
    return directory


def command_line(name, project):
    """Return the arguments of a command."""
    return {
        "plan": ["plan", str(project / "config.yaml")],
        "check": ["data", "check", str(project / "config.yaml"), "data.cache=false"],
        "merge": ["merge", str(project / "adapter"), "--dry-run", f"model.base={project / 'base'}"],
        "runs": ["runs", str(project.parent)],
        "report": ["report", str(project)],
    }[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_files_are_said_in_one_line(project, name, capsys, monkeypatch):
    monkeypatch.setattr(patterns, "MOST_SECONDS", 1)
    path, moved = project / name, None
    if name.endswith(".index.json"):
        moved = project / "base" / "model.safetensors"
        moved.rename(moved.with_suffix(".away"))
        path.write_text(json.dumps({"weight_map": {"a.weight": "model.away"}}))
    original = path.read_bytes()
    manifest = project / "adapter" / "llmtune_adapter.json"
    recorded = manifest.read_bytes()
    if name == "adapter/adapter_config.json":
        manifest.unlink()  # as stock peft writes it
    wrong = {}
    for label, damage in damages_of(name):
        path.write_bytes(damage(original))
        for command in COMMANDS[name]:
            code = cli.run_command([*command_line(command, project), "--quiet"])
            said = capsys.readouterr().err
            is_refused = code == 2 and "error: " in said and "Traceback" not in said
            if not is_refused and code not in (0, 1):
                wrong[f"{label}, {command}"] = said[-500:]
    path.write_bytes(original)
    manifest.write_bytes(recorded)
    if moved is not None:
        path.unlink()
        moved.with_suffix(".away").rename(moved)
    assert wrong == {}


def test_what_peft_does_not_take_of_its_own_methods_is_said_in_one_line(project, tmp_path, capsys):
    targets = ["q_proj", "down_proj"]
    damaged: dict[type, list[dict]] = {
        IA3Config: [{"feedforward_modules": "("}, {"feedforward_modules": 5}],
        OFTConfig: [{"oft_block_size": "x"}],
        FourierFTConfig: [{"scaling": "x"}, {"n_frequency_pattern": {"(": 1}}],
    }
    knobs = {IA3Config: {"feedforward_modules": ["down_proj"]}}
    for kind, damages in damaged.items():
        place = tmp_path / kind.__name__
        config = kind(target_modules=targets, **knobs.get(kind, {}))
        get_peft_model(load_base(project / "base"), config).save_pretrained(place)
        path = place / "adapter_config.json"
        saved = json.loads(path.read_text())
        for damage in damages:
            path.write_text(json.dumps({**saved, **damage}))
            command = ["merge", str(place), f"model.base={project / 'base'}", "--quiet"]
            code = cli.run_command([*command, "--out", str(tmp_path / "merged")])
            said = capsys.readouterr().err
            assert code == 2 and f"error: {place}" in said and "Traceback" not in said, damage
    assert not (tmp_path / "merged").exists()
