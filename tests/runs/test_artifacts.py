"""What a stage made is used only if it is finished on the present inputs, also in a copied run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from llmtune import evaluate, export, load_config, merge, run
from llmtune.cli import run_command
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.io.manifest import read_manifest
from llmtune.io.run_dir import atomic_write_json
from llmtune.io.safetensors import fingerprint_checkpoint
from llmtune.runs.evaluate import EvaluateStage
from llmtune.runs.export import ExportStage
from llmtune.runs.merge import MergeStage
from llmtune.runs.stage import Stage
from llmtune.runs.targets import require_run, resolve_target
from tests.conftest import write_jsonl
from tests.project import make_project

SHORT = ["train.max_steps=2", "evaluate.limit=4", "evaluate.extent=none"]
EXPORTS = {"to": ["ollama", "adapter-gguf"], "type": "f16"}
opened: list[Path] | None = None


def _note_opened(event, arguments):
    if opened is not None and event == "open" and isinstance(arguments[0], str | Path):
        opened.append(Path(arguments[0]))


sys.addaudithook(_note_opened)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with two exports, finished once; tests change copies of it."""
    directory = tmp_path_factory.mktemp("finished")
    config = load_config(make_project(directory, export=EXPORTS), SHORT)
    run(config)
    return config


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run in a different place."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    return require_run(str(tmp_path / "run"))


def read_opened(do, run_dir):
    """Return the files of the run, by their names in it, that `do` opens to read."""
    global opened  # an audit hook cannot be taken back
    there = {path for path in run_dir.rglob("*") if path.is_file()}
    opened = []
    try:
        do()
    finally:
        names, opened = {path.absolute() for path in opened}, None
    return {path.relative_to(run_dir).as_posix() for path in names & there}


LEFT_BY = {"adapter/": {"adapter", "train", "merge"}, "merged/": {"merge"}}
"""What another stage left, and the inputs that name it; a merge names its adapter."""
OWN = {"merge": "merged/", "evaluate": ("evaluations/", "diagnostics/"), "export": "exports/"}
"""What the stage itself left before."""


def test_what_a_stage_reads_in_the_run_is_among_its_inputs(copied):
    exports = [ExportStage(copied, one.to, force=True) for one in copied.export.exports()]
    stages: list[Stage[Any]] = [MergeStage(copied, force=True), EvaluateStage(copied, force=True)]
    for stage in [*stages, *exports]:
        read = read_opened(stage.do, copied.run_dir)
        assert any(name.startswith(tuple(LEFT_BY)) for name in read), stage.name
        inputs = stage.inputs(read_manifest(copied.run))
        for name in sorted(read - {"manifest.json", ".lock"}):
            left_by = [keys for place, keys in LEFT_BY.items() if name.startswith(place)]
            if left_by:
                assert left_by[0] & set(inputs), f"{stage.name} reads {name}"
            elif not name.startswith(OWN[stage.name.split()[0]]):
                values = json.loads((copied.run_dir / name).read_text())
                atomic_write_json(copied.run_dir / name, {**values, "verdict": stage.name})
                now = stage.inputs(read_manifest(copied.run))
                assert now != inputs, f"{stage.name} reads {name}"


def test_an_export_is_made_again_when_the_verdict_in_its_head_changed(copied):
    path = copied.run.report_json_path
    before = export(copied)
    atomic_write_json(path, {**json.loads(path.read_text()), "verdict": "CHANGED"})
    for name, result in export(copied).items():
        out = Path(result["out"])
        file = out if out.is_file() else next(out.glob("*.gguf"))
        assert GGUFReader(file).get_field("llmtune.verdict").contents() == "CHANGED", name
        assert out.is_file() or "**CHANGED**" in (out / "README.md").read_text()
        assert result["out"] == before[name]["out"]
    stages = read_manifest(copied.run).stages
    export(copied)
    assert read_manifest(copied.run).stages == stages


def test_a_renamed_run_keeps_no_export_of_its_old_name(copied, tmp_path):
    renamed = require_run(str(copied.run_dir.rename(tmp_path / "renamed")))
    path = renamed.run.report_json_path
    atomic_write_json(path, {**json.loads(path.read_text()), "verdict": "CHANGED"})
    made = {Path(each["out"]).name for each in export(renamed).values()}
    assert {each.name for each in (renamed.run_dir / "exports").iterdir()} == made
    assert all(name.startswith("renamed-") for name in made)


def test_a_run_looks_at_its_base_once(copied, monkeypatch):
    seen = []

    def fingerprint(index):
        seen.append(index.directory)
        return fingerprint_checkpoint(index)

    monkeypatch.setattr("llmtune.models.checkpoint.fingerprint_checkpoint", fingerprint)
    run(copied)
    assert seen.count(Path(copied.model.base)) == 1


def test_a_copied_run_names_its_own_files(finished, copied):
    assert str(finished.run_dir) in finished.run.manifest_path.read_text()  # its config's run_dir
    stages = read_manifest(copied.run).stages
    assert str(finished.run_dir) not in json.dumps(stages)
    made = [merge(copied)["out_dir"], *(one["out"] for one in export(copied).values())]
    assert read_manifest(copied.run).stages == stages, "all was finished"
    assert all(Path(out).is_relative_to(copied.run_dir) for out in made)


def test_what_a_failed_merge_left_is_not_used(copied, tmp_path, capsys):
    run_dir, rows = str(copied.run_dir), write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hi"}])
    assert "merged" in resolve_target(run_dir).arms
    with pytest.raises(CheckFailed, match=r"the earlier model in .*merged is as it was"):
        merge(require_run(run_dir, ["merge.max_kl=1e-12", "merge.strength=0.5"]))
    assert copied.run.merged_dir.is_dir()
    assert "merged" not in resolve_target(run_dir).arms
    for use in (evaluate, export):
        with pytest.raises(LlmtuneError, match="did not finish.*llmtune merge"):
            use(require_run(run_dir))
    for command in (
        ["export", run_dir, "--to", "gguf", "--type", "f16"],
        ["export", run_dir, "--to", "gguf", "export.type=f16"],
        ["predict", run_dir, "--arm", "merged", "--input", str(rows), "--output", f"{rows}.out"],
    ):
        assert run_command([*command, "--quiet"]) == 2, command
        assert "llmtune merge" in capsys.readouterr().err, command


def test_a_merge_of_other_settings_is_not_used(copied):
    half = require_run(str(copied.run_dir), ["merge.strength=0.5"])
    for use in (evaluate, export):
        with pytest.raises(LlmtuneError, match=r"made from a different merge.*llmtune merge"):
            use(half)


def test_a_run_whose_adapter_is_damaged_is_trained_again_by_force(copied, capsys):
    (copied.run_dir / "adapter" / "adapter_model.safetensors").unlink()
    assert resolve_target(str(copied.run_dir)).merged_problem is not None
    assert run_command(["train", str(copied.run_dir), "--force", "--quiet"]) == 0
    assert (copied.run_dir / "adapter" / "adapter_model.safetensors").is_file()
