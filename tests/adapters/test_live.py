"""A live adapter's strength: what merging writes, exact at the ends, and put back."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmtune.adapters.live import adapter_strength
from llmtune.adapters.saved import load_adapter
from llmtune.errors import LlmtuneError
from llmtune.merging.merge import merge_adapter
from llmtune.scoring.batches import adapter_disabled
from tests.tiny import make_model

IDS = torch.tensor([[5, 17, 200, 33, 4, 90]])
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


def make_adapted(kind, directory=None):
    base = make_model("llama", directory)
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, **KINDS[kind])).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_strength_1_is_the_tuned_model_and_0_its_base_bit_for_bit(kind):
    model = make_adapted(kind)
    tuned = logits_of(model)
    with model.disable_adapter():
        base = logits_of(model)
    for strength, expected in ((1.0, tuned), (0.0, base)):
        with adapter_strength(model, strength):
            assert torch.equal(logits_of(model), expected)
    with adapter_strength(model, 0.5):
        half = logits_of(model)
    assert not torch.allclose(half, tuned) and not torch.allclose(half, base)
    assert torch.equal(logits_of(model), tuned)


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_strength_is_what_merging_writes(kind, tmp_path):
    model = make_adapted(kind, tmp_path / "base")
    with adapter_strength(model, 0.3):
        live = logits_of(model)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", strength=0.3)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    torch.testing.assert_close(live, merged, rtol=1e-4, atol=1e-4)


def test_an_error_inside_still_puts_the_adapter_back():
    model = make_adapted("dora")
    tuned = logits_of(model)
    with pytest.raises(RuntimeError, match="stop"), adapter_strength(model, 0.5):
        raise RuntimeError("stop")
    assert torch.equal(logits_of(model), tuned)


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"init_lora_weights": "olora"}, "changes the base weights"),
        ({"bias": "lora_only"}, "also trained biases"),
        ({"trainable_token_indices": [3, 4]}, "single token rows"),
    ],
)
def test_an_adapter_that_cannot_be_weakened_is_refused(knobs, reason):
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], **knobs))
    with pytest.raises(LlmtuneError, match=reason), adapter_strength(model, 0.5):
        pass


@pytest.mark.filterwarnings("error:Careful")
@pytest.mark.parametrize("kind", ["biases", "table"])
def test_without_an_adapter_that_was_loaded_over_the_base_the_model_is_its_base(tmp_path, kind):
    is_table = kind == "table"
    knobs = {"target_modules": ["q_proj", "embed_tokens"]} if is_table else {"bias": "all"}
    made = get_peft_model(make_model("qwen2"), LoraConfig(**{"target_modules": ["q_proj"]} | knobs))
    for name, parameter in made.named_parameters():
        if parameter.requires_grad or (is_table and "embed_tokens.base_layer" in name):
            parameter.data += 0.1
    made.save_pretrained(str(tmp_path), save_embedding_layers=is_table)
    base = make_model("qwen2")
    plain = logits_of(base)
    model = load_adapter(base, tmp_path, base_fingerprint="any")
    tuned = logits_of(model)
    with adapter_disabled(model):
        assert torch.equal(logits_of(model), plain)
    assert torch.equal(logits_of(model), tuned)
    torch.testing.assert_close(tuned, logits_of(made.eval()))
    assert not torch.allclose(tuned, plain, atol=0.1)


def test_a_negative_strength_is_refused():
    with (
        pytest.raises(LlmtuneError, match="expected 0"),
        adapter_strength(make_adapted("lora"), -1),
    ):
        pass
