"""An adapter that is only asked runs fused with the results of PEFT, and is its own again later."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmtune.adapters.fused import fused_inference, is_fused
from llmtune.adapters.live import adapter_strength
from llmtune.models.quantization.describe import find_dense_weights, keep_differentiable
from tests.tiny import make_model

IDS = torch.arange(4, 44).view(2, 20)


def make_adapted(family: str, **settings):
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", **settings)
    return get_peft_model(make_model(family), config).eval()


def layers_of(model):
    return [m for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]


@torch.no_grad()
def run(model):
    return model(IDS).logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_fused_adapter_computes_what_peft_computes_at_every_strength(family):
    model = make_adapted(family)
    tuned = run(model)
    with model.disable_adapter():
        base = run(model)
    with adapter_strength(model, 0.5):
        weaker = run(model)
    with torch.no_grad(), fused_inference(model):
        assert all(map(is_fused, layers_of(model)))
        assert torch.allclose(run(model), tuned, atol=1e-5)
        with adapter_strength(model, 0.5):
            assert torch.allclose(run(model), weaker, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(run(model), base)
        assert torch.allclose(run(model), tuned, atol=1e-5)
    assert not any(map(is_fused, layers_of(model)))
    assert torch.equal(run(model), tuned)
    assert (tuned - base).abs().max() > 0.1 and (weaker - tuned).abs().max() > 0.01


def test_what_cannot_be_fused_runs_as_peft_runs_it():
    model = make_adapted("llama", use_dora=True)
    tuned = run(model)
    with torch.no_grad(), fused_inference(model):
        assert not any(map(is_fused, layers_of(model)))
        assert torch.equal(run(model), tuned)


def adapt_quantized(directory, dtype, **quantization):
    make_model("llama", directory, dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=BitsAndBytesConfig(**quantization)
    )
    keep_differentiable(base)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    return get_peft_model(base, config).eval()


def test_an_adapter_on_dequantized_products_is_fused_whether_or_not_they_are_held(tmp_path):
    four_bit = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    model = adapt_quantized(tmp_path, torch.float32, **four_bit)
    tuned = run(model)
    with torch.no_grad(), fused_inference(model):
        assert all(map(is_fused, layers_of(model)))
        fused = run(model)
    assert torch.allclose(fused, tuned, atol=1e-5)
    find_dense_weights(model).hold()
    assert torch.equal(run(model), tuned)
    with torch.no_grad(), fused_inference(model):
        assert torch.equal(run(model), fused)


def test_an_adapter_on_weights_that_round_their_inputs_runs_as_peft_runs_it(tmp_path):
    model = adapt_quantized(tmp_path, torch.bfloat16, load_in_8bit=True)
    tuned = run(model)
    with torch.no_grad(), fused_inference(model):
        assert not any(map(is_fused, layers_of(model)))
        assert torch.equal(run(model), tuned)
