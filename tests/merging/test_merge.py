"""A merged tensor is the float32 sum rounded once, and the merged model answers as the adapter."""

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from llmtune.io.safetensors import SINGLE_FILE, CheckpointIndex, read_header
from llmtune.merging import changes
from llmtune.merging.merge import merge_adapter
from tests.merging.adapters import load_adapter, load_base, logits, make_adapter, make_base
from tests.tiny import FAMILIES

TIED: dict[str, Any] = {"tie_word_embeddings": True}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16}


def load_tensors(directory) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same_answers(base_dir, adapter_dir, merged_dir, tolerance=2e-5):
    live = logits(load_adapter(base_dir, adapter_dir, torch.float32))
    assert (live - logits(load_base(base_dir, torch.float32))).abs().max() > 0.05
    merged = logits(load_base(merged_dir, torch.float32))
    torch.testing.assert_close(merged, live, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [None, 40_000])
def test_merged_weights_are_bit_equal_to_the_whole_float32_sum(
    tmp_path, monkeypatch, dtype, shard_bytes
):
    monkeypatch.setattr(changes, "TILE_ELEMENTS", 64 * 64)  # several tiles a tensor
    base = make_base(tmp_path / "base", dtype=dtype, intermediate_size=334 * 2)
    if shard_bytes:
        load_base(base).save_pretrained(base, max_shard_size=shard_bytes)
        (base / SINGLE_FILE).unlink(missing_ok=True)
        assert len(CheckpointIndex.open(base).shards) > 3
    adapter = make_adapter(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged")
    before, after = load_tensors(base), load_tensors(tmp_path / "merged")
    deltas = load_tensors(adapter)
    assert before.keys() == after.keys()
    num_merged = 0
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{key}.lora_A.weight" in deltas:
            a, b = deltas[f"{key}.lora_A.weight"], deltas[f"{key}.lora_B.weight"]
            expected = (weight.float() + 2.0 * (b.float() @ a.float())).to(dtype)
            num_merged += 1
        assert torch.equal(after[name], expected), name
    assert num_merged == 14


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen2", dtype) for dtype in DTYPES] + [(family, torch.bfloat16) for family in FAMILIES],
)
def test_merge_equals_pefts_own_within_one_rounding(tmp_path, family, dtype):
    base = make_base(tmp_path / "base", family, dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", use_rslora=True)
    merge_adapter(base, adapter, tmp_path / "merged")
    stock = load_adapter(base, adapter).merge_and_unload().state_dict()
    before = load_base(base).state_dict()
    for name, weight in load_base(tmp_path / "merged").state_dict().items():
        # Where peft adds to a bare parameter (experts, routers) it rounds the delta first.
        delta = weight.float() - before[name].float()
        size = torch.maximum(weight.float().abs(), delta.abs()).clamp(min=2**-10)
        difference = (weight.float() - stock[name].float()).abs()
        assert (difference <= torch.finfo(dtype).eps * size).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_equals_forward_with_adapter_in_every_family(tmp_path, family):
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same_answers(base, adapter, tmp_path / "merged")


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dora": ("llama", {}, {"use_dora": True}),
    "dora conv1d": ("gpt2", {}, {"use_dora": True}),
    "dora embedding": ("llama", {}, {"use_dora": True, "target_modules": ["embed_tokens"]}),
    "rank and alpha patterns": (
        "llama",
        {},
        {
            "rank_pattern": {"q_proj": 8, r"layers\.0\..*up_proj": 2},
            "alpha_pattern": {r"^model\.layers\.1\..*": 3, "proj": 30},
        },
    ),
    "rslora with patterns": ("llama", {}, {"use_rslora": True, "rank_pattern": {"v_proj": 9}}),
    "embedding": ("llama", {}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": ("llama", TIED, {"target_modules": ["embed_tokens"]}),
    "tied embedding and head": (
        "llama",
        TIED,
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "head": ("llama", {}, {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": ("llama", TIED, {"target_modules": ["lm_head"]}),
    "tied head of gemma": ("gemma2", {}, {"target_modules": ["lm_head"]}),
    "tied head of gpt2": ("gpt2", {}, {"target_modules": ["c_attn", "lm_head"]}),
    "tied head of gpt-neox": ("gpt_neox", TIED, {"target_modules": ["lm_head"]}),
    "whole tied embedding": ("llama", TIED, {"modules_to_save": ["embed_tokens"]}),
    "whole tied head": ("llama", TIED, {"modules_to_save": ["lm_head"]}),
    "whole tied both": (
        "llama",
        TIED,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "whole norms and head": ("llama", {}, {"modules_to_save": ["norm", "lm_head"]}),
    "whole renamed head": ("gpt_neox", {}, {"modules_to_save": ["lm_head"]}),
    "token rows": ("llama", {}, {"trainable_token_indices": [5, 17]}),
    "tied token rows": ("llama", TIED, {"trainable_token_indices": [5, 17]}),
    "token rows of both": (
        "llama",
        {},
        {"trainable_token_indices": {"embed_tokens": [5, 17], "lm_head": [88]}},
    ),
    "tied token rows of both": (
        "llama",
        TIED,
        {"trainable_token_indices": {"embed_tokens": [5, 17], "lm_head": [88]}},
    ),
    "lora's own bias": ("qwen2", {}, {"target_modules": ["q_proj"], "lora_bias": True}),
    "every bias": ("qwen2", {}, {"bias": "all"}),
    "adapted biases": ("phi", {}, {"bias": "lora_only"}),
    "experts per layer name": ("mixtral", {}, {"target_modules": ["w1", "w2", "w3"]}),
    "one expert parameter": (
        "mixtral",
        {},
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "experts of qwen3": (
        "qwen3_moe",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
        {},
    ),
    "fused transposed experts": (
        "gpt_oss",
        {**EXPERTS, "num_local_experts": 4, "intermediate_size": 64},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "orthogonal start": ("llama", {}, {"init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("case", CASES)
def test_merge_equals_forward_with_adapter_of_every_kind(tmp_path, case):
    family, options, config = CASES[case]
    base = make_base(tmp_path / "base", family, **options)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same_answers(base, adapter, tmp_path / "merged")


def test_dora_merge_equals_pefts_own(tmp_path):
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=True)
    merge_adapter(base, adapter, tmp_path / "merged")
    stock = load_adapter(base, adapter).merge_and_unload().state_dict()
    for name, weight in load_tensors(tmp_path / "merged").items():
        torch.testing.assert_close(weight, stock[name], atol=1e-6, rtol=1e-5)


def test_16_bit_adapter_is_widened_before_the_product(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    model = get_peft_model(
        load_base(base), LoraConfig(target_modules=["q_proj"], r=4), autocast_adapter_dtype=False
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    deltas = load_tensors(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (deltas[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert a.dtype == torch.bfloat16
    weight = load_tensors(base)[f"{name}.weight"]
    expected = (weight.float() + 2.0 * (b.float() @ a.float())).bfloat16()
    assert torch.equal(load_tensors(tmp_path / "merged")[f"{name}.weight"], expected)


def test_bare_gpt2_checkpoint_takes_an_adapter_trained_with_prefixes(tmp_path):
    base = make_base(tmp_path / "base", "gpt2")
    load_base(base).transformer.save_pretrained(base)
    assert "wte.weight" in load_tensors(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "lm_head"])
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same_answers(base, adapter, tmp_path / "merged")


BOTH_TABLES = {"modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        ({}, BOTH_TABLES),
        ({}, {"trainable_token_indices": [513, 514]}),
        (TIED, {}),
        (TIED, BOTH_TABLES),
        (TIED, {**BOTH_TABLES, "ensure_weight_tying": True}),
        (TIED, {"trainable_token_indices": [513, 514]}),
        (TIED, {"target_modules": ["embed_tokens"]}),
    ],
)
def test_grown_vocabulary_comes_along(tmp_path, options, config):
    base = make_base(tmp_path / "base", **options)
    model = load_base(base)
    model.resize_token_embeddings(520, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_base(tmp_path / "merged")
    assert merged.config.vocab_size == 520
    prompts = [[2, 513, 519, 8]]
    expected = logits(model.eval(), prompts)
    torch.testing.assert_close(logits(merged, prompts), expected, atol=2e-5, rtol=0)


def test_two_equal_grown_tables_stay_one_tied_tensor(tmp_path):
    base = make_base(tmp_path / "base", **TIED)
    model = load_base(base)
    model.resize_token_embeddings(520, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert "lm_head.weight" not in load_tensors(tmp_path / "merged")
    assert load_base(tmp_path / "merged").config.tie_word_embeddings


def test_strength_scales_the_adapter(tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["norm"])
    merge_adapter(base, adapter, tmp_path / "half", strength=0.5)
    before, deltas = load_tensors(base), load_tensors(adapter)
    after = load_tensors(tmp_path / "half")
    name = "model.layers.1.mlp.up_proj"
    a, b = (deltas[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = before[f"{name}.weight"] + 2.0 * 0.5 * (b @ a)
    assert torch.equal(after[f"{name}.weight"], expected)
    norm = deltas["base_model.model.model.norm.weight"]
    middle = (before["model.norm.weight"] + norm) / 2
    torch.testing.assert_close(after["model.norm.weight"], middle)


@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}, {"lora_bias": True}]
)
def test_strength_0_gives_the_base_back(tmp_path, config):
    base = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **config)
    merge_adapter(base, adapter, tmp_path / "merged", strength=0)
    before, after = load_tensors(base), load_tensors(tmp_path / "merged")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_merged_files_keep_names_order_header_and_untouched_bytes(tmp_path):
    base = make_base(tmp_path / "base")
    load_base(base).save_pretrained(base, max_shard_size=60_000)
    (base / SINGLE_FILE).unlink(missing_ok=True)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge_adapter(base, adapter, tmp_path / "merged")
    names = sorted(path.name for path in base.glob("*.safetensors"))
    assert names == sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    for name in names:
        before, after = read_header(base / name), read_header(tmp_path / "merged" / name)
        assert before.preamble == after.preamble
        raw_before, raw_after = ((d / name).read_bytes() for d in (base, tmp_path / "merged"))
        for entry in before.tensors:
            is_same = raw_before[entry.start : entry.stop] == raw_after[entry.start : entry.stop]
            assert is_same == ("q_proj" not in entry.name), entry.name
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        entry.name: name for name in names for entry in read_header(base / name).tensors
    }
    sizes = [e.num_bytes for name in names for e in read_header(base / name).tensors]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_kernel_copy_has_a_plain_fallback(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge_adapter(base, adapter, tmp_path / "one")
    monkeypatch.delattr("os.copy_file_range")
    merge_adapter(base, adapter, tmp_path / "two")
    one, two = ((tmp_path / name / SINGLE_FILE).read_bytes() for name in ("one", "two"))
    assert one == two


def test_result_does_not_depend_on_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "TILE_ELEMENTS", 64 * 64)
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    for threads in (1, 4):
        merge_adapter(base, adapter, tmp_path / str(threads), num_threads=threads)
    one, four = ((tmp_path / name / SINGLE_FILE).read_bytes() for name in ("1", "4"))
    assert one == four


def test_stock_peft_loads_what_was_merged_from(tmp_path):
    base = make_base(tmp_path / "base", "mixtral")
    adapter = make_adapter(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged", strength=1.0)
    again = PeftModel.from_pretrained(load_base(tmp_path / "merged"), adapter)
    with again.disable_adapter():
        torch.testing.assert_close(
            logits(again.eval()), logits(load_adapter(base, adapter)), atol=2e-5, rtol=0
        )
