"""Injecting: the chosen weights alone are trained, on every family, and the table says so."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmtune.adapters.dora import DoraAdapter
from llmtune.adapters.inject import adapted_layers, inject_adapter
from llmtune.adapters.live import switched_off
from llmtune.adapters.lora import LoraAdapter
from llmtune.adapters.module_selection import choose_targets
from llmtune.adapters.offered import list_modules
from llmtune.adapters.saved import load_adapter, save_adapter
from llmtune.adapters.whole_layers import LayersAdapter
from llmtune.errors import LlmtuneError
from tests.adapters.conftest import IDS, load, logits, manifest_of, train_a_little
from tests.tiny import FAMILIES, make_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [None, {"method": "nf4"}, {"method": "int8"}])
def test_every_adapter_weight_gets_a_gradient_and_nothing_else(checkpoint, family, quantization):
    loaded = load(checkpoint(family), quantization=quantization, dtype="bfloat16")
    model, _ = inject_adapter(loaded.model, LoraAdapter(rank=4))
    train_a_little(model)
    model(IDS, labels=IDS).loss.backward()

    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        if parameter.grad is not None:
            assert parameter.dtype == torch.float32, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("is_checkpointing", [False, True])
def test_injecting_and_loading_warn_of_nothing_that_peft_does_itself(
    checkpoint, tmp_path, is_checkpointing
):
    loaded, again = load(checkpoint()), load(checkpoint())
    if is_checkpointing:
        loaded.model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model, _ = inject_adapter(loaded.model, LoraAdapter(rank=4))
        save_adapter(model, tmp_path / "adapter", manifest_of(loaded))
        load_adapter(again.model, tmp_path / "adapter", base_fingerprint=loaded.fingerprint)


def test_table_counts_modules_parameters_and_shares():
    model = make_model("llama")
    num_base = sum(parameter.numel() for parameter in model.parameters())
    _, table = inject_adapter(model, LoraAdapter(rank=4, alpha=8, target_modules=["up_proj"]))

    (row,) = table.rows
    assert (row.pattern, row.count) == ("model.layers.*.mlp.up_proj", 2)
    assert row.settings == {"rank": 4, "alpha": 8, "scaling": 2}
    assert row.num_parameters == table.trainable_parameters == 2 * 4 * (64 + 128)
    assert table.total_parameters == num_base
    assert table.trainable_ratio == pytest.approx(table.trainable_parameters / num_base)
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert table.adapted_ratio == pytest.approx(2 * 64 * 128 / linear)


def test_total_counts_a_four_bit_weight_as_one(checkpoint):
    full = inject_adapter(load(checkpoint()).model, LoraAdapter()).table
    four_bit = load(checkpoint(), quantization={"method": "nf4"}, dtype="auto")

    assert inject_adapter(four_bit.model, LoraAdapter()).table.total_parameters == (
        full.total_parameters
    )


def test_misspelt_target_is_an_error_before_the_model_is_touched():
    model = make_model("llama")
    with pytest.raises(LlmtuneError, match="did you mean v_proj"):
        inject_adapter(model, LoraAdapter(target_modules=["q_proj", "v_prj"]))

    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(("family", "tied"), [("gemma2", True), ("gpt2", True), ("llama", False)])
def test_head_is_never_adapted_and_its_tie_is_seen(family, tied):
    model = make_model(family)
    with pytest.raises(LlmtuneError, match="tied" if tied else "modules_to_save"):
        inject_adapter(model, LoraAdapter(target_modules=["lm_head"]))
    injected = inject_adapter(model, LoraAdapter())

    assert "lm_head" not in adapted_layers(injected.model)


def test_chosen_layers_alone_are_adapted():
    injected = inject_adapter(make_model("llama"), LoraAdapter(layers="last-1"))

    assert {name.split(".")[2] for name in adapted_layers(injected.model)} == {"1"}


def test_saved_module_is_trained_whole():
    model, table = inject_adapter(
        make_model("llama"), LoraAdapter(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}

    assert any("lm_head.modules_to_save" in name for name in trained)
    assert table.saved_modules == ("lm_head",)
    assert table.trainable_parameters == 2 * 16 * (64 + 64) + 512 * 64


def test_chosen_layers_alone_are_trained_whole():
    model, table = inject_adapter(make_model("llama"), LayersAdapter(layers="last-1"))
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}

    assert trained and all(".layers.1." in name for name in trained)
    assert table.trainable_parameters == 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    assert sum(row.num_parameters for row in table.rows) == table.trainable_parameters


@pytest.mark.parametrize(
    ("family", "parameters", "trained"),
    [
        ("llama", ["norms"], 2 * 64),
        ("gpt2", ["norms"], 4 * 64),
        ("gpt2", ["biases"], 192 + 64 + 128 + 64),
        ("gpt2", ["weights"], 192 + 64 + 128 + 64 + 64 * (192 + 64 + 2 * 128)),
    ],
)
def test_norms_or_biases_alone_are_trained_and_counted(family, parameters, trained):
    config = LayersAdapter(parameters=parameters, layers="last-1")
    base = make_model(family)
    names = list_modules(base, config)
    chosen = {name: names.offered_to(config)[name] for name in choose_targets(config, names)}
    model, table = inject_adapter(base, config)
    with switched_off(model):
        pass
    model(IDS, labels=IDS).loss.backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None}

    assert (
        table.trainable_parameters
        == trained
        == sum(p.numel() for p in model.parameters() if p.grad is not None)
    )
    assert config.num_parameters(chosen, biased=names.biased) == trained
    assert sum(row.num_parameters for row in table.rows) == trained
    assert graded and all(".1." in name for name in graded)
    assert (table.adapted_ratio > 0) == (parameters == ["weights"])


def test_a_layer_without_biases_cannot_have_them_trained():
    asked = {"parameters": ["biases"]}
    with pytest.raises(LlmtuneError, match=r"adapter\.parameters: this model has no biases"):
        inject_adapter(make_model("llama"), LayersAdapter(**asked))
    with pytest.raises(LlmtuneError, match="'q_proj' has none of what adapter.parameters names"):
        inject_adapter(make_model("llama"), LayersAdapter(target_modules=["q_proj"], **asked))


@pytest.mark.parametrize(
    ("parameters", "targets", "lacking"),
    [
        (["weights", "norms"], ["q_proj"], "norms"),
        (["weights", "norms"], ".*norm", "weights"),
        (["norms", "biases"], "all-linear", "biases"),
    ],
)
def test_a_part_that_nothing_chosen_has_is_refused(parameters, targets, lacking):
    config = LayersAdapter(parameters=parameters, target_modules=targets)
    expected = rf"adapter\.parameters: this model has no {lacking} in what was chosen"
    with pytest.raises(LlmtuneError, match=expected) as caught:
        inject_adapter(make_model("llama"), config)
    assert len(str(caught.value).splitlines()) == 1


def test_experts_are_adapted_or_the_table_says_why_not():
    adapted = inject_adapter(make_model("mixtral"), LoraAdapter(rank=4)).table
    dropped = inject_adapter(make_model("mixtral"), LoraAdapter(rank=4, dropout=0.1)).table
    dora = inject_adapter(make_model("mixtral"), DoraAdapter(rank=4)).table
    named = inject_adapter(make_model("mixtral"), LoraAdapter(target_modules=["q_proj"])).table

    assert adapted.adapted_ratio == 1 and adapted.notices == ()
    assert "adapter.dropout=0" in dropped.notices[0]
    assert "DoRA cannot adapt them" in dora.notices[0]
    assert "not among the targets" in named.notices[0]
    norms = inject_adapter(make_model("mixtral"), LayersAdapter(parameters=["norms"])).table
    assert norms.notices == ()


DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
ROUTED: dict[str, Any] = {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("family", "knobs", "left_out"),
    [
        ("deepseek_v3", DEEPSEEK, "mlp.gate_proj.*peft takes its name for the weights"),
        ("mamba", {"state_size": 8}, "mixer.dt_proj, mixer.out_proj .4 layers.: the state-space"),
        ("phimoe", ROUTED, "mlp.router .2 layers.: PhimoeTopKRouter returns more than one"),
    ],
)
def test_what_cannot_be_adapted_is_left_out_of_all_linear_and_named(family, knobs, left_out):
    model, table = inject_adapter(make_model(family, **knobs), LoraAdapter())

    (notice,) = [one for one in table.notices if one.startswith("not adapted")]
    assert re.search(left_out, notice)
    assert table.rows
    model(torch.tensor([[5, 6, 7]]))  # the adapted model computes


def test_what_cannot_be_adapted_is_an_error_by_name():
    model = make_model("phimoe", **ROUTED)
    with pytest.raises(LlmtuneError, match="'router' cannot be adapted: PhimoeTopKRouter returns"):
        inject_adapter(model, LoraAdapter(target_modules=["q_proj", "router"]))
    with pytest.raises(LlmtuneError, match="matches cannot be adapted: PhimoeTopKRouter"):
        inject_adapter(model, LoraAdapter(target_modules=r".*\.router"))


def test_the_language_model_alone_is_adapted_inside_a_wrapper():
    text = {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    }
    vision = {
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config)
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        adapted, table = inject_adapter(copy.deepcopy(model), LoraAdapter(target_modules=targets))
        assert all("language_model" in row.pattern for row in table.rows)
        assert any("not part of the language model" in notice for notice in table.notices)
        assert all("language_model" in name for name in adapted_layers(adapted))


def test_saved_adapter_is_the_start(checkpoint, tmp_path):
    first = load(checkpoint())
    model, _ = inject_adapter(first.model, LoraAdapter(rank=4))
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter", manifest_of(first))
    config = LoraAdapter(rank=4, init_from=tmp_path / "adapter")
    again, _ = inject_adapter(load(checkpoint()).model, config, base_fingerprint=first.fingerprint)

    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"rank": 8}, "adapter.rank: the config says 8, the adapter has 4"),
        ({"rank": 4, "alpha": 8}, "adapter.alpha"),
        ({"rank": 4, "rank_pattern": {"q_proj": 2}}, "adapter.rank_pattern"),
        ({"rank": 4, "target_modules": ["q_proj"]}, "unexpected"),
    ],
)
def test_start_of_another_shape_is_refused_by_knob(checkpoint, tmp_path, knobs, named):
    first = load(checkpoint())
    model, _ = inject_adapter(first.model, LoraAdapter(rank=4))
    save_adapter(model, tmp_path / "adapter", manifest_of(first))
    with pytest.raises(LlmtuneError, match=named):
        inject_adapter(make_model("llama"), LoraAdapter(init_from=tmp_path / "adapter", **knobs))


def test_start_of_another_base_is_refused(checkpoint, tmp_path):
    first = load(checkpoint())
    model, _ = inject_adapter(first.model, LoraAdapter(rank=4))
    save_adapter(model, tmp_path / "adapter", manifest_of(first))
    other = load(checkpoint(seed=1))
    config = LoraAdapter(rank=4, init_from=tmp_path / "adapter")
    with pytest.raises(LlmtuneError, match="different base"):
        inject_adapter(other.model, config, base_fingerprint=other.fingerprint)
