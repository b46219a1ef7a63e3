"""Fused LoRA layers train the same adapter as PEFT's own, and are PEFT's own again afterwards."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmtune.adapters.fused import fused_lora
from llmtune.models.quantization.bnb import dequantize_four_bit
from llmtune.models.quantization.describe import keep_differentiable
from llmtune.training.loss import decoder_hidden
from llmtune.training.train import train_adapter
from tests.tiny import make_model
from tests.training.tiny_runs import (
    adapted_layers,
    adapter_weights,
    add_lora,
    largest_difference,
    make_adapter,
    make_config,
    make_request,
)

FAMILIES = ("llama", "qwen2", "gemma2", "phi", "gpt_neox", "mixtral")
STOCK = frozenset({"fused_lora", "fused_blocks", "frozen_head"})


def make_four_bit(family: str, directory, quant_type: str = "nf4"):
    make_model(family, directory, dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    keep_differentiable(base)
    return add_lora(base)


def run_decoder(model):
    return decoder_hidden(model, {"input_ids": torch.arange(4, 20)[None]})


def train(model, run, **changes):
    result = train_adapter(
        make_config(max_steps=20, learning_rate=1e-3), make_request(model, run, **changes)
    )
    return result, adapter_weights(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_training_gives_the_stock_adapter(family, tmp_path):
    fused, ours = train(make_adapter(family), tmp_path / "fused")
    _, stock = train(make_adapter(family), tmp_path / "stock", packing="off", without=STOCK)
    assert "fused in" in fused.choices["LoRA layers"]
    assert largest_difference(ours, stock) < 2e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_fused_training_over_nf4_gives_the_stock_adapter_within_rounding(family, tmp_path):
    results = {}
    for name, without in (("fused", frozenset()), ("stock", STOCK)):
        model = make_four_bit(family, tmp_path / f"{name}-base")
        start = adapter_weights(model)
        result, weights = train(model, tmp_path / name, without=without)
        results[name] = torch.cat([(weights[key] - start[key]).flatten() for key in start])
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert ("fused in" in result.choices["LoRA layers"]) == (name == "fused")
    moved = results["stock"].norm()
    # Adam turns bfloat16 noise in tiny gradients into whole steps, hence not a tight bound.
    assert (results["fused"] - results["stock"]).norm() < 0.25 * moved


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantizing_equals_bitsandbytes(quant_type, tmp_path):
    import bitsandbytes

    model = make_four_bit("llama", tmp_path, quant_type)
    weight = model.get_base_model().model.layers[0].mlp.gate_proj.get_base_layer().weight
    expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(dequantize_four_bit(weight), expected)


def test_layers_with_one_input_are_one_group():
    model = make_adapter()
    with fused_lora(model, lambda: run_decoder(model)) as table:
        # Two layers with q, k, v | o | gate, up | down.
        assert (table.num_fused, table.num_groups, table.stock) == (14, 8, {})


def test_outputs_and_gradients_equal_pefts():
    model = make_adapter("qwen2").train()
    for weight in adapter_weights(model):
        model.get_parameter(weight).data.normal_(0, 0.1)
    expected = run_decoder(model)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with fused_lora(model, lambda: run_decoder(model)):
        found = run_decoder(model)
        found.square().sum().backward()
    assert torch.allclose(found, expected, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-4), name


def test_the_layers_are_pefts_own_afterwards():
    model = make_adapter()
    before = [set(layer.__dict__) for layer in adapted_layers(model)]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with fused_lora(model, lambda: run_decoder(model)):
        assert all("forward" in layer.__dict__ for layer in adapted_layers(model))
    assert [set(layer.__dict__) for layer in adapted_layers(model)] == before
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_changed_adapter_is_seen_after_a_fused_optimizer_step():
    model = make_adapter()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
    with fused_lora(model, lambda: run_decoder(model)):
        before = run_decoder(model)
        before.square().sum().backward()
        optimizer.step()
        after = run_decoder(model)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, run_decoder(model), atol=1e-5)


def test_the_base_is_reached_when_the_adapter_is_switched_off():
    model = make_adapter()
    for name in adapter_weights(model):
        model.get_parameter(name).data.normal_(0, 0.1)
    with model.disable_adapter():
        expected = run_decoder(model)
    with fused_lora(model, lambda: run_decoder(model)), model.disable_adapter():
        assert torch.equal(run_decoder(model), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "every layer draws a dropout mask of its own"),
        ({"use_dora": True}, "DoraLinearVariant is a variant of LoRA"),
        ({"lora_bias": True}, "its adapter has a bias"),
    ],
)
def test_what_is_not_covered_keeps_pefts_forward_and_is_counted(options, reason):
    model = add_lora(make_model("llama"), **options)
    with fused_lora(model, lambda: run_decoder(model)) as table:
        assert table.stock == {reason: 14}
        assert table.num_fused == 0
        assert f"14 stock ({reason})" in table.describe()


def test_experts_keep_pefts_forward_and_are_counted():
    model = make_adapter("mixtral")
    with fused_lora(model, lambda: run_decoder(model)) as table:
        assert table.num_fused == 8
        assert table.stock
