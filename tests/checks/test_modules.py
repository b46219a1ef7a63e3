"""A merge that is wrong in one module is seen, however little the adapter does to the answers."""

from typing import Any

import pytest
import torch
from peft import OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llmtune.checks.merged import verify_merge
from llmtune.checks.prompts import ComparedPrompts
from llmtune.merging.merge import merge_adapter
from llmtune.scoring.generate import Decoding
from tests.merging.adapters import PROMPTS, load_adapter, load_base, make_adapter, make_base
from tests.tiny import make_model
from tests.training.test_trainable import MODELS, SMALL

WEIGHT = "model.layers.1.self_attn.o_proj.weight"


def compared(tmp_path, live):
    prompts = ComparedPrompts(sequences=tuple(map(tuple, PROMPTS)))
    decoding = Decoding(max_new_tokens=2, stop_token_ids=(3,))
    return verify_merge(live, tmp_path / "merged", prompts, decoding=decoding, dtype=torch.float32)


def wrong_modules(tmp_path, live):
    result = compared(tmp_path, live)
    return result.kl, [one.module for one in result.wrong_modules]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_a_transposed_delta_is_found_in_its_module_alone(tmp_path, dtype, scale):
    base = make_base(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", scale=scale)
    merge_adapter(base, adapter, tmp_path / "merged")
    live = load_adapter(base, adapter, torch.float32)
    assert wrong_modules(tmp_path, live)[1] == []
    path = tmp_path / "merged" / "model.safetensors"
    tensors, before = load_file(path), load_file(base / "model.safetensors")
    delta = tensors[WEIGHT].float() - before[WEIGHT].float()
    tensors[WEIGHT] = (before[WEIGHT].float() + delta.T).to(dtype)
    save_file(tensors, path, {"format": "pt"})
    kl, found = wrong_modules(tmp_path, live)
    assert found == [WEIGHT.removesuffix(".weight")]
    assert kl < 0.05 or scale > 0.05


def test_a_rotation_mixes_what_rounding_the_base_before_did_to_its_weights(tmp_path):
    base, rounded = make_base(tmp_path / "base"), make_base(tmp_path / "rounded")
    model = load_base(base).bfloat16()
    model.save_pretrained(rounded)
    turned = get_peft_model(load_base(base), OFTConfig(target_modules=["o_proj"], r=0))
    with torch.no_grad():
        for name, parameter in turned.named_parameters():
            if "oft_R" in name:
                parameter.normal_(0, 0.3)
    turned.save_pretrained(tmp_path / "adapter")
    merge_adapter(rounded, tmp_path / "adapter", tmp_path / "merged")
    live = load_adapter(base, tmp_path / "adapter")
    assert wrong_modules(tmp_path, live)[1] == []
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors[WEIGHT][0, 0] *= 1.1
    save_file(tensors, path, {"format": "pt"})
    assert wrong_modules(tmp_path, live)[1] == [WEIGHT.removesuffix(".weight")]


def test_a_head_that_was_left_tied_is_found(tmp_path):
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    config: Any = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    merge_adapter(base, adapter, tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    assert wrong_modules(tmp_path, load_adapter(base, adapter))[1] == ["lm_head"]


def test_an_adapter_that_the_model_reads_past_is_named_however_small_it_is(tmp_path):
    base = tmp_path / "base"
    config: Any = {"r": 2, "target_modules": ["dt_proj", "in_proj"]}
    make_model("jamba", base, **SMALL, **MODELS["jamba"])
    adapter = make_adapter(base, tmp_path / "adapter", scale=1e-4, **config)
    merge_adapter(base, adapter, tmp_path / "merged")
    result = compared(tmp_path, load_adapter(base, adapter))
    assert result.bypassed_modules == ("model.layers.0.mamba.dt_proj",)
    assert "train again without it" in (result.find_problem(0.05) or "")


def test_an_adapter_past_which_the_model_reads_may_be_one_that_was_never_trained(tmp_path):
    base = tmp_path / "base"
    config: Any = {"r": 2, "target_modules": ["dt_proj", "in_proj"]}
    make_model("jamba", base, **SMALL, **MODELS["jamba"])
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors |= {name: one * 0 for name, one in tensors.items() if "dt_proj.lora_B" in name}
    save_file(tensors, path, {"format": "pt"})
    merge_adapter(base, adapter, tmp_path / "merged")
    result = compared(tmp_path, load_adapter(base, adapter))
    assert result.bypassed_modules == ()
    assert result.find_problem(0.05) is None
