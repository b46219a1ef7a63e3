"""A format of quantized checkpoints is one new file and one entry in the list of formats."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.extension.house import House
from tests.tiny import make_model

HALVED = '''"""Weights stored as whole numbers of halves."""

from typing import ClassVar

from llmtune.models.stored.base import StoredFormat, StoredPlan, StoredWeight


class HalvedFormat(StoredFormat):
    """8-bit whole numbers, each a half."""

    method: ClassVar[str] = "halved"

    @property
    def title(self):
        return "halved"

    def check(self):
        self.choose("half", (0.5,))

    def plan(self, index):
        found = self.gather(index, ".halves", (".halves",))
        return StoredPlan(
            tuple(
                StoredWeight(
                    parts.stem + ".weight",
                    parts.expect(".halves", ("I8",), (None, None)).shape,
                    parts.entries,
                    lambda tensors, dtype: tensors[".halves"].to(dtype) / 2,
                )
                for parts in found
            )
        )
'''


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path / "house")
    house.add("models/stored/halved.py", HALVED)
    house.enter(
        "models/stored/formats.py",
        {
            "from llmtune.models.stored.hqq import HqqFormat\n": (
                "from llmtune.models.stored.halved import HalvedFormat\n"
                "from llmtune.models.stored.hqq import HqqFormat\n"
            ),
            "    HqqFormat,\n": "    HalvedFormat,\n    HqqFormat,\n",
        },
    )
    return house


def test_new_format_is_read_as_its_dense_checkpoint(house, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    make_model("llama", base, dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.halves"] = torch.arange(-8, 8).char().repeat(128, 4)
    del tensors[f"{name}.weight"]
    save_file(tensors, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "halved", "half": 0.5}
    (base / "config.json").write_text(json.dumps(config))
    program = (
        "from llmtune.models.config import ModelConfig\n"
        "from llmtune.models.resolve import resolve_base\n"
        f"source = resolve_base(ModelConfig(base={str(base)!r}))\n"
        "print(source.stored.describe(), source.directory, sep='\\n')\n"
    )
    said, directory = house.execute(program, tmp_path).stdout.splitlines()

    assert said == "halved, dequantized to bfloat16"
    dense = load_file(f"{directory}/model.safetensors")[f"{name}.weight"]
    assert torch.equal(dense[0, :4], torch.tensor([-4, -3.5, -3, -2.5]).bfloat16())
