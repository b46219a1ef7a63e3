"""A method that is nothing like LoRA is one new file and one entry in the union."""

import pytest

from tests.extension.house import House
from tests.project import make_project

METHOD = '''
"""RoAd (arXiv:2409.00119): pairs of a layer's outputs are turned and scaled."""

from typing import Literal

from llmtune.adapters.peft_method import PeftMethod, SavedPart


class RoadAdapter(PeftMethod):
    """W' = R W, and b' = R b."""

    PEFT_TYPE = "ROAD"
    PEFT_CONFIG = "RoadConfig"
    TENSOR_MARK = ".road_"
    PARTS = (SavedPart("road_theta", 0.0), SavedPart("road_alpha", 1.0))
    KEPT_OUTPUTS = 1

    method: Literal["road"] = "road"

    def peft_settings(self, target_modules):
        return {"group_size": 32}

    def parameters_of(self, module, num_out, num_in):
        return num_out

    @classmethod
    def changed_leaves(cls, tensors, config):
        return ("weight", "bias")
'''

PROGRAM = """
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtune.cli import run_command

project = Path(sys.argv[1])
run = project / "run"
for command in (
    ["plan", str(project / "config.yaml")],
    ["run", str(project / "config.yaml"), "train.learning_rate=0.05"],
    ["merge", str(run), "--strength", "0.5", "--out", str(project / "half")],
):
    assert run_command(command) == 0, command
assert (run / "report.html").is_file()
record = json.loads((run / "merged" / "llmtune_merge.json").read_text())
assert record["changes"].keys() == {"peft"}
assert record["check"]["kl"] < 0.001, record["check"]

before = load_file(project / "base" / "model.safetensors")
model = AutoModelForCausalLM.from_pretrained(project / "base")
stock = PeftModel.from_pretrained(model, run / "adapter").merge_and_unload().state_dict()
for directory, strength in ((run / "merged", 1.0), (project / "half", 0.5)):
    ours = load_file(directory / "model.safetensors")
    changed = {name for name, weight in before.items() if not torch.equal(weight, ours[name])}
    assert any(name.endswith("q_proj.weight") for name in changed)
    assert any(name.endswith("q_proj.bias") for name in changed)
    for name, weight in before.items():
        expected = stock[name] if strength == 1 else weight + strength * (stock[name] - weight)
        assert torch.equal(ours[name], expected), name
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> House:
    house = House(tmp_path_factory.mktemp("house"))
    house.add("adapters/road.py", METHOD)
    house.enter(
        "adapters/config.py",
        {
            "from llmtune.adapters.rslora": "from llmtune.adapters.road import RoadAdapter\n"
            "from llmtune.adapters.rslora",
            "    | RsLoraAdapter\n": "    | RsLoraAdapter\n    | RoadAdapter\n",
        },
    )
    return house


def test_a_method_unlike_lora_is_planned_trained_merged_and_reported(house, tmp_path):
    """Qwen2's attention has biases, which are scaled too."""
    project = tmp_path / "project"
    make_project(project, "qwen2", adapter={"method": "road"})
    program = f"import sys; sys.argv[1:] = [{str(project)!r}]\n{PROGRAM}"
    house.execute(program, cwd=tmp_path)
