"""What merging would refuse is found before training, at the command."""

import json

import pytest

from llmtune.errors import LlmtuneError
from llmtune.io import unfinished
from llmtune.runs import pipeline
from llmtune.runs.train import TrainStage
from tests.merging.test_judged import invoke
from tests.project import make_project


@pytest.mark.parametrize("adapter", [{"method": "dora", "rank": 4}, {"modules_to_save": ["norm"]}])
def test_the_plan_before_training_is_the_merge_afterwards(tmp_path, adapter):
    config = make_project(
        tmp_path,
        adapter={"method": "lora", "rank": 4, "alpha": 8, **adapter},
        train={"max_steps": 1, "batch_size": 2},
    )
    planned = json.loads(invoke("plan", config, "--merge", "--json").stdout)["merge"]
    assert not (tmp_path / "run" / "adapter").exists()
    assert invoke("train", config).exit_code == 0
    merged = json.loads(invoke("merge", config, "--dry-run", "--json").stdout)
    changed = [
        [(one["tensor"], one["change"]) for one in plan["plans"][0]["changed"]]
        for plan in (planned, merged)
    ]
    assert changed[0] == changed[1] and len(changed[0]) >= 14


def test_what_merging_would_refuse_ends_a_run_before_it_trains(tmp_path, monkeypatch):
    config = make_project(tmp_path, merge={"base": "dequantized"})
    for command in (("run", config), ("plan", config, "--merge")):
        refused = invoke(*command)
        assert isinstance(refused.exception, LlmtuneError), refused.output
        assert "could not be merged" in str(refused.exception)
        assert "there is nothing to dequantize" in str(refused.exception)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(unfinished, "free_bytes", lambda _: 1000)
    refused = invoke("run", config, "merge.base=original")
    assert "the merged model needs" in str(refused.exception)


def test_training_alone_says_it_and_goes_on(tmp_path, monkeypatch, caplog):
    config = make_project(tmp_path, merge={"base": "dequantized"})
    monkeypatch.setattr(TrainStage, "do", lambda stage: {})
    with caplog.at_level("WARNING", logger="llmtune"):
        pipeline.train(pipeline_config(config))
    assert "could not be merged" in caplog.text
    with pytest.raises(LlmtuneError, match="could not be merged"):
        pipeline.train(pipeline_config(config, "export.to=[gguf]"))


def pipeline_config(path, *overrides):
    from llmtune.config import load_config

    return load_config(path, overrides)
