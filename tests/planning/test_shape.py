"""A model's shape is computed from config.json alone, and it is the shape transformers builds."""

import json
from collections import Counter

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmtune.adapters.module_selection import layer_number
from llmtune.adapters.offered import list_modules
from llmtune.errors import LlmtuneError
from llmtune.planning.families import FAMILIES
from llmtune.planning.shape import read_shape
from tests.planning.shapes import small_config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_is_the_one_transformers_builds(family):
    config = CONFIG_MAPPING[family](**small_config(family))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(json.loads(config.to_json_string(use_diff=False)), "here")
    names = list_modules(model)
    assert dict(shape.linear) == dict(names.linear)
    assert dict(shape.fused_experts) == dict(names.experts)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.biased == names.biased & names.linear.keys()
    assert norms_by_layer(shape.norms) == norms_by_layer(names.norms)


def norms_by_layer(norms) -> Counter:
    found: Counter = Counter()
    for name, size in norms.items():
        found[layer_number(name)] += size
    return found


def test_a_tiny_llama_counted_by_hand():
    shape = read_shape({**small_config("llama"), "model_type": "llama"}, "here")
    # hidden 64, 4 heads of 16, 2 key heads, feed-forward 128, 2 layers, vocabulary 512
    attention = 64 * 64 + 2 * (32 * 64) + 64 * 64
    feed_forward = 3 * 64 * 128
    assert shape.linear_parameters == 2 * (attention + feed_forward)
    assert shape.embedding_parameters == 512 * 64
    assert shape.num_parameters == shape.linear_parameters + 2 * 512 * 64 + 5 * 64


def test_a_mixture_uses_only_its_active_experts():
    shape = read_shape({**small_config("mixtral"), "model_type": "mixtral"}, "here")
    one_expert = 3 * 64 * 128
    assert shape.expert_parameters == 2 * 4 * one_expert
    assert shape.active_parameters == shape.linear_parameters + 2 * 2 * one_expert


def test_an_unknown_architecture_is_an_error_that_names_it():
    with pytest.raises(LlmtuneError, match="model type 'mamba'.*Known are: .*llama"):
        read_shape({"model_type": "mamba", "hidden_size": 64}, "base/config.json")


def test_all_missing_numbers_are_named():
    config = {**small_config("llama"), "model_type": "llama"}
    del config["hidden_size"], config["intermediate_size"]
    with pytest.raises(LlmtuneError, match="hidden_size, intermediate_size"):
        read_shape(config, "base/config.json")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "head_dim", [8]),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "mlp_only_layers", 5),
    ],
)
def test_a_number_that_is_none_is_named(family, key, value):
    config = {**small_config(family), "model_type": family, key: value}
    with pytest.raises(LlmtuneError, match=key):
        read_shape(config, "config.json")
