"""A method that is nothing like LoRA is one new file and one entry in the union."""

import pytest

from tests.extension.house import House
from tests.project import make_project

METHOD = '''
"""IA3 (arXiv:2205.05638): every output of a layer is scaled by a trained number."""

from dataclasses import dataclass
from typing import Literal

from llmtune.adapters.base import Adapter
from llmtune.adapters.update import Part, WeightUpdate, Widths
from llmtune.io.safetensors import TensorEntry

MARK = ".ia3_l"


class Ia3Adapter(Adapter):
    """W' = diag(l) W."""

    PEFT_TYPE = "IA3"
    TENSOR_MARK = MARK
    KEPT_OUTPUTS = 1
    INERT_SETTINGS = frozenset({"feedforward_modules", "init_ia3_weights"})

    method: Literal["ia3"] = "ia3"

    def to_peft(self, target_modules, target_parameters=(), *, fan_in_fan_out=False):
        from peft import IA3Config

        return IA3Config(
            task_type="CAUSAL_LM",
            target_modules=list(target_modules),
            feedforward_modules=[],
            modules_to_save=list(self.modules_to_save) or None,
            fan_in_fan_out=fan_in_fan_out,
        )

    def parameters_of(self, module, num_out, num_in):
        return num_out

    @classmethod
    def learns_at_once(cls, name):
        return True

    @classmethod
    def neutral_value(cls, name):
        return 1.0 if MARK in name else None

    @classmethod
    def part_of(cls, name):
        module, mark, _ = name.partition(MARK)
        return Part(module, "scale") if mark else None

    @classmethod
    def widths(cls, tensors):
        return Widths(tensors.parts["scale"].shape[0], None)

    @classmethod
    def plan_updates(cls, tensors, place, config, strength):
        scale = tensors.parts["scale"]
        updates = {"weight": ScaleOutputs(scale, strength, is_row=place.is_transposed)}
        if place.has_bias:
            updates["bias"] = ScaleOutputs(scale, strength, is_row=True)
        return updates


@dataclass(frozen=True)
class ScaleOutputs(WeightUpdate):
    """Each output's weights times its number."""

    word = "ia3"

    scale: TensorEntry  # [out, 1]
    weight: float
    is_row: bool  # outputs are the columns of the table

    @property
    def entries(self):
        return (self.scale,)

    @property
    def strength(self):
        return self.weight

    def apply(self, rows, first_row, work, surveyed):
        scale = work.load(self.scale)
        if self.is_row:
            rows *= scale.view(1, -1)
        else:
            rows *= scale[first_row : first_row + rows.shape[0]]
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
assert record["changes"].keys() == {"ia3"}
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
    house.add("adapters/ia3.py", METHOD)
    house.enter(
        "adapters/config.py",
        {
            "from llmtune.adapters.lora import LoraAdapter\n": "from llmtune.adapters.ia3 import "
            "Ia3Adapter\nfrom llmtune.adapters.lora import LoraAdapter\n",
            "LoraAdapter | RsLoraAdapter | DoraAdapter": (
                "LoraAdapter | RsLoraAdapter | DoraAdapter | Ia3Adapter"
            ),
        },
    )
    return house


def test_a_method_unlike_lora_is_planned_trained_merged_and_reported(house, tmp_path):
    """Qwen2's attention has biases, which are scaled too."""
    project = tmp_path / "project"
    make_project(project, "qwen2", adapter={"method": "ia3"})
    program = f"import sys; sys.argv[1:] = [{str(project)!r}]\n{PROGRAM}"
    house.execute(program, cwd=tmp_path)
