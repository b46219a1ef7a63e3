"""What a second command finds: nothing lost, nothing stale, nothing foreign replaced."""

import json
import shutil

import pytest

from llmtune import evaluate, load_config, merge, run, train
from llmtune.cli import run_command
from llmtune.errors import LlmtuneError
from llmtune.runs.targets import require_run
from tests.project import make_project

SHORT = ["train.max_steps=2", "evaluate.bootstrap_samples=1000"]


@pytest.fixture
def config(tmp_path):
    return make_project(tmp_path / "project")


def load(path, *overrides):
    return load_config(path, [*SHORT, *overrides])


def test_merge_replaces_nothing_but_a_merged_model(config, tmp_path, capsys):
    train(load(config))
    adapter = config.parent / "run" / "adapter"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    for out in (precious, config.parent / "base", adapter, config.parent):
        command = ["merge", str(adapter), "--out", str(out), "--force", "--quiet"]
        assert run_command(command) == 2, out
    assert (precious / "thesis.tex").read_text() == "years of work"
    assert (config.parent / "base" / "model.safetensors").is_file()
    assert (adapter / "adapter_model.safetensors").is_file()
    for options in ([], ["--force"]):
        command = ["merge", str(adapter), "--out", str(tmp_path / "out"), *options, "--quiet"]
        assert run_command(command) == 0, capsys.readouterr().err


def test_a_run_made_with_relative_paths_works_from_anywhere(config, tmp_path, monkeypatch):
    text = config.read_text().replace(str(config.parent) + "/", "")
    config.write_text(text)
    monkeypatch.chdir(config.parent)
    run(load("config.yaml"))
    monkeypatch.chdir(tmp_path)
    again = require_run(str(config.parent / "run"), ["evaluate.limit=3"])
    assert evaluate(again)["sentiment"]["n"] == 3


def test_an_override_of_one_call_is_not_kept(config):
    run(load(config))
    run_dir = str(config.parent / "run")
    assert evaluate(require_run(run_dir, ["evaluate.limit=3"]))["sentiment"]["n"] == 3
    assert evaluate(require_run(run_dir))["sentiment"]["n"] == 12


def test_scores_of_one_suite_leave_the_run_as_it_is(config, capsys):
    run(load(config))
    run_dir = config.parent / "run"
    before = {path: path.read_bytes() for path in (run_dir / "evaluations").iterdir()}
    suite = str(config.parent / "sentiment.yaml")
    command = ["eval", str(run_dir), "--suite", suite, "evaluate.limit=4", "--json", "-q"]
    assert run_command(command) == 0
    assert json.loads(capsys.readouterr().out)["sentiment"]["n"] == 4
    assert {path: path.read_bytes() for path in (run_dir / "evaluations").iterdir()} == before


