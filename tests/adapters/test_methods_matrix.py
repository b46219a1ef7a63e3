"""Method x family x base: merged as peft merges in float32, or refused by name before training.

The short list runs always, the whole as a slow test.
"""

import copy
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.config import METHODS
from llmtune.adapters.inject import adapted_layers, inject_adapter
from llmtune.adapters.manifest import read_adapter_config
from llmtune.adapters.saved import load_adapter, save_adapter
from llmtune.errors import LlmtuneError
from llmtune.merging.merge import write_merge
from llmtune.merging.plan import PlanOptions, plan_merge
from llmtune.models.config import ModelConfig
from llmtune.models.load import load_model
from llmtune.models.quantization.describe import compute_densely, describe_quantized_base
from llmtune.models.resolve import resolve_base
from tests.adapters.conftest import manifest_of
from tests.tiny import make_model

MOE = {"num_experts_per_tok": 2, "head_dim": 16, "num_key_value_heads": 2}
FAMILIES = {
    "llama": {},
    "qwen3_moe": {**MOE, "num_experts": 4, "moe_intermediate_size": 64},
    "gpt_oss": {**MOE, "num_local_experts": 4, "intermediate_size": 64, "sliding_window": 32},
    "gemma2": {},
    "gpt2": {},
}
QUANTIZED = {"dense": None, "nf4": {"method": "nf4"}}
KNOBS: dict[str, dict] = {
    "vera": {"rank": 16},
    "miss": {"rank": 24},
    "fourierft": {"num_frequencies": 100},
    "shira": {"rank": 4},
}
VARIANTS: dict[str, tuple[str, str, dict]] = {
    "lora from the weight": ("lora", "llama", {"init": "pissa", "rank": 4}),
    "dora from the weight": ("dora", "llama", {"init": "olora", "rank": 4}),
    "ia3 of inputs": ("ia3", "llama", {"feedforward_modules": ["down_proj"]}),
    "norms alone": ("layers", "gemma2", {"parameters": ["norms"]}),
    "norms and biases": ("layers", "gpt_oss", {"parameters": ["norms", "biases"]}),
    "biases alone": ("layers", "gpt2", {"parameters": ["biases"], "layers": "last-1"}),
}
ON_TRANSPOSED = {"layers", "lora", "rslora", "dora", "ia3", "vera", "fourierft", "adalora"}
NAMES = [method.name() for method in METHODS]
ON_QUANTIZED = set(NAMES) - {"layers"}
SHORT = {("llama", "nf4"), ("gpt2", "dense"), ("qwen3_moe", "dense")}


def is_refused(method: str, family: str, base: str) -> bool:
    if base == "nf4":
        return method not in ON_QUANTIZED
    return family == "gpt2" and method not in ON_TRANSPOSED


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")

    @cache
    def make(family: str) -> Path:
        make_model(family, root / family, dtype=torch.bfloat16, **FAMILIES[family])
        return root / family

    return make


def config_of(directory: Path, base: str) -> ModelConfig:
    return ModelConfig(
        base=str(directory), device="cpu", dtype="float32", quantization=QUANTIZED[base]
    )


def random_adapter(directory: Path, base: str, name: str, knobs: dict, place: Path) -> Path:
    """Save an adapter of which every tensor has moved, as a training on this base would."""
    config = config_of(directory, base)
    loaded = load_model(config, resolve_base(config))
    method = next(one for one in METHODS if one.name() == name)
    adapter = method(**knobs)
    model, table = inject_adapter(loaded.model, adapter)
    shapes = {
        name: shape_of(layer)
        for name, layer in adapted_layers(model).items()
        if hasattr(layer.get_base_layer(), "weight")
    }
    is_counted = adapter.trained_parts == {"weights"}  # what else: tests/adapters/test_inject.py
    if shapes and len(shapes) == len(adapted_layers(model)) and is_counted:
        assert adapter.num_parameters(shapes) == table.trainable_parameters
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return save_adapter(model, place, manifest_of(loaded))


def shape_of(layer) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def check(directory: Path, base: str, name: str, knobs: dict, place: Path) -> None:
    adapter = random_adapter(directory, base, name, knobs, place / "adapter")
    config = config_of(directory, base)
    source = resolve_base(config)
    quantized = describe_quantized_base(config, source) if base == "nf4" else None
    plan = plan_merge(source, adapter, options=PlanOptions(quantized=quantized))
    place.mkdir(exist_ok=True)
    write_merge(plan, place / "merged")
    found = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32)

    live = load_model(config, source)
    compute_densely(live.model, torch.float32, of=live.model)
    live.model.is_loaded_in_4bit = False  # peft's IA3 asks for that, not for its layers
    expected = load_adapter(live.model, adapter, base_fingerprint=live.fingerprint)
    expected = expected.merge_and_unload()
    before = copy.deepcopy(dict(AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32).named_parameters()))  # fmt: skip
    exact = dict(expected.named_parameters())
    num_changed = 0
    for key, weight in found.named_parameters():
        owner = found.get_submodule(key.rpartition(".")[0])
        is_turned = isinstance(owner, Conv1D) and not isinstance(
            expected.get_submodule(key.rpartition(".")[0]), Conv1D
        )
        own = exact[key].T if is_turned and exact[key].dim() == 2 else exact[key]
        torch.testing.assert_close(
            weight, own.to(torch.bfloat16).float(), rtol=2**-7, atol=1e-6, msg=f"{name}: {key}"
        )
        assert (weight == own.to(torch.bfloat16).float()).float().mean() > 0.99, (name, key)
        num_changed += not torch.equal(weight, before[key])
    assert num_changed >= 4


def cell(checkpoints, method: str, family: str, base: str, place: Path, knobs: dict) -> None:
    if is_refused(method, family, base):
        with pytest.raises(LlmtuneError, match=f"adapter.method={method} cannot adapt"):
            check(checkpoints(family), base, method, knobs, place)
    else:
        check(checkpoints(family), base, method, knobs, place)


@pytest.mark.parametrize("method", NAMES)
def test_a_method_is_merged_as_peft_merges_or_refused_by_name(checkpoints, method, tmp_path):
    for family, base in SHORT:
        cell(checkpoints, method, family, base, tmp_path / family, KNOBS.get(method, {}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_methods_are_merged_as_peft_merges(checkpoints, variant, tmp_path):
    method, family, knobs = VARIANTS[variant]
    both = method in ON_QUANTIZED or "parameters" in knobs
    for base in ("dense", "nf4") if both else ("dense",):
        check(checkpoints(family), base, method, knobs, tmp_path / base)
    if "init" in knobs:
        saved = read_adapter_config(tmp_path / "dense" / "adapter")
        assert (saved["r"], saved["init_lora_weights"]) == (8, True)


@pytest.mark.slow
@pytest.mark.parametrize("method", NAMES)
def test_every_other_cell(checkpoints, method, tmp_path):
    for family, base in itertools.product(FAMILIES, QUANTIZED):
        if (family, base) not in SHORT:
            place = tmp_path / f"{family}-{base}"
            cell(checkpoints, method, family, base, place, KNOBS.get(method, {}))
