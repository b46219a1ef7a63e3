"""A stage says what decides it and what it leaves, also for what an older version recorded."""

import json

import pytest

from llmtune.config import load_config
from llmtune.io.manifest import read_manifest
from llmtune.runs.evaluate import EvaluateStage
from llmtune.runs.merge import MergeStage
from llmtune.runs.stage import Stage, deciding_knobs, deciding_knobs_of


class CountStage(Stage):
    """Write how often it was done."""

    name = "count"
    times = 0

    def inputs(self, manifest):
        return {"seed": self.config.seed}

    def complete(self, inputs):
        return {"seed": 0, **inputs}

    def outputs(self, record):
        yield self.config.run.path / record["result"]["file"]

    def run(self, inputs):
        CountStage.times += 1
        (self.config.run.path / "count.txt").write_text(str(CountStage.times))
        return {"file": "count.txt", "times": CountStage.times}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    data = {"train": [{"path": "a.jsonl"}]}
    values = {"run_dir": str(tmp_path / "run"), "model": {"base": "org/tiny"}, "data": data}
    path.write_text(json.dumps(values))
    return load_config(path)


def test_a_stage_is_done_once_for_equal_inputs_while_its_outputs_are_there(config):
    CountStage.times = 0
    assert CountStage(config).do()["times"] == 1
    assert CountStage(config).do()["times"] == 1
    assert CountStage(config.model_copy(update={"seed": 1})).do()["times"] == 2
    (config.run.path / "count.txt").unlink()
    assert CountStage(config.model_copy(update={"seed": 1})).do()["times"] == 3
    assert CountStage(config.model_copy(update={"seed": 1}), force=True).do()["times"] == 4


def test_a_record_without_a_key_that_came_later_counts_as_its_default(config):
    CountStage.times = 0
    CountStage(config).do()
    manifest = json.loads(config.run.manifest_path.read_text())
    manifest["stages"]["count"]["inputs"] = {}
    config.run.manifest_path.write_text(json.dumps(manifest))
    assert CountStage(config).do()["times"] == 1
    assert read_manifest(config.run).stages["count"]["inputs"] == {}


def test_recorded_knobs_of_merge_and_evaluate_are_completed(config):
    merge = config.merge.model_dump(mode="json")
    older = {name: value for name, value in merge.items() if name != "strength"}
    assert MergeStage(config).complete({"adapter": "a", "merge": older}) == {
        "adapter": "a",
        "merge": merge,
    }
    knobs = config.evaluate.measuring_knobs()
    older = {name: value for name, value in knobs.items() if name != "few_shot"}
    found = EvaluateStage(config).complete({"merge": "a" * 64, "evaluate": older})
    assert found == {"merge": "a" * 64, "evaluate": knobs}


def test_recorded_knobs_that_are_no_longer_there_are_other_inputs(config):
    recorded = {"merge": {"gone": 1}}
    assert MergeStage(config).complete(recorded) == recorded


def test_a_recorded_config_without_a_section_decides_the_same_adapter(config):
    recorded = config.model_dump(mode="json")
    for section in ("protect", "export", "merge"):
        del recorded[section]
    assert deciding_knobs_of(recorded) == deciding_knobs(config)
