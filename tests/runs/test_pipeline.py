"""The whole run on tiny models of many families, and what a second call does."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llmtune import evaluate, load_config, merge, report, run, train
from llmtune.evaluation.main_arms import MAIN_ARMS
from llmtune.io.manifest import read_manifest
from tests.project import make_project
from tests.tiny import FAMILIES

NF4 = ["model.quantization={method: nf4}"]
SHORT = ["train.max_steps=2", "evaluate.limit=4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a tiny Llama over NF4, finished once and only read by the tests."""
    directory = tmp_path_factory.mktemp("finished")
    config = load_config(make_project(directory), NF4)
    run(config)
    return config


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_from_rows_to_report(tmp_path, family, quantization):
    overrides = [*SHORT, f"model.quantization={{method: {quantization}}}"]
    config = load_config(make_project(tmp_path, family), overrides)
    built = run(config)
    values = json.loads(config.run.report_json_path.read_text())
    assert values["verdict"] == built.verdict.name
    assert values["suites"]["sentiment"]["n"] == 4
    for suite in values["suites"].values():
        assert suite["compared"] == ["original", "merged"]
        assert None not in [suite[arm] for arm in MAIN_ARMS]
        assert suite["difference"] == pytest.approx(suite["merged"] - suite["original"])
        parts = sum(part["difference"] for part in suite["chain"].values())
        assert suite["difference"] == pytest.approx(parts)
        assert ("quantization" in suite["chain"]) == (quantization == "nf4")
    prose = values["suites"]["prose"]
    assert (prose["original"] == prose["base"]) == (quantization == "none")
    assert values["merge"]["check"]["kl"] < 1e-3
    assert config.run.report_html_path.stat().st_size > 1000


def test_stock_peft_and_stock_transformers_load_what_a_run_leaves(finished):
    base = AutoModelForCausalLM.from_pretrained(finished.model.base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, finished.run.adapter_dir)
    merged = AutoModelForCausalLM.from_pretrained(finished.run.merged_dir, dtype=torch.float32)
    ids = torch.tensor([[2, 40, 41, 42, 43]])
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_report_adds_up(finished):
    values = json.loads(finished.run.report_json_path.read_text())
    seconds = values["seconds"]
    assert seconds["total"] == pytest.approx(
        seconds["train"] + seconds["merge"] + seconds["evaluate"]
    )
    assert values["peak_bytes"] > 100e6
    assert set(values["suites"]) == {"sentiment", "prose"}


def test_a_second_call_skips_what_is_finished(finished):
    before = read_manifest(finished.run).stages
    run(finished)
    assert read_manifest(finished.run).stages == before


def test_the_stages_can_be_called_alone(tmp_path):
    config = load_config(make_project(tmp_path), SHORT)
    result = train(config)
    assert result["steps"] == 2
    merged = merge(config)
    assert merged["check"]["num_same_labels"] == merged["check"]["num_labels"]
    scores = evaluate(config)
    assert scores["sentiment"]["comparison"]["n"] == 4
    assert report(config.run_dir).verdict.name


def test_the_order_of_the_rows_is_recorded_and_depends_on_the_seed_alone(tmp_path):
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = load_config(make_project(tmp_path / name), [*SHORT, f"seed={seed}"])
        hashes.append(train(config)["order_hash"])
    assert hashes[0] == hashes[1] != hashes[2]
    assert read_manifest(config.run).stages["train"]["result"]["order_hash"] == hashes[2]


def test_training_teaches_the_task(tmp_path):
    config = load_config(make_project(tmp_path), ["train.max_steps=30", "train.learning_rate=1e-2"])
    result = train(config)
    lines = [json.loads(line) for line in config.run.metrics_path.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert result["final_loss"] == pytest.approx(losses[-1], rel=0.5)


def test_a_lost_merged_model_is_made_again(tmp_path):
    import shutil

    config = load_config(make_project(tmp_path), SHORT)
    train(config)
    merge(config)
    shutil.rmtree(config.run.merged_dir)
    merge(config)
    assert (config.run.merged_dir / "config.json").is_file()


def test_a_moved_run_still_reports_and_evaluates(tmp_path):
    from llmtune.runs.targets import require_run

    config = load_config(make_project(tmp_path), SHORT)
    run(config)
    moved = tmp_path / "elsewhere"
    config.run_dir.rename(moved)
    assert report(moved).verdict.name
    scores = evaluate(require_run(str(moved)))
    assert scores["sentiment"]["n"] == 4
