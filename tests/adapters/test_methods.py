"""Every member of the union recognizes what it saved, and its updates are peft's own merge."""

import copy

import pytest
import torch
from peft import BOFTConfig, get_peft_model
from peft.tuners import boft as stock_boft
from safetensors.torch import load_file, save_file

from llmtune.adapters.butterfly import ButterflyLinear, butterfly_layers
from llmtune.adapters.config import METHODS, method_of
from llmtune.adapters.inject import adapted_layers, inject_adapter
from llmtune.adapters.live import adapter_strength
from llmtune.adapters.manifest import has_effect, read_adapter_config
from llmtune.adapters.products import LoHaAdapter, LoKrAdapter, MissAdapter
from llmtune.adapters.saved import load_adapter, save_adapter
from llmtune.adapters.vectors import Ia3Adapter, ShiraAdapter
from llmtune.errors import LlmtuneError
from llmtune.merging.merge import merge_adapter
from llmtune.models.quantization.describe import compute_densely
from tests.adapters.conftest import IDS, load, logits, manifest_of

SMALL: dict = {MissAdapter: {"rank": 24}, ShiraAdapter: {"rank": 4}}


@pytest.fixture(params=METHODS, ids=lambda method: method.name())
def trained(request, checkpoint, tmp_path):
    """An adapter whose every tensor has moved: (method, base, live model, directory)."""
    loaded = load(checkpoint())
    model, table = inject_adapter(loaded.model, request.param(**SMALL.get(request.param, {})))
    layers = adapted_layers(model)
    if layers:
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        knobs = SMALL.get(request.param, {})
        assert request.param(**knobs).num_parameters(shapes) == table.trainable_parameters
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    directory = save_adapter(model, tmp_path / "adapter", manifest_of(loaded))
    return request.param, loaded.source.directory, model, directory


def test_one_method_alone_owns_a_saved_adapter(trained):
    method, _, _, directory = trained
    config = read_adapter_config(directory)

    assert method_of(config) is method
    assert [one for one in METHODS if one.owns(config)] == [method]
    assert has_effect(directory)


def test_merged_weights_are_pefts_own(trained, tmp_path):
    _, base, model, directory = trained
    merge_adapter(base, directory, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = model.merge_and_unload().state_dict()

    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", [Ia3Adapter, LoHaAdapter, LoKrAdapter, ShiraAdapter])
def test_over_a_quantized_base_it_computes_what_peft_does_over_the_same_weights(
    checkpoint, tmp_path, method
):
    nf4 = {"quantization": {"method": "nf4"}}
    model, _ = inject_adapter(
        load(checkpoint(), dtype="bfloat16", **nf4).model, method(**SMALL.get(method, {}))
    )
    torch.manual_seed(2)
    model(IDS, labels=IDS).loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.dtype == torch.float32
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    assert logits(model).dtype == torch.bfloat16
    loaded, dense = load(checkpoint(), **nf4), load(checkpoint(), **nf4)
    saved = save_adapter(model, tmp_path / "adapter", manifest_of(loaded))
    compute_densely(dense.model, torch.float32, of=dense.model)
    ours, theirs = (
        logits(load_adapter(one.model, saved, base_fingerprint=one.fingerprint))
        for one in (loaded, dense)
    )

    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class BlockDiagonal:
    """What peft's CUDA extension for BOFT computes."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*each) for each in blocks])]

    @staticmethod
    def backward(gradient, blocks):
        _, num, size, _ = blocks.shape
        tables = gradient.unflatten(1, (num, size)).unflatten(3, (num, size))
        return [tables.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


@pytest.mark.parametrize("num_factors", [1, 2, 3])
def test_butterflies_without_tables_are_what_peft_computes_with_them(num_factors, monkeypatch):
    monkeypatch.setattr(stock_boft.layer, "_FBD_CUDA", BlockDiagonal)
    settings = {"boft_block_size": 4, "boft_n_butterfly_factor": num_factors}
    config = BOFTConfig(target_modules=["0"], **settings)
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(32, 24))
    theirs = get_peft_model(copy.deepcopy(base), config)
    with butterfly_layers():
        ours = get_peft_model(base, config)
    assert stock_boft.model.Linear is stock_boft.layer.Linear
    assert type(ours.base_model.model[0]) is ButterflyLinear
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
                theirs.get_parameter(name).copy_(parameter)
    inputs = torch.randn(3, 5, 32)
    for model in (ours, theirs):
        model(inputs).square().sum().backward()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            expected = theirs.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)
    tuned = ours(inputs)
    torch.testing.assert_close(tuned, theirs(inputs))
    merged = [model.merge_and_unload() for model in (ours, theirs)]
    torch.testing.assert_close(merged[0][0].weight, merged[1][0].weight)
    torch.testing.assert_close(merged[0](inputs), tuned, rtol=1e-4, atol=1e-4)


def test_a_weakened_layer_is_between_base_and_tuned_and_is_put_back(trained):
    _, _, model, _ = trained
    tuned = logits(model)
    with adapter_strength(model, 0.5):
        half = logits(model)

    assert not torch.allclose(half, tuned)
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ((0, 64), "names places outside a weight of"),
        ((1, -1), "names places outside a weight of"),
        (None, "names a place twice"),
    ],
)
def test_places_that_a_weight_does_not_have_are_refused(checkpoint, tmp_path, place, reason):
    loaded = load(checkpoint())
    model, _ = inject_adapter(loaded.model, ShiraAdapter(rank=4, target_modules=["q_proj"]))
    directory = save_adapter(model, tmp_path / "adapter", manifest_of(loaded))
    path = directory / "adapter_model.safetensors"
    tensors = {
        name: value if "indices" in name else value + 0.1 for name, value in load_file(path).items()
    }
    indices = next(value for name, value in tensors.items() if "shira_indices" in name)
    if place is None:
        indices[:, 0] = indices[:, 1]
    else:
        indices[place[0], 0] = place[1]
    save_file(tensors, path)
    (directory / "llmtune_adapter.json").unlink()

    with pytest.raises(LlmtuneError, match=reason):
        merge_adapter(loaded.source.directory, directory, tmp_path / "merged")
    fresh = load(checkpoint())
    with pytest.raises(LlmtuneError, match=reason):
        load_adapter(fresh.model, directory, base_fingerprint=fresh.fingerprint)


def test_a_type_that_no_method_owns_is_refused_with_those_that_are():
    with pytest.raises(LlmtuneError, match="type POLY; llmtune reads LORA.*lora, rslora, dora"):
        method_of({"peft_type": "POLY"})
