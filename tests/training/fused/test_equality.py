"""Fused training ends at stock's adapter within bfloat16 noise, judged by a float32 run."""

import statistics
from collections import defaultdict
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmtune.models.quantization.bnb import dequantize_four_bit
from llmtune.models.quantization.describe import keep_differentiable
from llmtune.training.train import train_adapter
from tests.tiny import make_model
from tests.training.tiny_runs import adapter_weights, add_lora, make_config, make_request

STOCK = frozenset({"fused_lora", "fused_blocks", "frozen_head"})
LARGEST_ERROR_RATIO = 1.25
NOISE = 2**-7
"""One bfloat16 epsilon of how far a tensor moved: below it, which run is nearer is chance."""

# Choosing the best two of four experts turns rounding into another choice, in stock as in fused
# training, so here all are taken; the choice itself is tested in float32 in test_fused_lora.py.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"tie_word_embeddings": True, "final_logit_softcapping": 5.0},
    "gpt_neox": {},
    "mixtral": {"num_experts_per_tok": 4},
}


def load_base(family, directory, quantization):
    """Return the bfloat16 base as it is trained."""
    make_model(family, directory, dtype=torch.bfloat16, **FAMILIES[family])
    keywords = {}
    if quantization == "nf4":
        keywords["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    base = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        attn_implementation="eager" if family == "gemma2" else "sdpa",
        **keywords,
    )
    keep_differentiable(base)
    return base


def as_float32(family, base):
    """Return the same base, its very weights, computing in float32."""
    dense = make_model(family, **FAMILIES[family])
    dense.set_attn_implementation(base.config._attn_implementation)
    for name, weight in base.named_parameters():
        is_packed = hasattr(weight, "quant_state")
        dense.get_parameter(name).data.copy_(dequantize_four_bit(weight) if is_packed else weight)
    return dense


def train(base, run, without=STOCK):
    """Return how far 20 steps move every adapter tensor."""
    model = add_lora(base)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zeros would leave lora_A's first gradients to rounding alone
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    start = adapter_weights(model)
    config = make_config(max_steps=20, learning_rate=1e-3)
    result = train_adapter(config, make_request(model, run, without=without, packing="off"))
    assert ("fused in" in result.choices["LoRA layers"]) == ("fused_lora" not in without)
    return {name: weight - start[name] for name, weight in adapter_weights(model).items()}


def errors(found, exact) -> dict[str, float]:
    """Return each tensor's error as a share of how far it moves, like tensors of the layers as one.

    A single tensor's error is mostly chance: rounding turns a few of Adam's first steps around.
    """
    squares = defaultdict(list)
    for name, wanted in exact.items():
        kind = name.split("layers.")[1].split(".", 1)[1]
        squares[kind].append(((found[name] - wanted).norm() / wanted.norm()).item() ** 2)
    return {kind: statistics.mean(values) ** 0.5 for kind, values in squares.items()}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_training_is_as_near_to_float32_as_stock(family, quantization, tmp_path):
    base = load_base(family, tmp_path / "base", quantization)
    has_packed = any(hasattr(weight, "quant_state") for weight in base.parameters())
    assert has_packed == (quantization == "nf4")
    exact = train(as_float32(family, base), tmp_path / "exact")
    fused = errors(train(base, tmp_path / "fused", frozenset()), exact)
    again = load_base(family, tmp_path / "base", quantization)
    stock = errors(train(again, tmp_path / "stock"), exact)

    assert sum(fused.values()) <= LARGEST_ERROR_RATIO * sum(stock.values())
    for kind, error in fused.items():
        assert error <= LARGEST_ERROR_RATIO * stock[kind] + NOISE, kind