def test_what_was_deleted_is_made_again(config):
    run(load(config))
    run_dir = config.parent / "run"
    weights = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    for name in ("adapter", "evaluations"):
        shutil.rmtree(run_dir / name)
    run(load(config))
    assert (run_dir / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert (run_dir / "evaluations" / "sentiment.tuned.json").is_file()
    suites = json.loads((run_dir / "report.json").read_text())["suites"]
    assert [list(suite["chain"]) for suite in suites.values()] == [["training", "merging"]] * 2


def test_evaluation_without_a_merged_model_says_how_to_make_it(config):
    train(load(config))
    with pytest.raises(LlmtuneError, match="llmtune merge"):
        evaluate(load(config))
    assert evaluate(load(config, "evaluate.arms=[base, tuned]"))["sentiment"]["n"] == 12


def test_settings_that_do_not_decide_the_adapter_may_change(config):
    train(load(config))
    changed = ["train.micro_batch_size=2", "train.gradient_checkpointing=true"]
    assert train(load(config, *changed, "train.log_every=10"))["steps"] == 2


def test_other_rows_under_the_same_name_are_refused(config):
    train(load(config))
    rows = config.parent / "train.jsonl"
    rows.write_text("\n".join(rows.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(LlmtuneError, match="trained on a different data"):
        train(load(config))


def test_early_stopping_ends_a_run_well(config):
    stop = "train.early_stopping={patience: 1}"
    result = train(load(config, "train.max_steps=12", "train.eval_every=1", stop))
    assert result["stopped_by"] in {"early_stopping", "max_steps"}
    assert not str(result["best_checkpoint"]).startswith("/")


@pytest.mark.parametrize("bad", ["adapter.target_modules=[q_prj]", "adapter.layers=[0, 7]"])
def test_wrong_input_leaves_no_run_behind(config, bad):
    with pytest.raises(LlmtuneError):
        train(load(config, bad))
    assert not (config.parent / "run").exists()


def test_a_strength_given_with_out_is_the_one_used(config, tmp_path):
    train(load(config))
    target = str(config.parent / "run")
    out = tmp_path / "half"
    command = ["merge", target, "merge.strength=0.5", "--out", str(out), "--quiet"]
    assert run_command(command) == 0
    assert json.loads((out / "llmtune_merge.json").read_text())["strength"] == 0.5


def test_a_stronger_merge_is_made_again_in_place(config):
    train(load(config))
    assert merge(load(config))["strength"] == 1.0
    assert merge(load(config, "merge.strength=0.5"))["strength"] == 0.5


def test_brackets_in_a_path_are_printed_as_they_are(config, tmp_path, capsys):
    place = tmp_path / "m[red]z"
    assert run_command(["train", str(config), *SHORT, f"run_dir={place}", "--quiet"]) == 0
    assert "m[red]z/adapter" in capsys.readouterr().out


def test_a_run_is_named_by_its_directory_or_its_config(config, capsys):
    assert run_command(["run", str(config), *SHORT, "--quiet"]) == 0
    run_dir = str(config.parent / "run")
    said = []
    for name in (run_dir, str(config)):
        capsys.readouterr()
        assert run_command(["report", name, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]
    assert run_command(["train", run_dir, "--quiet"]) == 0
    assert run_command(["run", run_dir, "--quiet"]) == 0


def make_older(run_dir):
    """Take out of a run's manifest what later versions added to the config and to the inputs."""
    path = run_dir / "manifest.json"
    manifest = json.loads(path.read_text())
    for section in ("protect", "export"):
        del manifest["config"][section]
    del manifest["config"]["data"]["length_policy"]
    stages = manifest["stages"]
    stages["train"]["inputs"]["config"] = "hash of fewer keys"
    del stages["merge"]["inputs"]["merge"]["base"]
    del stages["evaluate"]["inputs"]["evaluate"]["memorization"]
    stages["evaluate"]["inputs"]["merge"] = "of fewer keys"
    for record in stages.values():
        record["fingerprint"] = "of fewer keys"
    path.write_text(json.dumps(manifest))


def test_a_run_of_an_older_version_lacks_sections_and_is_not_redone(config, caplog):
    run(load(config))
    run_dir = config.parent / "run"
    make_older(run_dir)
    before = {p: p.read_bytes() for p in run_dir.rglob("*.*") if p.suffix in (".safetensors",)}
    with caplog.at_level("INFO", "llmtune"):
        built = run(load(config))
    skipped = [line for line in caplog.messages if "skipped" in line]
    assert [line.partition(":")[0] for line in skipped] == ["train", "merge", "evaluate"]
    assert {path: path.read_bytes() for path in before} == before
    assert built.verdict.name and "evaluation is not finished" not in str(built.missing)


def test_what_an_older_run_lacks_counts_as_its_default_and_nothing_else(config):
    run(load(config))
    make_older(config.parent / "run")
    with pytest.raises(LlmtuneError, match=r"protect\.l2: was 0\.0, is 0\.5"):
        run(load(config, "protect.l2=0.5"))


def test_items_among_the_training_rows_are_told_before_training(config, caplog):
    items = config.parent / "items.jsonl"
    rows = (config.parent / "train.jsonl").read_text().splitlines()
    question, answer = json.loads(rows[5])["messages"]
    text = question["content"].removesuffix(" positive or negative?")
    leaked = {"id": "leak", "text": text.upper(), "answer": answer["content"]}
    items.write_text(items.read_text() + json.dumps(leaked) + "\n")
    with caplog.at_level("INFO", "llmtune"):
        built = run(load(config))
    told = next(
        n for n, line in enumerate(caplog.messages) if "1 of its 13 items are word for word" in line
    )
    assert f"item 'leak' in {config.parent / 'train.jsonl'}:6" in caplog.messages[told]
    assert told < next(n for n, line in enumerate(caplog.messages) if line.startswith("train data"))
    assert built.verdict.name == "CONTAMINATED"
    caplog.clear()
    run(load(config))
    assert "word for word" not in " ".join(caplog.messages)


def test_a_later_run_takes_over_what_was_measured_of_the_same_base(config, tmp_path, caplog):
    caplog.set_level("INFO", logger="llmtune")
    run(load(config))
    other = load(config, f"run_dir={tmp_path / 'other'}", "adapter.rank=2")
    caplog.clear()
    run(other)
    assert (
        "base: scores of an earlier run on the same base are taken over: sentiment" in caplog.text
    )
    html = (tmp_path / "other" / "report.html").read_text()
    assert "<i>base</i> on sentiment, prose were measured by an earlier run" in html

    def items(directory, arm):
        return json.loads((directory / "evaluations" / f"sentiment.{arm}.json").read_text())[
            "items"
        ]

    run_dir = config.parent / "run"
    assert items(tmp_path / "other", "base") == items(run_dir, "base")
    assert items(tmp_path / "other", "tuned") != items(run_dir, "tuned")
    caplog.clear()
    anew = load(config, f"run_dir={tmp_path / 'anew'}", "evaluate.reuse_base=false")
    run(anew)
    assert "taken over" not in caplog.text
    assert items(tmp_path / "anew", "base") == items(run_dir, "base")
