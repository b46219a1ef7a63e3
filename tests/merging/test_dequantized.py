"""Merging into the weights that a quantized base computes with, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file

from llmtune.merging import changes
from llmtune.merging.merge import write_merge
from llmtune.merging.plan import PlanOptions, plan_merge
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.load import load_model
from llmtune.models.quantization.describe import describe_quantized_base
from llmtune.models.resolve import resolve_base
from tests.merging.adapters import load_base, logits, make_adapter, make_base

QUANTIZATIONS: dict[str, Any] = {
    "nf4": {"method": "nf4"},
    "nf4 with plain scales": {"method": "nf4", "double_quant": False},
    "nf4 computed in float32": {"method": "nf4", "compute_dtype": "float32"},
    "fp4": {"method": "fp4"},
    "int8": {"method": "int8"},
}


def model_config(base: Path, quantization: dict | None, **options) -> ModelConfig:
    return ModelConfig(base=str(base), quantization=quantization, device="cpu", **options)


def merge_dequantized(place: Path, config: ModelConfig, **options):
    quantized = describe_quantized_base(config, resolve_base(config))
    options = {"options": PlanOptions(quantized=quantized), **options}
    plan = plan_merge(Checkpoint.open(place / "base"), place / "adapter", **options)
    return write_merge(plan, place / "merged")


def weights_computed_with(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return what the loaded quantized model multiplies with, by parameter name."""
    weights = {}
    for name, module in load_model(config, resolve_base(config)).model.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "Params4bit":
            weight.quant_state.dtype = module.compute_dtype
            weights[f"{name}.weight"] = functional.dequantize_4bit(weight, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            weights[f"{name}.weight"] = functional.int8_vectorwise_dequant(weight, weight.SCB)
    return weights


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_weights_are_the_quantized_ones_plus_the_delta(tmp_path, monkeypatch, kind, dtype):
    monkeypatch.setattr(changes, "TILE_ELEMENTS", 64 * 64)  # several tiles a tensor
    base = make_base(tmp_path / "base", dtype=dtype, intermediate_size=640)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    config = model_config(base, QUANTIZATIONS[kind])
    merge_dequantized(tmp_path, config)
    computed = weights_computed_with(config)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    deltas = load_file(adapter / "adapter_model.safetensors")
    assert len(computed) == 14 and before.keys() == after.keys()
    for name, weight in before.items():
        expected = computed.get(name, weight).float()
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in deltas:
            a, b = deltas[f"{key}.lora_A.weight"], deltas[f"{key}.lora_B.weight"]
            expected = expected + 2.0 * (b @ a)
        assert torch.equal(after[name], expected.to(dtype)), name
    assert "lm_head.weight" not in computed  # transformers leaves the head as it is


@pytest.mark.parametrize(("family", "num_quantized"), [("gpt2", 8), ("phi", 12), ("mixtral", 8)])
def test_strength_0_gives_the_quantized_base(tmp_path, family, num_quantized):
    base = make_base(tmp_path / "base", family)
    make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "q_proj"])
    config = model_config(base, {"method": "nf4"}, dtype="float32")
    result = merge_dequantized(tmp_path, config, strength=0)
    computed = weights_computed_with(config)
    assert len(computed) == num_quantized == sum(result.changes.values())
    merged = load_base(tmp_path / "merged").state_dict()
    before = load_base(base).state_dict()
    for name, weight in before.items():
        expected = computed.get(name, weight)
        expected = expected.t() if expected.shape != weight.shape or family == "gpt2" else expected
        if name not in computed:
            expected = weight
        assert torch.equal(merged[name], expected), name


def test_merged_model_answers_as_the_live_quantized_one(tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["norm"])
    config = model_config(base, {"method": "nf4"}, dtype="float32")
    merge_dequantized(tmp_path, config)
    from peft import PeftModel

    live = PeftModel.from_pretrained(load_model(config, resolve_base(config)).model, adapter).eval()
    merged = load_base(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(live), atol=2e-5, rtol=0)
    assert (logits(load_base(base)) - logits(live)).abs().max() > 0.05


def test_base_that_is_not_quantized_has_nothing_to_dequantize(tmp_path):
    config = model_config(make_base(tmp_path / "base"), None)
    assert describe_quantized_base(config, resolve_base(config)) is None
