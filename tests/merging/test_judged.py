"""A merge at the command is kept if it is base + adapter; refused if one module's delta is wrong.

The adapters are weak, so that the whole model's divergence alone tells nothing.
"""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llmtune.checks import prompts
from llmtune.cli import cli
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.merging import checked, merge
from tests.merging.adapters import make_adapter, make_base

MODULE = "model.layers.1.self_attn.o_proj"

WRONGS = {
    "doubled": lambda delta: delta,
    "dropped": lambda delta: -delta,
    "transposed": lambda delta: delta.T - delta,
}
# The quantization, the base that is asked for, and what is planted.
CASES = {
    "16 bits": (None, "original", WRONGS),
    "nf4": ({"method": "nf4"}, "dequantized", ("transposed",)),
    "int8": ({"method": "int8"}, "dequantized", ("doubled",)),
}


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def plant(monkeypatch, adapter_dir, change):
    """Have the next merges add `change` of the delta to one module, on top of what is right."""
    write = merge.write_merge
    factors = load_file(adapter_dir / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{MODULE}.lora_{one}.weight"] for one in "AB")

    def write_wrongly(plan, directory, **options):
        result = write(plan, directory, **options)
        path = directory / "model.safetensors"
        tensors = load_file(path)
        weight = tensors[f"{MODULE}.weight"]
        tensors[f"{MODULE}.weight"] = (weight.float() + change(2.0 * b @ a)).to(weight.dtype)
        save_file(tensors, path, {"format": "pt"})
        return result

    monkeypatch.setattr(checked, "write_merge", write_wrongly)


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(prompts, "OPEN_PROMPTS", OPEN_PROMPTS[:2])


@pytest.mark.parametrize("kind", CASES)
def test_right_merges_are_kept_and_wrong_ones_refused(tmp_path, monkeypatch, kind):
    quantization, base, planted = CASES[kind]
    make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", scale=0.02)
    knob = f"model.quantization={json.dumps(quantization)}"
    asked = ("merge", adapter, knob, "--base", base, "--out", tmp_path / "out", "--force")
    merged = invoke(*asked)
    assert merged.exit_code == 0, merged.exception
    check = json.loads((tmp_path / "out" / "llmtune_merge.json").read_text())["check"]
    assert check["kl"] < 0.01 and 0 < check["base_kl"] < 0.05
    assert (check["live_kl"] is not None) == (kind == "int8")
    for wrong in planted:
        with monkeypatch.context() as patch:
            plant(patch, adapter, WRONGS[wrong])
            refused = invoke(*asked)
        message = str(refused.exception)
        assert refused.exit_code == 1, message
        assert message.startswith("1 merged modules") and MODULE in message, message
