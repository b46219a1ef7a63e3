"""Every member of the adapter union: its knobs reach peft, its arithmetic is peft's."""

import subprocess
import sys
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from llmtune.adapters.config import AdapterConfig
from llmtune.adapters.inject import adapted_layers, inject_adapter
from llmtune.adapters.offered import list_modules
from tests.tiny import make_model

METHODS = [member.model_fields["method"].default for member in get_args(get_args(AdapterConfig)[0])]
LOW_RANK = [
    member.model_fields["method"].default
    for member in get_args(get_args(AdapterConfig)[0])
    if "rank_pattern" in member.model_fields
]
PATTERNS = {
    "rank_pattern": {"q_proj": 8, r"layers\.1\..*": 2},
    "alpha_pattern": {"mlp.up_proj": 3, "v_proj": 40},
}


def parse(**knobs):
    return TypeAdapter(AdapterConfig).validate_python(knobs)


@pytest.mark.parametrize("method", LOW_RANK)
def test_rank_alpha_and_scaling_are_what_peft_applies(method):
    config = parse(method=method, rank=4, alpha=16, **PATTERNS)
    layers = adapted_layers(inject_adapter(make_model("llama"), config).model)

    for name, layer in layers.items():
        rank, alpha = config.rank_of(name), config.alpha_of(name)
        assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, alpha)
        assert layer.scaling["default"] == pytest.approx(config.scaling(rank, alpha))
    assert {layer.r["default"] for layer in layers.values()} == {8, 4, 2}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", LOW_RANK)
def test_parameters_are_counted_without_a_model(method, family):
    config = parse(method=method, rank=4, rank_pattern={r".*\.0\..*": 2})
    model = make_model(family)
    shapes = list_modules(model).adaptable
    injected = inject_adapter(model, config)
    adapted = {name: shapes[name] for name in adapted_layers(injected.model)}

    assert config.num_parameters(adapted) == injected.table.trainable_parameters


@pytest.mark.parametrize("method", METHODS)
def test_fresh_adapter_changes_nothing(method):
    model = make_model("llama")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = inject_adapter(model, parse(method=method)).model(ids).logits

    torch.testing.assert_close(after, before)


def test_methods_differ_where_they_should():
    assert parse(method="lora").scaling(16, 32) == 2
    assert parse(method="rslora").scaling(16, 32) == 8


def test_dropout_reaches_every_layer():
    injected = inject_adapter(make_model("llama"), parse(method="lora", dropout=0.25))

    assert {
        layer.lora_dropout["default"].p for layer in adapted_layers(injected.model).values()
    } == {0.25}


@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "lora", "r": 8},
        {"method": "nothing"},
        {"method": "dora", "lora_bias": True},
        {"method": "lora", "rank": 0},
        {"method": "lora", "dropout": 1.0},
        {"method": "lora", "layers": "first-3"},
        {"method": "lora", "layers": "last-0"},
    ],
)
def test_knob_that_makes_no_sense_is_refused(knobs):
    with pytest.raises(ValidationError):
        parse(**knobs)


def test_config_and_targets_load_nothing_heavy():
    program = (
        "import sys\n"
        "from llmtune.adapters import config, manifest, module_selection\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_section_without_a_method_is_lora():
    assert parse(rank=3).method == "lora"


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("pissa", "adapter.init: pissa"),
        ("LoftQ", "adapter.init: pissa"),
        ("prompt_tuning", "no merged model"),
    ],
)
def test_a_method_that_is_not_offered_is_answered_with_what_to_use(method, advice):
    with pytest.raises(ValidationError, match=advice):
        parse(method=method)


def test_qlora_is_explained():
    with pytest.raises(ValidationError, match="LoRA over a base that is kept in 4 bits"):
        parse(method="qlora")
